"""What a Megatron-core model's parts are called in a Hugging Face checkpoint, by family, and which family it is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.config import Family, MlaConfig, ModelConfig, MoeConfig
from wavecast.runtime.layout.hf import logical_tensors

__all__ = ("Catalogue", "LayerNames", "MlpNames", "catalogue", "guess_config")


class MlpNames(NamedTuple):
    """Names of the projections of a gated MLP."""

    gate: str
    up: str
    down: str


class LayerNames:
    """
    Names of a decoder layer's parts, without ``.weight`` or ``.bias``.

    :param family: the architecture
    :param layer: counted from 0 over the whole model
    """

    def __init__(self, family: Family, layer: int) -> None:
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}{'block_sparse_moe' if family == 'mixtral' else 'mlp'}."
        self.input_norm = f"{prefix}input_layernorm"
        self.mlp_norm = f"{prefix}post_attention_layernorm"
        self.attention = f"{prefix}self_attn."
        self.mlp = _gated_mlp(f"{prefix}mlp.")
        self.router = f"{moe}gate"
        self.score_bias = f"{moe}gate.e_score_correction_bias"
        self.shared = _gated_mlp(f"{moe}{'shared_experts' if family == 'deepseek_v3' else 'shared_expert'}.")
        self.shared_gate = f"{moe}shared_expert_gate"
        self._experts = f"{moe}experts."
        self._mixtral = family == "mixtral"

    def expert(self, index: int) -> MlpNames:
        """Return the names of the expert ``index``, counted over all ranks."""
        prefix = f"{self._experts}{index}."
        if self._mixtral:
            return MlpNames(f"{prefix}w1", f"{prefix}w3", f"{prefix}w2")

        return _gated_mlp(prefix)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """
    The logical tensors of a model.

    :ivar shapes: by name
    :ivar of_layer: for each decoder layer the names of its tensors, those of routed experts left out
    """

    shapes: Mapping[str, tuple[int, ...]]
    of_layer: tuple[frozenset[str], ...]


@functools.lru_cache(maxsize=8)
def catalogue(config: ModelConfig) -> Catalogue:
    """Return the logical tensors of ``config``; kept, since a trainer asks again at every sync."""
    tensors = logical_tensors(config)
    layers: list[list[str]] = [[] for _ in range(config.num_layers)]
    for tensor in tensors:
        if tensor.layer is not None and tensor.expert is None:
            layers[tensor.layer].append(tensor.name)

    return Catalogue(
        MappingProxyType({tensor.name: tensor.shape for tensor in tensors}),
        tuple(frozenset(names) for names in layers),
    )


def guess_config(settings: object, *, vocab_size: int, tied: bool) -> ModelConfig:
    """
    Return the Hugging Face configuration that a Megatron one amounts to.

    Sizes are read; the family follows from what sets it apart: latent attention (DeepSeek-V3), a gate on shared
    experts (Qwen2-MoE), norms on queries and keys (Qwen3), biases on q, k and v alone (Qwen2); of what is left, models
    with experts are Mixtral's and the others Llama's.

    :param settings: a ``megatron.core.transformer.TransformerConfig``
    :param vocab_size: rows of the embedding, padding left out
    :param tied: the output head is the embedding
    :raises LayoutError: for a model that none of these families describes
    """
    bias, latent = _flag(settings, "add_bias_linear"), _flag(settings, "multi_latent_attention")
    heads, moe = _size(settings, "num_attention_heads"), _guess_moe(settings)
    family = _guess_family(settings, moe)
    shared = moe is not None and moe.shared_intermediate_size > 0
    if not _flag(settings, "gated_linear_unit") or (shared and family not in ("deepseek_v3", "qwen2_moe")):
        raise LayoutError("no known family describes the model's MLPs: give its configuration")

    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=_size(settings, "hidden_size"),
        intermediate_size=_size(settings, "ffn_hidden_size"),
        num_layers=_size(settings, "num_layers"),
        num_heads=heads,
        num_kv_heads=heads if latent else _size(settings, "num_query_groups"),
        head_dim=_size(settings, "v_head_dim" if latent else "kv_channels"),
        tie_word_embeddings=tied,
        qkv_bias=bias or _flag(settings, "add_qkv_bias"),
        o_bias=bias,
        mlp_bias=bias,
        qk_norm=_flag(settings, "qk_layernorm") and not latent,
        mla=_guess_mla(settings) if latent else None,
        moe=moe,
    )


def _guess_family(settings: object, moe: MoeConfig | None) -> Family:
    if _flag(settings, "multi_latent_attention"):
        return "deepseek_v3"

    normed = _flag(settings, "qk_layernorm")
    if moe is not None:
        return "qwen2_moe" if moe.shared_gate else "qwen3_moe" if normed else "mixtral"

    if normed:
        return "qwen3"

    return "qwen2" if _flag(settings, "add_qkv_bias") and not _flag(settings, "add_bias_linear") else "llama"


def _guess_mla(settings: object) -> MlaConfig:
    return MlaConfig(
        q_lora_rank=_size(settings, "q_lora_rank") or None,
        kv_lora_rank=_size(settings, "kv_lora_rank"),
        qk_nope_head_dim=_size(settings, "qk_head_dim"),
        qk_rope_head_dim=_size(settings, "qk_pos_emb_head_dim"),
        v_head_dim=_size(settings, "v_head_dim"),
    )


def _guess_moe(settings: object) -> MoeConfig | None:
    experts = _size(settings, "num_moe_experts")
    if not experts:
        return None

    frequency: object = getattr(settings, "moe_layer_freq", 1)
    pattern = frequency if isinstance(frequency, list | tuple) else ()
    return MoeConfig(
        num_experts=experts,
        intermediate_size=_size(settings, "moe_ffn_hidden_size") or _size(settings, "ffn_hidden_size"),
        shared_intermediate_size=_size(settings, "moe_shared_expert_intermediate_size"),
        shared_gate=_flag(settings, "moe_shared_expert_gate"),
        score_bias=_flag(settings, "moe_router_enable_expert_bias"),
        every=frequency if isinstance(frequency, int) else 1,
        dense_layers=tuple(layer for layer, moe in enumerate(pattern) if not moe),
    )


def _gated_mlp(prefix: str) -> MlpNames:
    return MlpNames(f"{prefix}gate_proj", f"{prefix}up_proj", f"{prefix}down_proj")


def _flag(settings: object, name: str) -> bool:
    return bool(getattr(settings, name, False))


def _size(settings: object, name: str) -> int:
    """Return a size that may be ``None`` or not there at all, which is 0 then."""
    value: object = getattr(settings, name, None)
    return value if isinstance(value, int) else 0
