"""Shards of flattened parameters: a rank holds a range of elements, wherever that begins and ends (FSDP1, ZeRO-3)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, SupportsIndex, TypeGuard, cast

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.dtensor import clean_name, tensor_shards
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import NameMap, renamed

if TYPE_CHECKING:
    import torch

__all__ = ("flat_shards", "fsdp1_shards", "zero3_shards", "parameter_shards")


class _Tied(Protocol):
    """What is asked of an entry of FSDP1's record of parameters that are one with another."""

    module_name: str
    param_name: str


class _FlatParameter(Protocol):
    """What is asked of FSDP1's ``FlatParameter``, an entry a parameter where nothing else is said."""

    _fqns: Sequence[str]
    _shapes: Sequence[Sequence[int]]
    _contiguities: Sequence[bool]
    _param_extensions: Sequence[object]
    #: With entries for padding, as ``_is_padding_mask`` says.
    _numels_with_padding: Sequence[int]
    _is_padding_mask: Sequence[bool]
    _shared_param_infos: Sequence[_Tied]


class _Handle(Protocol):
    """What is asked of FSDP1's ``FlatParamHandle``."""

    flat_param: torch.Tensor
    rank: int
    uses_sharded_strategy: bool


class _Partitioned(Protocol):
    """What is asked of a parameter that ZeRO-3 has partitioned."""

    ds_tensor: torch.Tensor
    ds_shape: Sequence[int]
    ds_process_group: torch.distributed.ProcessGroup
    requires_grad: bool


def flat_shards(
    flat: torch.Tensor,
    parameters: Iterable[tuple[str | None, Sequence[int]]],
    *,
    start: int = 0,
    frozen: Collection[str] = (),
) -> list[Shard]:
    """
    Return what a range of a flattened parameter holds of the parameters that were laid end to end in it.

    Views of ``flat``, no copies. A range of a parameter of ``n`` dims is at most ``2 n - 1`` boxes (see
    :meth:`Box.split_flat`). Padding behind the last parameter is left out. Time is O(parameters + shards).

    :param flat: this rank's elements, of one dim
    :param parameters: name and shape of each parameter in turn, row-major; ``None`` names padding between them
    :param start: which element of the whole flattened parameter is the first of ``flat``
    :param frozen: names of parameters that are not trainable
    :raises LayoutError: when ``flat`` has not one dim or ``start`` is no integer of at least 0
    """
    if flat.dim() != 1 or not isinstance(start, SupportsIndex) or start < 0:
        raise LayoutError(f"a flat range needs one dim and a start of at least 0, not {tuple(flat.shape)} at {start!r}")

    parameters = tuple(parameters)
    for name, sizes in parameters:
        if any(size < 0 for size in sizes):
            raise LayoutError(f"parameter {name!r} has shape {tuple(sizes)}", tensor=name or "")

    found: list[Shard] = []
    stop = start + flat.shape[0]
    first = 0
    for name, sizes in parameters:
        shape = tuple(sizes)
        last = first + math.prod(shape)
        if name is not None and first < stop and last > start:
            low, high = max(start, first), min(stop, last)
            found.extend(_cut(name, flat[low - start : high - start], shape, low - first, name not in frozen))

        first = last

    return found


def fsdp1_shards(module: torch.nn.Module, *, names: NameMap | None = None) -> list[Shard]:
    """
    Return what this rank holds of a module wrapped by ``FullyShardedDataParallel``, whatever its sharding strategy.

    Reads the sharded flat parameters, at full precision, without gathering them; parameters that FSDP was told to
    ignore come whole. Tied parameters come once, under the name that FSDP flattened.

    :param names: from the module's names, freed of wrappers, to logical ones
    :raises LayoutError: for a parameter whose memory is not in the order of its dims, or that tensor parallelism had
        cut before it was flattened
    """
    found: list[Shard] = []
    managed: set[str] = set()
    for path, part in module.named_modules():
        handle = getattr(part, "_handle", None)
        if _is_handle(handle):
            prefix = clean_name(path)
            found.extend(_handle_shards(handle, prefix))
            managed.update(_managed_names(cast("_FlatParameter", handle.flat_param), prefix))

    for path, parameter in module.named_parameters():
        name = clean_name(path)
        if name not in managed and not getattr(parameter, "_is_flat_param", False):
            found.extend(tensor_shards(name, parameter))

    return renamed(found, names)


