"""Published model shapes by name, so that a plan needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.config import ModelConfig

__all__ = ("PRESETS", "preset")


def _qwen(**sizes: object) -> dict[str, object]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", **sizes}


def _qwen3(**sizes: object) -> dict[str, object]:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", **sizes}


def _qwen3_moe(**sizes: object) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **sizes,
    }


def _llama(**sizes: object) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "tie_word_embeddings": False,
        **sizes,
    }


def _mixtral(**sizes: object) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "torch_dtype": "bfloat16",
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        **sizes,
    }


def _deepseek(**sizes: object) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **sizes,
    }


#: The part of each model's published ``config.json`` that decides its tensors. The last four are made for
#: demonstrations: small, and with 12 query heads, so that tensor parallelism of 2, 3, 4, 6 and 12 cuts them.
PRESETS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "qwen2.5-0.5b": _qwen(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        "qwen2.5-7b": _qwen(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        "llama-3-8b": _llama(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        "llama-3-70b": _llama(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
        "qwen3-8b": _qwen3(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
        "qwen3-30b-a3b": _qwen3_moe(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
        "qwen3-235b-a22b": _qwen3_moe(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            vocab_size=151936,
            tie_word_embeddings=False,
        ),
        "mixtral-8x7b": _mixtral(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            vocab_size=32000,
        ),
        "deepseek-v3": _deepseek(
            num_attention_heads=128,
            num_key_value_heads=128,
            n_routed_experts=256,
            first_k_dense_replace=3,
            vocab_size=129280,
        ),
        "kimi-k2": _deepseek(
            num_attention_heads=64,
            num_key_value_heads=64,
            n_routed_experts=384,
            first_k_dense_replace=1,
            vocab_size=163840,
            model_type="kimi_k2",
        ),
        "tiny-qwen2": _qwen(
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=16384,
            tie_word_embeddings=True,
        ),
        "tiny-qwen3-moe": _qwen3_moe(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=128,
            vocab_size=8192,
            tie_word_embeddings=False,
        ),
        "tiny-mixtral": _mixtral(
            hidden_size=256,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=32,
            num_local_experts=8,
            vocab_size=8192,
        ),
        "tiny-deepseek-v3": _deepseek(
            hidden_size=256,
            intermediate_size=512,
            moe_intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=12,
            n_routed_experts=16,
            first_k_dense_replace=1,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            vocab_size=8192,
        ),
    }
)


def preset(name: str) -> ModelConfig:
    """
    Return the configuration of the model called ``name`` in :data:`PRESETS`.

    :raises ConfigError: for any other name
    """
    try:
        mapping = PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}") from None

    return ModelConfig.from_dict(mapping)
