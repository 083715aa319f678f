"""
Remake ``transformers_tensors.json``: the names and shapes that Transformers' own modules have, in their own order.

Run it in an environment with torch and transformers 4.57 (later versions keep a layer's experts in one tensor):
``python tests/runtime/layout/remake_transformers_tensors.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN_MOE = {**BASE, "num_experts": 3, "moe_intermediate_size": 8}
LATENT = {
    **BASE,
    "num_key_value_heads": 4,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
}
CASES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **BASE},
    "llama with every bias and a head dim": {
        "model_type": "llama",
        **BASE,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
    },
    "mistral": {"model_type": "mistral", **BASE},
    "qwen2": {"model_type": "qwen2", **BASE},
    "qwen2 tied": {"model_type": "qwen2", **BASE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **BASE},
    "qwen3 with biases": {"model_type": "qwen3", **BASE, "attention_bias": True, "head_dim": 6},
    "qwen2_moe": {"model_type": "qwen2_moe", **QWEN_MOE, "shared_expert_intermediate_size": 16},
    "qwen2_moe every other layer, no biases": {
        "model_type": "qwen2_moe",
        **QWEN_MOE,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN_MOE, "head_dim": 6},
    "qwen3_moe with a dense layer": {"model_type": "qwen3_moe", **QWEN_MOE, "mlp_only_layers": [1]},
    "qwen3_moe every third layer": {
        "model_type": "qwen3_moe",
        **QWEN_MOE,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 3,
    },
    "mixtral": {"model_type": "mixtral", **BASE, "num_local_experts": 3},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT},
    "deepseek_v3 with biases, queries uncompressed": {
        "model_type": "deepseek_v3",
        **LATENT,
        "attention_bias": True,
        "q_lora_rank": None,
    },
}


def tensors(mapping: dict[str, object]) -> list[tuple[str, list[int]]]:
    """Return the state dict's names and shapes; a tied head is in no checkpoint."""
    sizes = dict(mapping)
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return [(name, list(tensor.shape)) for name, tensor in model.state_dict().items() if name not in tied]


def main() -> None:
    """Write the file beside this script."""
    lines = [
        f"{json.dumps(name)}: {json.dumps({'config': mapping, 'tensors': tensors(mapping)})}"
        for name, mapping in CASES.items()
    ]
    file = Path(__file__).with_name("transformers_tensors.json")
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")


if __name__ == "__main__":
    main()
