"""Shards of parameters that are DTensors: FSDP2, tensor parallel plans, both at once, hybrid and expert meshes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import NameMap, elements, map_name

__all__ = ("shards", "tensor_shards", "trainable_names", "clean_name")

#: Put between the names of modules by wrappers that are not in any checkpoint.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})

#: A run of consecutive indices: its first in the logical tensor, and how many.
_Run = tuple[int, int]


class _Mesh(Protocol):
    """What is asked of a ``torch.distributed.device_mesh.DeviceMesh``."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def get_coordinate(self) -> Sequence[int] | None: ...


class _Distributed(Protocol):
    """What is asked of a ``torch.distributed.tensor.DTensor``."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device_mesh(self) -> _Mesh: ...

    @property
    def placements(self) -> Sequence[object]: ...

    def to_local(self) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Cut:
    """
    How one mesh axis cuts a dim.

    :ivar axis: the mesh axis
    :ivar parts: its size
    :ivar index: this rank's place along it
    :ivar factor: the dim is first cut into so many, and each of these into ``parts``
    """

    axis: int
    parts: int
    index: int
    factor: int


def shards(
    module: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
    *,
    names: NameMap | None = None,
    buffers: bool = False,
) -> list[Shard]:
    """
    Return what this rank holds of a module's parameters, as views of their memory: nothing is gathered or copied.

    A DTensor's shards are those of its placements; one on whose mesh this rank is not gives none. A plain tensor is
    whole: a replica. Tied parameters come once, under the name the module lists first; ``names`` may give more.
    Buffers, and parameters without ``requires_grad``, are not trainable.

    Modules of ``fully_shard`` that are left gathered after a forward pass are resharded first, as their
    ``state_dict()`` does: the gathered copy would be older than the optimizer's last step.

    Time is O(parameters x shards of each).

    :param module: a module, or its tensors with their names
    :param names: from the module's names, freed of wrappers (see :func:`clean_name`), to logical ones
    :param buffers: give a module's persistent buffers too
    :raises LayoutError: for a DTensor with sums pending, whose local shape is not what its placements say, or that is
        an FSDP1 flat parameter (see :mod:`wavecast.runtime.layout.flat`)
    """
    found: list[Shard] = []
    for name, tensor in _named_tensors(module, buffers=buffers):
        trainable = None if isinstance(tensor, torch.nn.Parameter) or not isinstance(module, torch.nn.Module) else False
        for logical in map_name(names, name):
            found.extend(tensor_shards(logical, tensor, trainable=trainable))

    return found


def tensor_shards(name: str, tensor: torch.Tensor, *, trainable: bool | None = None) -> list[Shard]:
    """
    Return what this rank holds of one tensor, a DTensor or a plain one, under the logical name ``name``.

    One shard for each box: a DTensor that is cut twice along a dim may hold several. None where it holds nothing.

    :param trainable: what the shards say of it; left out, a parameter is trainable that has ``requires_grad``, and
        so is whatever is no parameter
    :raises LayoutError: as :func:`shards`
    """
    if _is_flat(tensor):
        raise LayoutError(f"{name!r} is an FSDP1 flat parameter: give it to wavecast.runtime.layout.flat", tensor=name)

    shape = tuple(tensor.shape)
    if trainable is None:
        trainable = tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)

    if not _is_distributed(tensor):
        whole = (0,) * len(shape)
        return [Shard(name, tensor.detach(), whole, shape, trainable=trainable)] if tensor.numel() else []

    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return []

    with torch.no_grad():
        local = tensor.to_local().detach()

    runs = _runs(name, tensor, coordinate)
    _check_local(name, local, runs, tensor)
    return [
        Shard(name, elements(local, Box(at, box.extent)), box.offset, shape, trainable=trainable)
        for at, box in _boxes(runs)
        if box.numel
    ]


def trainable_names(
    module: torch.nn.Module | Iterable[tuple[str, torch.Tensor]], *, names: NameMap | None = None
) -> frozenset[str]:
    """Return the logical names of the parameters that have ``requires_grad``: for ``group.sync(only=...)``."""
    return frozenset(
        logical
        for name, tensor in _named_tensors(module, buffers=False)
        if tensor.requires_grad
        for logical in map_name(names, name)
    )


def clean_name(name: str) -> str:
    """Return ``name`` without the parts that torch's wrappers (FSDP1, activation checkpoints, compile) put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _named_tensors(
    module: torch.nn.Module | Iterable[tuple[str, torch.Tensor]], *, buffers: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(module, torch.nn.Module):
        if not isinstance(module, Iterable):
            raise LayoutError(f"a {type(module).__name__} is neither a module nor tensors with their names")

        yield from ((clean_name(name), tensor) for name, tensor in module)
        return

    _reshard(module)
    for name, parameter in module.named_parameters():
        yield clean_name(name), parameter

    if buffers:
        kept = module.state_dict(keep_vars=True).keys()
        yield from ((clean_name(name), buffer) for name, buffer in module.named_buffers() if name in kept)


