"""Real Megatron-core models against whole checkpoints, bit for bit, in both directions, in worlds of one process."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("megatron.core")

from tests.runtime.layout.known_bits import known_checkpoint
from tests.runtime.layout.megatron_configs import (
    BIASED,
    DEEPSEEK,
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    TIED,
)
from tests.runtime.layout.megatron_models import BEFORE_0_19, Parallel, build, fake_rank, padded
from tests.runtime.layout.megatron_whole import fill, read, whole_shards, whole_tensors
from tests.runtime.layout.moving import move
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.megatron import model_config, shards

ONE_KEY = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 1}
UNEVEN = {"num_layers_in_first_pipeline_stage": 1}
CUSTOM = {"pipeline_model_parallel_layout": "E|ttt|t|L"}

CASES = {
    "llama alone": (LLAMA, Parallel()),
    "llama tp2": (LLAMA, Parallel(tp=2)),
    "llama tp4 pp2": (LLAMA, Parallel(tp=4, pp=2)),
    "llama tp4, one key head: cut within heads": (ONE_KEY, Parallel(tp=4)),
    "llama dp2": (LLAMA, Parallel(tp=2, dp=2)),
    "biases everywhere tp2": (BIASED, Parallel(tp=2)),
    "qwen2 tp2 pp2": (QWEN2, Parallel(tp=2, pp=2)),
    "qwen2 tp4 over 2 groups": (QWEN2, Parallel(tp=4)),
    "qwen2 tp4, a rank of padding alone": (QWEN2, Parallel(tp=4, padding=16)),
    "tied pp1": (TIED, Parallel(tp=2)),
    "tied pp2: the last stage has its own copy": (TIED, Parallel(tp=2, pp=2)),
    "qwen3 tp3": (QWEN3, Parallel(tp=3)),
    "uneven stages": (QWEN3, Parallel(pp=2, options=UNEVEN)),
    "virtual stages": (QWEN3, Parallel(pp=2, vpp=2)),
    "a custom pipeline layout, embedding and head alone": (QWEN3, Parallel(pp=4, options=CUSTOM)),
    "norms fused tp2": (QWEN2, Parallel(tp=2, fused_norms=True)),
    "qwen3-moe ep2": (QWEN3_MOE, Parallel(dp=2, ep=2)),
    "qwen3-moe ep3 grouped": (QWEN3_MOE, Parallel(dp=3, ep=3, experts="grouped")),
    "qwen3-moe tp2 ep2 etp1": (QWEN3_MOE, Parallel(tp=2, ep=2)),
    "qwen3-moe tp2 ep2 etp2": (QWEN3_MOE, Parallel(tp=2, dp=2, ep=2, etp=2)),
    "qwen3-moe etp2 grouped": (QWEN3_MOE, Parallel(tp=2, etp=2, experts="grouped")),
    "qwen3-moe etp2 te pp2": (QWEN3_MOE, Parallel(tp=2, pp=2, etp=2, experts="te", fused_norms=True)),
    "qwen3-moe vpp2 ep2 te": (QWEN3_MOE, Parallel(pp=2, vpp=2, dp=2, ep=2, experts="te")),
    "qwen2-moe tp2: shared expert and gate": (QWEN2_MOE, Parallel(tp=2, etp=2)),
    "qwen2-moe ep2 pp2": (QWEN2_MOE, Parallel(dp=2, ep=2, pp=2)),
    "mixtral ep4": (MIXTRAL, Parallel(dp=4, ep=4)),
    "mixtral tp2 ep2": (MIXTRAL, Parallel(tp=2, ep=2, experts="te")),
    "deepseek alone": (DEEPSEEK, Parallel()),
    "deepseek tp2 ep2": (DEEPSEEK, Parallel(tp=2, ep=2)),
    "deepseek pp2 etp2 te": (DEEPSEEK, Parallel(tp=2, pp=2, etp=2, experts="te", fused_norms=True)),
    "deepseek without compressed queries tp2": ({**DEEPSEEK, "q_lora_rank": None}, Parallel(tp=2)),
}


if not BEFORE_0_19:
    CASES = {
        name: (mapping, parallel)
        for name, (mapping, parallel) in CASES.items()
        if parallel.experts != "grouped" and mapping.get("q_lora_rank", 1) is not None
    }


def megatron_ranks(mapping, parallel, whole=None):
    """Return, for every rank, its chunks (filled where ``whole`` is given) and its shards."""
    config = ModelConfig.from_dict(mapping)
    ranks = []
    for rank in range(parallel.world_size):
        with fake_rank(rank, parallel):
            chunks = build(mapping, parallel)
            if whole is not None:
                fill(chunks, whole)
            else:
                for chunk in chunks:
                    for tensor in (*chunk.parameters(), *chunk.buffers()):
                        tensor.detach().fill_(-7)

            ranks.append((chunks, shards(chunks, config)))

    return ranks


def assert_filled(ranks, mapping, parallel, checkpoint):
    """Check, by Megatron's own reading, that every rank holds the checkpoint, and that padding was left alone."""
    whole = whole_tensors(checkpoint, mapping, padded(mapping, parallel))
    for rank, (chunks, _) in enumerate(ranks):
        with fake_rank(rank, parallel):
            for key, where, value in read(chunks):
                assert torch.equal(value, whole[key][where]), (rank, key)


