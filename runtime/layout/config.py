"""What a Hugging Face ``config.json`` says of a decoder model's tensors, read once and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.dtypes import itemsize

__all__ = ("Family", "MlaConfig", "ModelConfig", "MoeConfig", "require_config")

#: The architectures known, by the ``model_type`` that Hugging Face gives them.
Family = Literal["llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3"]


@dataclass(frozen=True, slots=True)
class MlaConfig:
    """
    Sizes of multi-head latent attention (DeepSeek).

    :ivar q_lora_rank: width of the compressed queries, or ``None`` where queries are projected in one step
    :ivar kv_lora_rank: width of the compressed keys and values
    :ivar qk_nope_head_dim: a head's query and key elements without a rotary position
    :ivar qk_rope_head_dim: a head's query and key elements with one
    :ivar v_head_dim: a head's value elements
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """
    Sizes of the mixture-of-experts layers, and which layers those are.

    :ivar num_experts: routed experts of a layer
    :ivar intermediate_size: width of one routed expert
    :ivar shared_intermediate_size: width of the shared experts together, 0 without
    :ivar shared_gate: a scalar gate weighs the shared expert (Qwen2-MoE)
    :ivar score_bias: the router carries a bias on its scores, kept in float32 (DeepSeek-V3)
    :ivar first: layers before this one are dense
    :ivar every: of every so many layers one has experts
    :ivar phase: the remainder, modulo ``every``, of the layers that have them
    :ivar dense_layers: further layers that are dense, ascending
    """

    num_experts: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    score_bias: bool = False
    first: int = 0
    every: int = 1
    phase: int = 0
    dense_layers: tuple[int, ...] = ()

    def at(self, layer: int) -> bool:
        """Tell whether ``layer`` has experts."""
        return layer >= self.first and layer % self.every == self.phase and layer not in self.dense_layers


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """
    The part of a model's configuration that decides its tensors.

    :ivar family: the architecture
    :ivar vocab_size: rows of the embedding
    :ivar hidden_size: width of the residual stream
    :ivar intermediate_size: width of a dense layer's MLP
    :ivar num_layers: decoder layers
    :ivar num_heads: query heads
    :ivar num_kv_heads: key and value heads; divides ``num_heads``
    :ivar head_dim: elements of one head (with ``mla``, of one head's values)
    :ivar tie_word_embeddings: the output head is the embedding; there is no ``lm_head.weight``
    :ivar qkv_bias: the q, k and v projections (with ``mla``, the compressing ones) have biases
    :ivar o_bias: the attention's output projection has a bias
    :ivar mlp_bias: a dense layer's MLP has biases
    :ivar qk_norm: queries and keys are normalised head by head
    :ivar mla: sizes of latent attention, or ``None`` for grouped-query attention
    :ivar moe: sizes of the experts, or ``None`` for a dense model
    :ivar dtype: the dtype the weights are published in, by torch's name
    :ivar quantization: ``quant_method`` of a quantized checkpoint, whose own tensors (packed weights, scales) this
        configuration does not describe, or ``None``
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None

    @classmethod
    def from_dict(cls, mapping: Mapping[str, object]) -> ModelConfig:
        """
        Read the mapping of a ``config.json``; keys left out have Transformers' defaults, or are asked for.

        ``q_lora_rank`` left out, or null, means that queries are projected in one step: Transformers writes it into
        every ``config.json``, with its default too.

        Multi-token-prediction layers (``num_nextn_predict_layers``) are left out, as Transformers leaves them.

        :raises ConfigError: for an unknown architecture, or a key that is missing, mistyped or at odds with another;
            the message names the key and its value
        """
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"a configuration is a mapping of keys to values, not {type(mapping).__name__}")

        reader = _Reader(mapping)
        family = _family(mapping)
        config = _FAMILIES[family](_base(reader, family), reader)
        if config.num_heads % config.num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={config.num_heads} is not a multiple of num_key_value_heads={config.num_kv_heads}"
            )

        return config

    def with_layers(self, num_layers: int) -> ModelConfig:
        """
        Return the model cut to its first ``num_layers`` layers, embedding and head kept.

        :raises ConfigError: when ``num_layers`` is not in ``1..self.num_layers``
        """
        if not 1 <= num_layers <= self.num_layers:
            raise ConfigError(f"layers={num_layers} is not between 1 and the model's {self.num_layers}")

        return replace(self, num_layers=num_layers)

    def is_moe(self, layer: int) -> bool:
        """Tell whether ``layer`` has experts in place of a dense MLP."""
        return self.moe is not None and self.moe.at(layer)


class _Reader:
    """Typed look-ups in a mapping of unknown make."""

    def __init__(self, mapping: Mapping[str, object]) -> None:
        self._mapping = mapping

    def __contains__(self, key: str) -> bool:
        return self._mapping.get(key) is not None

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer of at least ``least``; a key left out or null needs a default."""
        value = self._mapping.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"the model's configuration lacks {key!r}")

            return default

        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{key}={value!r} is not an integer of at least {least}")

        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self._mapping.get(key)
        if value is None:
            return default

        if not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r} is neither true nor false")

        return value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        value = self._mapping.get(key)
        if value is None:
            return default

        if not isinstance(value, str):
            raise ConfigError(f"{key}={value!r} is not a string")

        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        """Return a list of integers from 0, sorted; a key left out or null is an empty one."""
        value = self._mapping.get(key)
        if value is None:
            return ()

        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} is not a list of integers")

        numbers: list[int] = []
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise ConfigError(f"{key}={value!r} is not a list of integers")

            numbers.append(item)

        return tuple(sorted(numbers))

    def quantization(self) -> str | None:
        """Return the ``quant_method`` of a quantized checkpoint."""
        value = self._mapping.get("quantization_config")
        if value is None:
            return None

        if not isinstance(value, Mapping):
            raise ConfigError(f"quantization_config={value!r} is not an object")

        return _Reader(value).text("quant_method", "unnamed")


