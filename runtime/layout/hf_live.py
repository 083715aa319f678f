"""
Shards of live Transformers modules, under the names of their checkpoints.

A module is not always its checkpoint: since Transformers 5 the experts of a layer are stacked in two parameters
(``experts.gate_up_proj`` of shape (experts, 2 x width, hidden) with gate above up, ``experts.down_proj`` of shape
(experts, hidden, width)), and Mixtral's block is called ``mlp``. Version 4.57 keeps experts apart, under the
checkpoint's names. Both come out as the same logical tensors, as views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import get_args

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.config import Family, ModelConfig, require_config
from wavecast.runtime.layout.dtensor import clean_name
from wavecast.runtime.layout.hf import LogicalTensor, logical_tensors
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import sections, unstacked

__all__ = ("checkpoint_shards", "shards")

#: Every ``model_type`` of a known family.
_MODEL_TYPES = (*get_args(Family), "kimi_k2")

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


def shards(
    model: torch.nn.Module | Mapping[str, torch.Tensor], config: ModelConfig | None = None, *, buffers: bool = True
) -> list[Shard]:
    """
    Return the shards of an unsharded module: every parameter whole, in the order of its state dict.

    Buffers, and parameters without ``requires_grad``, are not trainable: where a trainer changes a buffer by rules of
    its own, ``dataclasses.replace(shard, trainable=True)`` says so.

    :param model: a Transformers module, or a state dict
    :param config: of the model; left out, a module's own ``config`` is read. Without one, or for an architecture
        unknown here, tensors keep the module's names and shapes, and of those that share memory only the first is given
    :param buffers: give a module's persistent buffers too, such as the bias on DeepSeek's router scores
    :raises LayoutError: for a tensor that is distributed, or whose shape is not the one that ``config`` leads to
    :raises ConfigError: for a module's own configuration of a known type that cannot be read, and where ``config`` is
        no :class:`ModelConfig`
    """
    if not isinstance(model, torch.nn.Module | Mapping):
        raise LayoutError(f"a {type(model).__name__} is neither a module nor a state dict")

    if config is not None:
        require_config(config)

    tensors = _state(model, buffers=buffers)
    whole = [
        Shard(name, tensor.detach(), (0,) * tensor.dim(), tuple(tensor.shape), trainable=_is_trainable(tensor, model))
        for name, tensor in tensors.items()
    ]
    known = config if config is not None else _own_config(model)
    return list(_without_copies(whole)) if known is None else checkpoint_shards(whole, known)


def checkpoint_shards(shards: Iterable[Shard], config: ModelConfig) -> list[Shard]:
    """
    Return shards of a Transformers module's own tensors as shards of its checkpoint's.

    Renames, parts stacked experts, and takes a tied head for the embedding that it is (given once where the two share
    memory). Tensors unknown to ``config`` stay as they are. For adapters that know how a module is spread but not what
    its tensors are called on disk: shards of a DTensor cut along any dim are parted as whole ones are.

    :raises LayoutError: for a logical tensor whose shape is not the one that ``config`` leads to
    """
    logical = _logical(config)
    parted = (part for shard in shards for part in _parted(_renamed(shard, config), config))
    found: dict[tuple[object, ...], Shard] = {}
    for shard in parted:
        _check_shape(shard, logical)
        found.setdefault((shard.name, *_memory(shard)), shard)

    return list(found.values())


@lru_cache(maxsize=4)
def _logical(config: ModelConfig) -> Mapping[str, LogicalTensor]:
    return {tensor.name: tensor for tensor in logical_tensors(config)}


def _state(model: torch.nn.Module | Mapping[str, torch.Tensor], *, buffers: bool) -> dict[str, torch.Tensor]:
    if isinstance(model, torch.nn.Module):
        state: Mapping[str, object] = model.state_dict(keep_vars=True)
        if not buffers:
            owned = dict(model.named_parameters(remove_duplicate=False))
            state = {name: tensor for name, tensor in state.items() if name in owned}
    else:
        state = model

    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for name, tensor in tensors.items():
        if hasattr(tensor, "device_mesh"):
            raise LayoutError(
                f"{name} is distributed over a device mesh: its shards are the dtensor adapter's", tensor=name
            )

    return tensors


def _is_trainable(tensor: torch.Tensor, model: object) -> bool:
    """Tell whether training changes ``tensor``: no buffer of a module; of a state dict whatever does not deny it."""
    if isinstance(tensor, torch.nn.Parameter):
        return tensor.requires_grad

    return not isinstance(model, torch.nn.Module)


def _own_config(model: object) -> ModelConfig | None:
    """Read a module's configuration, if it has one of a type known here."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    mapping = dict(to_dict()) if to_dict is not None else {}
    if mapping.get("model_type") not in _MODEL_TYPES:
        return None

    # The tensors follow the type; an architecture may be the class of another head on the same decoder.
    mapping.pop("architectures", None)
    # Transformers 5 has one name for the number of experts, files have the family's.
    mapping.setdefault("num_experts", mapping.get("num_local_experts"))
    return ModelConfig.from_dict(mapping)