def zero3_shards(module: torch.nn.Module, *, names: NameMap | None = None) -> list[Shard]:
    """
    Return what this rank holds of a module whose parameters DeepSpeed's ZeRO-3 has partitioned.

    Each parameter is flattened and cut by itself; a rank's partition is read where ZeRO keeps it, in the dtype it
    computes with, also while the parameter is gathered. Parameters that ZeRO does not manage come whole.

    :param names: from the module's names to logical ones
    :raises LayoutError: for a partition that is swapped out to disk or quantised
    """
    found: list[Shard] = []
    for path, parameter in module.named_parameters():
        found.extend(parameter_shards(clean_name(path), parameter))

    return renamed(found, names)


def parameter_shards(name: str, parameter: torch.Tensor) -> list[Shard]:
    """
    Return what this rank holds of one parameter that ZeRO-3 may have partitioned; else as a DTensor or a plain one.

    :raises LayoutError: as :func:`zero3_shards`
    """
    if _is_partitioned(parameter):
        return _partition_shards(name, parameter)

    return tensor_shards(name, parameter)


def _is_handle(handle: object) -> TypeGuard[_Handle]:
    return all(hasattr(handle, name) for name in ("flat_param", "rank", "uses_sharded_strategy"))


def _is_partitioned(parameter: object) -> TypeGuard[_Partitioned]:
    return all(hasattr(parameter, name) for name in ("ds_tensor", "ds_shape", "ds_process_group"))


def _handle_shards(handle: _Handle, prefix: str) -> list[Shard]:
    """Return this rank's shards of one flat parameter, under the names of the module at ``prefix``."""
    flat = cast("_FlatParameter", handle.flat_param)
    names = [_join(prefix, name) for name in flat._fqns]
    for name, contiguous, extension in zip(names, flat._contiguities, flat._param_extensions, strict=True):
        if not contiguous:
            raise LayoutError(f"FSDP1 flattened {name!r} in another order than that of its dims", tensor=name)

        if extension is not None:
            raise LayoutError(f"FSDP1 flattened {name!r} after tensor parallelism had cut it", tensor=name)

    laid = zip(names, flat._shapes, strict=True)
    parameters = [
        (None, (numel,)) if is_padding else next(laid)
        for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True)
    ]
    # Before the first forward pass the flat parameter itself is the local shard.
    local = getattr(flat, "_local_shard", handle.flat_param).detach()
    start = handle.rank * local.shape[0] if handle.uses_sharded_strategy else 0
    return flat_shards(local, parameters, start=start, frozen=_frozen_names(handle.flat_param, names))


def _frozen_names(flat: torch.Tensor, names: Sequence[str]) -> frozenset[str]:
    """Return those of the parameters in ``flat`` that are not trained: all or none, unless FSDP kept the originals."""
    originals: Sequence[torch.Tensor] | None = getattr(flat, "_params", None)
    if originals is None:
        return frozenset() if flat.requires_grad else frozenset(names)

    return frozenset(name for name, original in zip(names, originals, strict=True) if not original.requires_grad)


def _managed_names(flat: _FlatParameter, prefix: str) -> Iterator[str]:
    """Yield the names of all parameters that are in ``flat``, tied ones under each of theirs."""
    yield from (_join(prefix, name) for name in flat._fqns)
    yield from (_join(prefix, _join(tied.module_name, tied.param_name)) for tied in flat._shared_param_infos)


def _partition_shards(name: str, parameter: _Partitioned) -> list[Shard]:
    part = parameter.ds_tensor
    each = int(getattr(part, "ds_numel", part.numel()))
    if part.numel() != each or getattr(part, "ds_quant_scale", None) is not None:
        raise LayoutError(f"ZeRO-3 has {name!r} swapped out or quantised: its elements cannot be read", tensor=name)

    frozen = () if parameter.requires_grad else (name,)
    start = each * _partition_rank(parameter)
    return flat_shards(part.detach(), [(name, tuple(parameter.ds_shape))], start=start, frozen=frozen)


def _partition_rank(parameter: _Partitioned) -> int:
    rank = getattr(parameter, "ds_zero_partition_rank", None)
    if rank is not None:
        return int(rank)

    import torch.distributed  # older ZeRO-3 says the group only

    return torch.distributed.get_rank(parameter.ds_process_group)


def _join(prefix: str, name: str) -> str:
    return clean_name(f"{prefix}.{name}" if prefix else name)


def _cut(name: str, elements: torch.Tensor, shape: tuple[int, ...], start: int, trainable: bool) -> Iterator[Shard]:
    """Yield the shards of a parameter's ``elements``, the first of them element ``start`` of the whole."""
    whole = Box((0,) * len(shape), shape)
    at = 0
    for box in whole.split_flat(start, start + elements.shape[0]):
        yield Shard(name, elements[at : at + box.numel].view(box.extent), box.offset, shape, trainable=trainable)
        at += box.numel
