"""The vLLM layout, held against what vLLM's own loader made of the same checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.layout.known_bits import known_checkpoint, sha256_of
from tests.runtime.layout.moving import move
from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout import vllm
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Shard, describe
from wavecast.runtime.layout.vllm import EngineFormat, EngineRank
from wavecast.runtime.plan.reshard import plan_reshard

GOLDEN = json.loads((Path(__file__).with_name("golden") / "vllm.json").read_text("ascii"))


def ranks_of(case):
    """Return every worker of a case, in the order of its dumps."""
    return [
        EngineRank(tp, case["tp"], pp, case["pp"], dp, case["dp"], case["ep"])
        for dp in range(case["dp"])
        for pp in range(case["pp"])
        for tp in range(case["tp"])
    ]


def shards_of(named, config, rank, **options):
    return vllm.shards(
        named,
        config,
        tp_rank=rank.tp_rank,
        tp_size=rank.tp_size,
        pp_rank=rank.pp_rank,
        pp_size=rank.pp_size,
        dp_rank=rank.dp_rank,
        dp_size=rank.dp_size,
        expert_parallel=rank.expert_parallel,
        **options,
    )


def buffers_like(dump, fill=0):
    """Return parameters of the names, shapes and dtypes of a dump."""
    return {
        name: torch.full([int(size) for size in shape.split("x")], fill, dtype=getattr(torch, dtype))
        for name, (shape, dtype, _) in dump.items()
    }


def buffers_for(config, rank, fmt=vllm.VLLM):
    return {
        claim.name: torch.zeros(claim.shape, dtype=getattr(torch, claim.dtype or "bfloat16"))
        for claim in vllm.parameters(config, rank, fmt=fmt)
    }


def whole(config):
    """Return one actor's shards of the whole checkpoint."""
    return [
        Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))
        for name, tensor in known_checkpoint(config).items()
    ]


def hashes(buffers):
    return {name: sha256_of(buffer) for name, buffer in buffers.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_sync_into_zeroed_buffers_leaves_what_vllms_loader_leaves(name):
    case = GOLDEN[name]
    config = ModelConfig.from_dict(case["config"])
    ranks = ranks_of(case)
    engine = [buffers_like(dump) for dump in case["ranks"]]
    move([whole(config)], [shards_of(own, config, rank) for own, rank in zip(engine, ranks, strict=True)])
    for own, dump in zip(engine, case["ranks"], strict=True):
        assert hashes(own) == {name: digest for name, (_, _, digest) in dump.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_parameters_expected_are_those_vllm_builds(name):
    case = GOLDEN[name]
    config = ModelConfig.from_dict(case["config"])
    for rank, dump in zip(ranks_of(case), case["ranks"], strict=True):
        expected = {
            claim.name: ("x".join(map(str, claim.shape)), claim.dtype or "bfloat16")
            for claim in vllm.parameters(config, rank)
        }
        assert expected == {name: (shape, dtype) for name, (shape, dtype, _) in dump.items()}
        live = shards_of(buffers_like(dump), config, rank)
        pure = vllm.layout(config, rank)
        assert sorted(describe(live).pieces, key=repr) == sorted(pure.pieces, key=repr)