def _reshard(module: torch.nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule  # heavy, and only there with torch.distributed

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _is_distributed(tensor: object) -> TypeGuard[_Distributed]:
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _is_flat(tensor: torch.Tensor) -> bool:
    return bool(getattr(tensor, "_is_flat_param", False))


def _runs(name: str, tensor: _Distributed, coordinate: Sequence[int]) -> list[list[_Run]]:
    """Return, for each dim of the logical tensor, the runs of indices held here, in the order of local memory."""
    shape, sizes = tuple(tensor.shape), tuple(tensor.device_mesh.shape)
    cuts: dict[int, list[_Cut]] = {}
    for axis, placement in enumerate(tensor.placements):
        kind = type(placement).__name__
        if kind in ("Shard", "_StridedShard"):
            factor = int(getattr(placement, "split_factor", 1))
            dim = int(getattr(placement, "dim", 0)) % len(shape)
            cuts.setdefault(dim, []).append(_Cut(axis, sizes[axis], coordinate[axis], factor))
        elif kind != "Replicate":
            raise LayoutError(f"{name!r} has the placement {placement!r}, which no box can say", tensor=name)

    runs: list[list[_Run]] = []
    for dim, size in enumerate(shape):
        held = [(0, size)]
        for cut in _in_order(cuts.get(dim, []), _stated_order(tensor, dim)):
            held = _take(held, cut)

        runs.append(held)

    return runs


def _stated_order(tensor: _Distributed, dim: int) -> tuple[int, ...]:
    """Return the mesh axes that cut ``dim`` in the order the tensor itself states, if it does (torch 2.10 and on)."""
    spec = getattr(tensor, "_spec", None)
    if getattr(spec, "use_strided_shard_as_shard_order", True):
        return ()

    entries = getattr(spec, "shard_order", None) or ()
    return next((tuple(axes) for tensor_dim, axes in entries if tensor_dim == dim), ())


def _in_order(cuts: list[_Cut], stated: tuple[int, ...]) -> list[_Cut]:
    """
    Return the cuts of one dim in the order in which they were made.

    Placements read from the left, but ``fully_shard`` cuts what a tensor parallel plan has cut before. Its placement
    on the left says so by a split factor: the number of parts made before by axes on its right. Where parts are
    uneven, applying the placements from the left would find other boxes than those that were made. A split factor
    that no order explains stays as it is.
    """
    if stated:
        return sorted(cuts, key=lambda cut: stated.index(cut.axis))

    ordered: list[_Cut] = []
    for cut in reversed(cuts):
        made_before = list(itertools.accumulate((other.parts for other in ordered), operator.mul, initial=1))
        if cut.factor in made_before:
            ordered.insert(made_before.index(cut.factor), replace(cut, factor=1))
        else:
            ordered.insert(0, cut)

    return ordered


def _take(held: list[_Run], cut: _Cut) -> list[_Run]:
    """Return the part of the indices ``held`` that a cut leaves here."""
    size = sum(length for _, length in held)
    taken: list[_Run] = []
    for outer in range(cut.factor):
        start, stop = _chunk(size, cut.factor, outer)
        low, high = _chunk(stop - start, cut.parts, cut.index)
        taken.extend(_slice(held, start + low, start + high))

    return _joined(taken)


def _chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return ``(start, stop)`` of a part as ``torch.chunk`` makes them: all alike, the last ones short or empty."""
    each = -(-size // parts)
    return min(each * index, size), min(each * (index + 1), size)


def _slice(held: list[_Run], start: int, stop: int) -> Iterator[_Run]:
    """Yield the runs of what is at ``start`` to ``stop`` when the indices ``held`` are put in a row."""
    at = 0
    for first, length in held:
        low, high = max(start - at, 0), min(stop - at, length)
        if low < high:
            yield first + low, high - low

        at += length


def _joined(runs: list[_Run]) -> list[_Run]:
    joined: list[_Run] = []
    for first, length in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((first, length))

    return joined


def _boxes(runs: list[list[_Run]]) -> Iterator[tuple[tuple[int, ...], Box]]:
    """Yield every box held with its offset in local memory."""
    placed = [[(at, first, length) for at, (first, length) in zip(_starts(dim), dim, strict=True)] for dim in runs]
    for chosen in itertools.product(*placed):
        yield (
            tuple(at for at, _, _ in chosen),
            Box(tuple(first for _, first, _ in chosen), tuple(length for _, _, length in chosen)),
        )


def _starts(runs: list[_Run]) -> list[int]:
    return list(itertools.accumulate((length for _, length in runs[:-1]), initial=0)) if runs else []


def _check_local(name: str, local: torch.Tensor, runs: list[list[_Run]], tensor: _Distributed) -> None:
    wanted = tuple(sum(length for _, length in dim) for dim in runs)
    held = tuple(local.shape)
    # A rank without elements may keep its memory in any shape that has none.
    if wanted != held and (local.numel() or 0 not in wanted):
        raise LayoutError(
            f"{name!r} has the local shape {held}, its placements {tensor.placements} on a mesh of "
            f"{tuple(tensor.device_mesh.shape)} say {wanted}",
            tensor=name,
        )
