"""Adapters on Megatron's own fused and sharded weights: merged as sent, they are what merging in place would give."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from tests.runtime.layout.megatron_configs import BIASED, DEEPSEEK, LLAMA, QWEN3_MOE
from tests.runtime.layout.megatron_models import Parallel, build, fake_rank
from tests.runtime.layout.moving import move
from wavecast.runtime.layout import lora, megatron
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Shard

RANK = 3

CASES = {
    "llama tp2": (LLAMA, Parallel(tp=2)),
    "biases tp2 pp2": (BIASED, Parallel(tp=2, pp=2)),
    "qwen3-moe tp2 ep2": (QWEN3_MOE, Parallel(tp=2, ep=2)),
    "deepseek tp2 ep2": (DEEPSEEK, Parallel(tp=2, ep=2)),
}


def whole_numbers(generator, *shape):
    return torch.randint(-4, 5, shape, generator=generator).float()


def adapted_weights(chunks):
    """Yield every matrix of a decoder layer's linear modules, as this rank holds it."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if ".layers." in name and ".linear_" in name and name.endswith(".weight") and weight.dim() == 2:
                yield weight


def received(ranks):
    """Move what ``ranks`` hold into one actor that holds everything whole."""
    shapes = {shard.name: (shard.global_shape, shard.view.dtype) for held in ranks for shard in held}
    targets = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    move(ranks, [[Shard(name, view, (0,) * view.dim(), tuple(view.shape)) for name, view in targets.items()]])
    return targets


@pytest.mark.parametrize("case", CASES)
def test_merged_as_sent_is_what_merged_in_place_would_be(case):
    mapping, parallel = CASES[case]
    config = ModelConfig.from_dict(mapping)
    merged, in_place, adapted = [], [], 0
    for rank in range(parallel.world_size):
        with fake_rank(rank, parallel):
            chunks = build(mapping, parallel)
            generator = torch.Generator().manual_seed(rank)
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.copy_(whole_numbers(generator, *parameter.shape))

            base = megatron.shards(chunks, config)
            adapters, deltas = [], []
            for weight in adapted_weights(chunks):
                a = whole_numbers(generator, RANK, weight.shape[1])
                b = whole_numbers(generator, weight.shape[0], RANK)
                adapters += lora.attached(base, weight, a, b, scale=0.5)
                deltas.append((weight, 0.5 * b @ a))

            adapted += len(adapters)
            merged.append(lora.merged(base, adapters))
            in_place.append((base, deltas))

    arrived = received(merged)
    for _, deltas in in_place:
        for weight, delta in deltas:
            weight.data += delta

    wanted = received([base for base, _ in in_place])
    assert adapted > 4
    assert arrived.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(arrived[name], value), name
