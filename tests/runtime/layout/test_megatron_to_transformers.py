"""Megatron-core's own model as the source, Transformers' as the destination, a whole sync between them."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

import torch
import transformers

from tests.runtime.layout.megatron_configs import DEEPSEEK, LLAMA, MIXTRAL, QWEN2_MOE, QWEN3_MOE, TIED
from tests.runtime.layout.megatron_models import Parallel, build, fake_rank
from tests.runtime.local_groups import sync
from wavecast.runtime import Shard
from wavecast.runtime.layout import hf_live, megatron
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors

CASES = {
    "llama": (LLAMA, Parallel(tp=2, pp=2), 4),
    "tied": (TIED, Parallel(tp=2, pp=2), 4),
    "qwen2-moe": (QWEN2_MOE, Parallel(dp=2, ep=2), 2),
    "qwen3-moe": (QWEN3_MOE, Parallel(pp=2, dp=2, ep=2), 4),
    "mixtral": (MIXTRAL, Parallel(dp=2, ep=2), 2),
    "deepseek": ({**DEEPSEEK, "n_group": 1, "topk_group": 1}, Parallel(tp=2, pp=2, ep=2), 4),
}


def live_model(entries: dict[str, object]) -> torch.nn.Module:
    """Transformers' own model of a configuration, in bfloat16."""
    kind = str(entries["model_type"])
    values = {key: value for key, value in entries.items() if key not in ("model_type", "architectures")}
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **values)
    )
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_every_element_of_the_transformers_model_is_megatrons(case: str) -> None:
    entries, parallel, world = CASES[case]
    config = ModelConfig.from_dict(entries)
    generator = torch.Generator().manual_seed(len(case))
    values = {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(torch.bfloat16)
        for tensor in logical_tensors(config)
    }
    ranks: list[list[Shard]] = []
    for rank in range(world):
        with fake_rank(rank, parallel):
            shards = megatron.shards(build(entries, parallel), config)

        for shard in shards:
            assert isinstance(shard.view, torch.Tensor)
            place = tuple(slice(a, a + n) for a, n in zip(shard.offset, shard.view.shape, strict=True))
            shard.view.copy_(values[shard.name][place])

        ranks.append(shards)

    engine = hf_live.shards(live_model(entries))
    sync(ranks, [engine])
    assert {shard.name for shard in engine} <= values.keys()
    for shard in engine:
        assert isinstance(shard.view, torch.Tensor)
        assert torch.equal(shard.view, values[shard.name].to(shard.view.dtype)), shard.name
