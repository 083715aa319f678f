"""Megatron-core models on four real ranks (gloo), their memory shared with this process, which plans and moves."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

pytest.importorskip("megatron.core")

from tests.runtime.layout.known_bits import known_checkpoint
from tests.runtime.layout.megatron_configs import DEEPSEEK, QWEN2, QWEN3_MOE, TIED
from tests.runtime.layout.megatron_models import Parallel, build, fake_rank, logits, padded, real_rank
from tests.runtime.layout.megatron_whole import fill, read, whole_shards, whole_tensors
from tests.runtime.layout.moving import move
from wavecast.runtime import Shard
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.megatron import shards

pytestmark = pytest.mark.timeout(240)

WORLD = 4
CASES = {
    "tp2 pp2": (TIED, Parallel(tp=2, pp=2)),
    "tp4 over 2 groups": (QWEN2, Parallel(tp=4, padding=16)),
    "pp2 vpp2 tp2": (QWEN2, Parallel(tp=2, pp=2, vpp=2)),
    "tp2 ep2 etp2": (QWEN3_MOE, Parallel(tp=2, dp=2, ep=2, etp=2, experts="te")),
    "pp2 ep2": (QWEN3_MOE, Parallel(pp=2, dp=2, ep=2)),
    "deepseek tp2 pp2 ep2": (DEEPSEEK, Parallel(tp=2, pp=2, ep=2)),
}


class Rank:
    """What a process does: builds models and answers for them."""

    def build(self, rank: int, mapping: Mapping[str, object], parallel: Parallel, store: str) -> list[Shard]:
        self._world = real_rank(rank, parallel, store)
        self._world.__enter__()
        self._chunks = build(mapping, parallel)
        for chunk in self._chunks:
            chunk.share_memory()

        return shards(self._chunks, ModelConfig.from_dict(mapping))

    def fill(self, whole: Mapping[str, torch.Tensor]) -> None:
        fill(self._chunks, dict(whole))

    def wrong(self, whole: Mapping[str, torch.Tensor]) -> list[str]:
        return [key for key, where, value in read(self._chunks) if not torch.equal(value, whole[key][where])]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return logits(self._chunks[0], tokens)

    def leave(self) -> None:
        self._world.__exit__(None, None, None)


def serve(calls, answers) -> None:  # type: ignore[no-untyped-def]
    """Answer calls until there is none."""
    torch.set_num_threads(1)
    rank = Rank()
    while (call := calls.get()) is not None:
        try:
            answers.put((True, getattr(rank, call[0])(*call[1:])))
        except Exception:
            answers.put((False, traceback.format_exc()))


class Ranks:
    """Four processes."""

    def __init__(self) -> None:
        # A start is seconds of imports: one process does them for all.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.runtime.layout.megatron_models", "tests.runtime.layout.megatron_whole"])
        self._queues = [(context.SimpleQueue(), context.SimpleQueue()) for _ in range(WORLD)]
        self._processes = [context.Process(target=serve, args=queues, daemon=True) for queues in self._queues]
        for process in self._processes:
            process.start()

    def call(self, method: str, *arguments: object, ranked: bool = False) -> list:
        for rank, (calls, _) in enumerate(self._queues):
            calls.put((method, *((rank,) if ranked else ()), *arguments))

        found = [answers.get() for _, answers in self._queues]
        for good, answer in found:
            assert good, answer

        return [answer for _, answer in found]

    def stop(self) -> None:
        for calls, _ in self._queues:
            calls.put(None)

        for process in self._processes:
            process.join(10)


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.stop()
    assert not multiprocessing.active_children()


@pytest.fixture
def ranks(processes: Ranks) -> Iterator[Ranks]:
    yield processes
    processes.call("leave")


@pytest.mark.parametrize("case", CASES)
def test_weights_go_from_real_ranks_and_back(case, ranks, tmp_path: Path):
    mapping, parallel = CASES[case]
    first = known_checkpoint(ModelConfig.from_dict(mapping))
    held = ranks.call("build", mapping, parallel, str(tmp_path / "store"), ranked=True)
    whole = whole_tensors(first, mapping, padded(mapping, parallel))
    ranks.call("fill", whole)
    received = {name: torch.zeros_like(value) for name, value in first.items()}
    move(held, [whole_shards(received)])
    for name, value in first.items():
        assert torch.equal(received[name], value), name

    second = {name: value.flip(0).contiguous() for name, value in first.items()}
    move([whole_shards(second)], held)
    assert ranks.call("wrong", whole_tensors(second, mapping, padded(mapping, parallel))) == [[]] * WORLD


def test_four_ranks_that_share_two_key_heads_compute_what_one_does(ranks, tmp_path: Path):
    options = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    alone, apart = Parallel(options=options), Parallel(tp=4, padding=16, options=options)
    held = ranks.call("build", QWEN2, apart, str(tmp_path / "store"), ranked=True)
    tokens = torch.arange(14).reshape(2, 7)
    generator = torch.Generator().manual_seed(0)
    with fake_rank(0, alone):
        [model] = build(QWEN2, alone)
        for name, parameter in model.named_parameters():
            parameter.data.normal_(generator=generator).mul_(0.3).add_(1.0 if "norm" in name else 0.0)

        move([shards(model, ModelConfig.from_dict(QWEN2))], held)
        wanted = logits(model, tokens)

    parts = ranks.call("logits", tokens)
    torch.testing.assert_close(torch.cat(parts, dim=-1)[..., :23], wanted, atol=1e-5, rtol=1e-5)