def _family(mapping: Mapping[str, object]) -> Family:
    """Tell the family by the first of ``architectures``, or where that is left out by ``model_type``."""
    architectures = mapping.get("architectures")
    if isinstance(architectures, list | tuple) and architectures:
        name, known = architectures[0], _ARCHITECTURES
    else:
        name, known = mapping.get("model_type"), _MODEL_TYPES

    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"unknown model architecture {name!r}; known: {', '.join(known)}")

    return known[name]


def _base(reader: _Reader, family: Family) -> ModelConfig:
    """Read what all families share."""
    num_heads = reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    dtype = reader.text("dtype", reader.text("torch_dtype", "bfloat16"))
    itemsize(dtype)
    return ModelConfig(
        family=family,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.size("num_key_value_heads", num_heads if family in ("llama", "deepseek_v3") else None),
        head_dim=_head_dim(reader, hidden_size, num_heads, family),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        dtype=dtype,
        quantization=reader.quantization(),
    )


def _head_dim(reader: _Reader, hidden_size: int, num_heads: int, family: Family) -> int:
    if family == "deepseek_v3":
        return reader.size("v_head_dim")

    if "head_dim" in reader:
        return reader.size("head_dim")

    if family == "qwen3":
        return 128

    if hidden_size % num_heads:
        raise ConfigError(
            f"without head_dim, hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}"
        )

    return hidden_size // num_heads


def _llama(base: ModelConfig, reader: _Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    return replace(base, qkv_bias=bias, o_bias=bias, mlp_bias=reader.flag("mlp_bias"))


def _mistral(base: ModelConfig, reader: _Reader) -> ModelConfig:
    return base


def _qwen2(base: ModelConfig, reader: _Reader) -> ModelConfig:
    return replace(base, qkv_bias=True)


def _qwen3(base: ModelConfig, reader: _Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    return replace(base, qkv_bias=bias, o_bias=bias, qk_norm=True)


def _qwen_moe(reader: _Reader) -> MoeConfig:
    every = reader.size("decoder_sparse_step", 1)
    return MoeConfig(
        # Transformers 5 writes the second name.
        num_experts=reader.size("num_local_experts" if "num_local_experts" in reader else "num_experts"),
        intermediate_size=reader.size("moe_intermediate_size"),
        every=every,
        phase=every - 1,
        dense_layers=reader.sizes("mlp_only_layers"),
    )


def _qwen2_moe(base: ModelConfig, reader: _Reader) -> ModelConfig:
    shared = reader.size("shared_expert_intermediate_size")
    moe = replace(_qwen_moe(reader), shared_intermediate_size=shared, shared_gate=True)
    return replace(base, qkv_bias=reader.flag("qkv_bias", True), moe=moe)


def _qwen3_moe(base: ModelConfig, reader: _Reader) -> ModelConfig:
    return replace(_qwen3(base, reader), moe=_qwen_moe(reader))


def _mixtral(base: ModelConfig, reader: _Reader) -> ModelConfig:
    moe = MoeConfig(num_experts=reader.size("num_local_experts"), intermediate_size=base.intermediate_size)
    return replace(base, moe=moe)


def _deepseek_v3(base: ModelConfig, reader: _Reader) -> ModelConfig:
    bias = reader.flag("attention_bias")
    mla = MlaConfig(
        q_lora_rank=reader.size("q_lora_rank") if "q_lora_rank" in reader else None,
        kv_lora_rank=reader.size("kv_lora_rank"),
        qk_nope_head_dim=reader.size("qk_nope_head_dim"),
        qk_rope_head_dim=reader.size("qk_rope_head_dim"),
        v_head_dim=reader.size("v_head_dim"),
    )
    width = reader.size("moe_intermediate_size")
    moe = MoeConfig(
        num_experts=reader.size("n_routed_experts"),
        intermediate_size=width,
        shared_intermediate_size=width * reader.size("n_shared_experts", least=0),
        score_bias=reader.text("topk_method", "noaux_tc") == "noaux_tc",
        first=reader.size("first_k_dense_replace", least=0),
        every=reader.size("moe_layer_freq", 1),
    )
    # Latent attention has a key and a value of its own for each query head, whatever the file says of grouping.
    return replace(base, num_kv_heads=base.num_heads, qkv_bias=bias, o_bias=bias, mla=mla, moe=moe)


_FAMILIES: Mapping[Family, Callable[[ModelConfig, _Reader], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
}

_ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}

_MODEL_TYPES: Mapping[str, Family] = {**{family: family for family in _FAMILIES}, "kimi_k2": "deepseek_v3"}


def require_config(config: object) -> None:
    """
    Refuse what is no :class:`ModelConfig`.

    :raises ConfigError: naming what it is
    """
    if not isinstance(config, ModelConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a ModelConfig, such as ModelConfig.from_dict() makes"
        )
