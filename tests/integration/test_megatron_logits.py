"""A Megatron-core model that takes a checkpoint's weights computes what Transformers' model of the checkpoint does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

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
from tests.runtime.layout.megatron_models import BEFORE_0_19, Parallel, build, fake_rank, logits
from tests.runtime.layout.megatron_whole import whole_shards
from tests.runtime.layout.moving import move
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.layout.megatron import shards

pytestmark = pytest.mark.timeout(120)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
ROUTING = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
GROUPED = {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}

#: Configurations, and what Megatron has to be told besides of how experts are chosen.
CASES = {
    "llama": (LLAMA, {}),
    "llama with biases": (BIASED, {}),
    "qwen2": (QWEN2, {}),
    "tied": (TIED, {}),
    "qwen3": (QWEN3, {}),
    "qwen2-moe": ({**QWEN2_MOE, "norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
    "qwen3-moe": ({**QWEN3_MOE, "norm_topk_prob": True}, {}),
    "mixtral": (MIXTRAL, {}),
    "deepseek": ({**DEEPSEEK, **ROUTING}, GROUPED),
    "deepseek without compressed queries": ({**DEEPSEEK, **ROUTING, "q_lora_rank": None}, GROUPED),
}

if not BEFORE_0_19:
    del CASES["deepseek without compressed queries"]


@pytest.mark.parametrize("case", CASES)
def test_logits_after_a_move_are_those_of_transformers(case, tmp_path: Path):
    mapping, routing = CASES[case]
    mapping = {**mapping, "num_experts_per_tok": 2}
    config = ModelConfig.from_dict(mapping)
    generator = torch.Generator().manual_seed(0)
    checkpoint = {
        tensor.name: torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if "norm" in tensor.name else 0.0)
        for tensor in logical_tensors(config)
    }
    tokens = torch.randint(0, config.vocab_size, (2, 7), generator=generator)
    parallel = Parallel(options={"params_dtype": torch.float32, "pipeline_dtype": torch.float32, **routing})
    with fake_rank(0, parallel):
        chunks = build(mapping, parallel)
        move([whole_shards(checkpoint)], [shards(chunks, config)])
        found = logits(chunks[0], tokens)

    wanted = transformers_logits(mapping, checkpoint, tokens, tmp_path)
    assert wanted.abs().max() > 1
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def transformers_logits(
    mapping: Mapping[str, object], checkpoint: Mapping[str, torch.Tensor], tokens: torch.Tensor, directory: Path
) -> torch.Tensor:
    """Return the logits of the checkpoint as Transformers' own loader reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        described = {
            **mapping,
            "architectures": [ARCHITECTURES[str(mapping["model_type"])]],
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        }
        (directory / "config.json").write_text(json.dumps(described), "utf-8")
        save_file(dict(checkpoint), directory / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )

    assert not any(report.values()), report
    with torch.no_grad():
        result: torch.Tensor = model.eval()(tokens).logits
        return result
