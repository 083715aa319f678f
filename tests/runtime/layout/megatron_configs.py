"""Small Hugging Face configurations of every family, of sizes that many meshes divide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = (
    "Config",
    "LLAMA",
    "BIASED",
    "QWEN2",
    "TIED",
    "QWEN3",
    "QWEN2_MOE",
    "QWEN3_MOE",
    "MIXTRAL",
    "DEEPSEEK",
    "num_experts",
    "is_moe",
)

#: What a ``config.json`` holds.
Config = Mapping[str, Any]

BASE = {"hidden_size": 24, "num_hidden_layers": 4, "vocab_size": 23, "intermediate_size": 48, "num_attention_heads": 12}
LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 4}
BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True}
QWEN2 = {**BASE, "model_type": "qwen2", "num_key_value_heads": 2}
TIED = {**QWEN2, "tie_word_embeddings": True}
QWEN3 = {**BASE, "model_type": "qwen3", "num_key_value_heads": 6, "head_dim": 4}
QWEN2_MOE = {
    **QWEN2,
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 2,
}
QWEN3_MOE = {**QWEN3, "model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
DEEPSEEK = {
    **BASE,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}


def num_experts(mapping: Config) -> int:
    """Return how many routed experts a layer has, 0 for a dense model."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in mapping:
            return mapping[key]

    return 0


def is_moe(mapping: Config, layer: int) -> bool:
    """Tell whether a layer has experts, by what Transformers' modules do with their configurations."""
    if mapping["model_type"] == "deepseek_v3":
        return layer >= mapping["first_k_dense_replace"]

    if not num_experts(mapping) or layer in mapping.get("mlp_only_layers", ()):
        return False

    return bool((layer + 1) % mapping.get("decoder_sparse_step", 1) == 0)
