"""
Weights into Megatron-core models and out of them without the adapter.

They go in, and are read back, by Megatron's own rules: ``sharded_state_dict()`` says where in a whole tensor each local
one sits. What the whole tensors are made of is written here, from what each architecture does with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.models.gpt import GPTModel

from tests.runtime.layout.megatron_configs import Config, num_experts
from wavecast.runtime import Shard

__all__ = ("fill", "read", "whole_shards", "whole_tensors")

Tensors = dict[str, torch.Tensor]


def whole_tensors(checkpoint: Mapping[str, torch.Tensor], mapping: Config, rows: int) -> Tensors:
    """
    Return Megatron's whole tensors of a checkpoint, under the keys of its distributed checkpoints.

    :param rows: of the vocabulary, padding included; the padding is of a value that no checkpoint here has
    """
    whole: Tensors = {}
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        if name in checkpoint:
            true = checkpoint[name]
            whole[key] = torch.cat([true, torch.full((rows - len(true), true.shape[1]), -7.0, dtype=true.dtype)])

    whole["decoder.final_layernorm.weight"] = checkpoint["model.norm.weight"]
    for layer in range(mapping["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}
        for key, value in (_attention(own, mapping) | _mlp(own, mapping)).items():
            whole[f"decoder.layers.{layer}.{key}"] = value

    return whole


def whole_shards(checkpoint: Mapping[str, torch.Tensor]) -> list[Shard]:
    """Return the shards of someone who holds everything."""
    return [Shard(name, value, (0,) * value.dim(), tuple(value.shape)) for name, value in checkpoint.items()]


def _attention(own: Tensors, mapping: Config) -> Tensors:
    found = {
        "input_layernorm.weight": own["input_layernorm.weight"],
        "self_attention.linear_qkv.layer_norm_weight": own["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": own["post_attention_layernorm.weight"],
        "mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"],
    }
    renamed = {
        "q_norm.weight": ("q_layernorm.weight",),
        "k_norm.weight": ("k_layernorm.weight",),
        "q_a_layernorm.weight": ("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight"),
        "kv_a_layernorm.weight": ("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight"),
        "o_proj.weight": ("linear_proj.weight",),
        "o_proj.bias": ("linear_proj.bias",),
        "q_a_proj.weight": ("linear_q_down_proj.weight",),
        "q_b_proj.weight": ("linear_q_up_proj.weight",),
        "kv_a_proj_with_mqa.weight": ("linear_kv_down_proj.weight",),
        "kv_b_proj.weight": ("linear_kv_up_proj.weight",),
    }
    if "kv_lora_rank" in mapping:
        renamed["q_proj.weight"] = ("linear_q_proj.weight",)

    for name, keys in renamed.items():
        if f"self_attn.{name}" in own:
            found |= {f"self_attention.{key}": own[f"self_attn.{name}"] for key in keys}

    if "kv_lora_rank" not in mapping:
        groups = mapping["num_key_value_heads"]
        for leaf in ("weight", "bias"):
            if f"self_attn.q_proj.{leaf}" in own:
                # Each group of query heads is followed by the key and the value head they share.
                parts = [own[f"self_attn.{kind}_proj.{leaf}"] for kind in "qkv"]
                grouped = [value.reshape(groups, -1, *value.shape[1:]) for value in parts]
                joined = torch.cat(grouped, dim=1)
                found[f"self_attention.linear_qkv.{leaf}"] = joined.reshape(-1, *parts[0].shape[1:])

    return found


def _mlp(own: Tensors, mapping: Config) -> Tensors:
    found: Tensors = {}

    def gated(key: str, name: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{name}.gate_proj.{leaf}" in own:
                found[f"{key}.linear_fc1.{leaf}"] = torch.cat(
                    [own[f"{name}.gate_proj.{leaf}"], own[f"{name}.up_proj.{leaf}"]]
                )
                found[f"{key}.linear_fc2.{leaf}"] = own[f"{name}.down_proj.{leaf}"]

    gated("mlp", "mlp")
    gated("mlp.shared_experts", "mlp.shared_expert")
    gated("mlp.shared_experts", "mlp.shared_experts")
    moe = "block_sparse_moe" if "block_sparse_moe.gate.weight" in own else "mlp"
    for key, name in (
        ("mlp.router.weight", f"{moe}.gate.weight"),
        ("mlp.router.expert_bias", f"{moe}.gate.e_score_correction_bias"),
        ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
    ):
        if name in own:
            found[key] = own[name]

    if f"{moe}.gate.weight" in own:
        gate, up, down = ("w1", "w3", "w2") if moe != "mlp" else ("gate_proj", "up_proj", "down_proj")
        experts = [f"{moe}.experts.{index}." for index in range(num_experts(mapping))]
        inward = [torch.cat([own[f"{name}{gate}.weight"], own[f"{name}{up}.weight"]]) for name in experts]
        found["mlp.experts.experts.linear_fc1.weight"] = torch.stack(inward)
        found["mlp.experts.experts.linear_fc2.weight"] = torch.stack([own[f"{name}{down}.weight"] for name in experts])

    return found


def fill(chunks: Sequence[GPTModel], whole: Tensors) -> None:
    """Write this rank's part of Megatron's whole tensors into its model."""
    for chunk in chunks:
        for entry in _entries(chunk):
            if isinstance(entry, ShardedTensorFactory):
                value = entry.merge_fn(_map(lambda part: _part(part, whole), entry.build()))
            else:
                value = _part(entry, whole)

            assert value.shape == entry.data.shape
            entry.data.detach().copy_(value)


def read(chunks: Sequence[GPTModel]) -> list[tuple[str, tuple[slice | int, ...], torch.Tensor]]:
    """Return what this rank holds of Megatron's whole tensors: key, where, elements."""
    found: list[tuple[str, tuple[slice | int, ...], torch.Tensor]] = []
    for chunk in chunks:
        for entry in _entries(chunk):
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            _map(lambda part: found.append((part.key, _where(part), part.data.detach().clone())), built)

    return found


def _entries(chunk: GPTModel) -> list[ShardedTensor | ShardedTensorFactory]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})

    return [entry for entry in state.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def _map(function, built):
    """Apply ``function`` to each sharded tensor that a factory made."""
    if isinstance(built, ShardedTensor):
        return function(built)

    if isinstance(built, dict):
        return {key: _map(function, value) for key, value in built.items()}

    return [_map(function, value) for value in built]


def _part(part: ShardedTensor, whole: Tensors) -> torch.Tensor:
    value = whole[part.key]
    assert tuple(value.shape) == tuple(part.global_shape), (part.key, value.shape, part.global_shape)
    return value[_where(part)]


def _where(part: ShardedTensor) -> tuple[slice | int, ...]:
    own = part.global_offset[part.prepend_axis_num :]
    return (
        *part.global_offset[: part.prepend_axis_num],
        *(slice(start, start + length) for start, length in zip(own, part.local_shape, strict=True)),
    )