def _renamed(shard: Shard, config: ModelConfig) -> Shard:
    name = clean_name(shard.name)
    if config.family == "mixtral":
        name = name.replace(".mlp.", ".block_sparse_moe.")

    if name == "lm_head.weight" and config.tie_word_embeddings:
        name = "model.embed_tokens.weight"

    return shard if name == shard.name else replace(shard, name=name)


def _parted(shard: Shard, config: ModelConfig) -> list[Shard]:
    """Return a shard of stacked experts expert by expert, gate and up apart; any other as it is."""
    moe = config.moe
    if moe is None or len(shard.global_shape) != 3 or not shard.name.endswith((_GATE_UP, _DOWN)):
        return [shard]

    mixtral, width = config.family == "mixtral", moe.intermediate_size
    path = shard.name.rpartition(".")[0]
    if shard.name.endswith(_DOWN):
        _check_stack(shard, (moe.num_experts, config.hidden_size, width))
        down = "w2" if mixtral else "down_proj"
        return unstacked(shard, lambda expert: f"{path}.{expert}.{down}.weight")

    _check_stack(shard, (moe.num_experts, 2 * width, config.hidden_size))
    gate, up = ("w1", "w3") if mixtral else ("gate_proj", "up_proj")
    experts = unstacked(shard, lambda expert: f"{path}.{expert}")
    return [
        part
        for both in experts
        for part in sections(both, [(f"{both.name}.{gate}.weight", width), (f"{both.name}.{up}.weight", width)])
    ]


def _check_stack(shard: Shard, shape: tuple[int, ...]) -> None:
    if shard.global_shape != shape:
        raise LayoutError(
            f"{shard.name} has shape {shard.global_shape} where the configuration leads to {shape}", tensor=shard.name
        )


def _check_shape(shard: Shard, logical: Mapping[str, LogicalTensor]) -> None:
    tensor = logical.get(shard.name)
    if tensor is not None and tensor.shape != shard.global_shape:
        raise LayoutError(
            f"{shard.name} has shape {shard.global_shape} where the configuration leads to {tensor.shape}",
            tensor=shard.name,
        )


def _without_copies(shards: Iterable[Shard]) -> Iterator[Shard]:
    seen: set[tuple[object, ...]] = set()
    for shard in shards:
        memory = _memory(shard)
        if memory not in seen:
            seen.add(memory)
            yield shard


def _memory(shard: Shard) -> tuple[object, ...]:
    """Return what tells a shard's memory from any other's."""
    view = shard.view
    if isinstance(view, torch.Tensor) and view.numel() and not view.is_meta:
        return (view.data_ptr(), view.dtype, view.stride(), shard.offset, tuple(view.shape))

    return (id(shard),)