@pytest.mark.parametrize("case", CASES)
def test_megatron_brings_a_whole_checkpoint_its_own_bits(case):
    mapping, parallel = CASES[case]
    checkpoint = known_checkpoint(ModelConfig.from_dict(mapping))
    whole = whole_tensors(checkpoint, mapping, padded(mapping, parallel))
    ranks = megatron_ranks(mapping, parallel, whole)
    received = {name: torch.zeros_like(value) for name, value in checkpoint.items()}
    move([held for _, held in ranks], [whole_shards(received)])
    for name, value in checkpoint.items():
        assert torch.equal(received[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_megatron_takes_a_whole_checkpoint_bit_for_bit(case):
    mapping, parallel = CASES[case]
    checkpoint = known_checkpoint(ModelConfig.from_dict(mapping))
    ranks = megatron_ranks(mapping, parallel)
    move([whole_shards(checkpoint)], [held for _, held in ranks])
    assert_filled(ranks, mapping, parallel, checkpoint)


@pytest.mark.parametrize(
    ("mapping", "source", "destination"),
    [
        (QWEN2, Parallel(tp=4, pp=2), Parallel(tp=2, padding=5)),
        (QWEN2, Parallel(pp=2, vpp=2, tp=2), Parallel(tp=4)),
        (QWEN3, Parallel(tp=2, pp=2), Parallel(tp=3)),
        (QWEN3, Parallel(tp=3), Parallel(tp=6, pp=4)),
        (TIED, Parallel(tp=2, pp=4), Parallel(tp=4, pp=2)),
        (QWEN3_MOE, Parallel(tp=2, dp=2, ep=2, etp=2), Parallel(dp=3, ep=3, experts="grouped")),
        (QWEN3_MOE, Parallel(pp=2, dp=2, ep=2, experts="te"), Parallel(tp=6, etp=4, dp=2, experts="grouped")),
        (DEEPSEEK, Parallel(tp=2, ep=2, pp=2), Parallel(tp=4, dp=2, etp=2)),
    ],
)
def test_megatron_to_megatron_in_another_layout(mapping, source, destination):
    if not BEFORE_0_19 and destination.experts == "grouped":
        destination = dataclasses.replace(destination, experts="te")

    checkpoint = known_checkpoint(ModelConfig.from_dict(mapping))
    senders = megatron_ranks(mapping, source, whole_tensors(checkpoint, mapping, padded(mapping, source)))
    receivers = megatron_ranks(mapping, destination)
    move([held for _, held in senders], [held for _, held in receivers])
    assert_filled(receivers, mapping, destination, checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_shards_are_views_of_the_parameters_and_cover_them_once(case):
    mapping, parallel = CASES[case]
    for chunks, held in megatron_ranks(mapping, parallel):
        tensors = [tensor for chunk in chunks for tensor in chunk.parameters()]
        tensors += [value for chunk in chunks for name, value in chunk.named_buffers() if name.endswith("expert_bias")]
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
        for shard in held:
            assert any(low <= shard.view.data_ptr() < high for low, high in spans), shard.name
            assert not shard.view.requires_grad

        padding = sum(chunk_rows(chunk, parallel, mapping) * int(mapping["hidden_size"]) for chunk in chunks)
        assert sum(math.prod(shard.view.shape) for shard in held) == sum(t.numel() for t in tensors) - padding


def chunk_rows(chunk, parallel, mapping):
    """Return how many rows of padding a chunk holds in its embedding and its head."""
    count = 0
    for module in (
        getattr(getattr(chunk, "embedding", None), "word_embeddings", None),
        getattr(chunk, "output_layer", None),
    ):
        weight = getattr(module, "weight", None)
        if weight is not None:
            first = module.tp_group.rank() * len(weight)
            count += sum(row >= mapping["vocab_size"] for row in range(first, first + len(weight)))

    return count


@pytest.mark.parametrize("mapping", [LLAMA, QWEN2, TIED, QWEN3, QWEN2_MOE, QWEN3_MOE, MIXTRAL, DEEPSEEK])
def test_the_configuration_is_read_off_the_model(mapping):
    with fake_rank(0, Parallel()):
        [model] = build(mapping, Parallel(padding=8))

    wanted = known_checkpoint(ModelConfig.from_dict(mapping))
    guessed = known_checkpoint(model_config(model, vocab_size=int(mapping["vocab_size"])))
    assert {name: value.shape for name, value in guessed.items()} == {name: v.shape for name, v in wanted.items()}
    assert {shard.name for shard in shards(model, vocab_size=int(mapping["vocab_size"]))} == set(wanted)
    assert model_config(model).vocab_size == 24
