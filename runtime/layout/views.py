"""From shards of a module's own tensors to shards of logical tensors: renamed, unstacked, cut apart, transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard

if TYPE_CHECKING:
    import torch

__all__ = ("NameMap", "map_name", "elements", "missing", "assembled", "renamed", "unstacked", "sections", "transposed")

#: From a module's own name to the logical tensor's, to several (tied weights), or to ``None`` to leave it out. A
#: mapping leaves names that it lacks as they are.
NameMap = Mapping[str, str | tuple[str, ...] | None] | Callable[[str], str | tuple[str, ...] | None]


def map_name(names: NameMap | None, name: str) -> tuple[str, ...]:
    """Return the logical names of the module's tensor ``name``: none, one or several."""
    if names is None:
        return (name,)

    found = names(name) if callable(names) else names.get(name, name)
    if found is None:
        return ()

    return (found,) if isinstance(found, str) else tuple(found)


def elements(view: torch.Tensor | Computed, box: Box) -> torch.Tensor:
    """
    Return the elements of ``box``, offsets counted from the view's own first element.

    A window of the memory where the view is a tensor, fresh memory where it is computed.
    """
    if isinstance(view, Computed):
        return view.read(box)

    for dim, (start, length) in enumerate(zip(box.offset, box.extent, strict=True)):
        if length != view.shape[dim]:
            view = view.narrow(dim, start, length)

    return view


def missing(shards: Iterable[Shard], box: Box) -> list[Box]:
    """Return disjoint boxes: what of ``box`` none of ``shards``, all of one tensor, holds."""
    rest = [box] if box.numel else []
    for shard in shards:
        if not rest:
            break

        rest = [left for part in rest for left in part.subtract(shard.box)]

    return rest


def assembled(name: str, shards: Sequence[Shard], box: Box) -> torch.Tensor:
    """
    Return the elements of ``box`` of a logical tensor: a view where one shard holds them all, else put together.

    :param shards: of that tensor
    :raises LayoutError: when ``shards`` lack a part
    """
    for shard in shards:
        if shard.box.contains(box):
            return elements(shard.view, _within(box, shard.box))

    lacking = missing(shards, box)
    if lacking or not shards:
        first = min(lacking, default=box)
        raise LayoutError(f"this actor lacks {name!r} at offset {first.offset} with extent {first.extent}", tensor=name)

    import torch

    result = torch.empty(box.extent, dtype=shards[0].view.dtype, device=shards[0].view.device)
    for shard in shards:
        common = box.intersect(shard.box)
        if common is not None:
            elements(result, _within(common, box)).copy_(elements(shard.view, _within(common, shard.box)))

    return result


def _within(box: Box, outer: Box) -> Box:
    """Return ``box`` with its offsets counted from the first element of ``outer``."""
    return Box(tuple(a - b for a, b in zip(box.offset, outer.offset, strict=True)), box.extent)


def renamed(shards: Iterable[Shard], names: NameMap | None) -> list[Shard]:
    """Return ``shards`` under other names: left out, once, or once for each name that ``names`` gives."""
    if names is None:
        return list(shards)

    return [replace(shard, name=name) for shard in shards for name in map_name(names, shard.name)]


def unstacked(shard: Shard, names: Callable[[int], str]) -> list[Shard]:
    """
    Take apart a tensor that stacks logical tensors along its first dim, such as all experts of a layer.

    :param names: from a position in the stack, counted in the whole stack, to the logical tensor's name
    :return: one shard for each position the shard holds, without the first dim; views, no copies
    :raises LayoutError: when the shard has no dim to take apart
    """
    if not shard.offset:
        raise LayoutError(f"{shard.name!r} has no dims and cannot be a stack", tensor=shard.name)

    first, *offset = shard.offset
    return [
        Shard(
            names(first + index),
            _select(shard.view, index),
            tuple(offset),
            shard.global_shape[1:],
            trainable=shard.trainable,
        )
        for index in range(shard.view.shape[0])
    ]


def sections(shard: Shard, parts: Sequence[tuple[str | None, int]], *, dim: int = 0) -> list[Shard]:
    """
    Cut apart a tensor that lays logical tensors side by side along ``dim``, such as gate and up.

    :param parts: name and size along ``dim`` of each logical tensor in turn; ``None`` names padding, left out
    :return: one shard for each part that the shard reaches into; views, no copies
    :raises LayoutError: when the sizes do not add up to the tensor's
    """
    size = shard.global_shape[dim]
    if sum(length for _, length in parts) != size:
        raise LayoutError(
            f"parts {', '.join(f'{name}: {length}' for name, length in parts)} of {shard.name!r} "
            f"do not add up to its size {size} along dim {dim}",
            tensor=shard.name,
        )

    found: list[Shard] = []
    start = 0
    for name, length in parts:
        whole = Box((0,) * len(shard.offset), shard.global_shape).rows(start, start + length, dim=dim)
        common = shard.box.intersect(whole) if length else None
        if common is not None and name is not None:
            offset = tuple(a - b for a, b in zip(common.offset, whole.offset, strict=True))
            found.append(Shard(name, _window(shard, common), offset, whole.extent, trainable=shard.trainable))

        start += length

    return found


def transposed(shard: Shard) -> Shard:
    """
    Return the shard of the transposed matrix, as a view.

    :raises LayoutError: when the tensor has not two dims
    """
    if len(shard.offset) != 2:
        raise LayoutError(f"{shard.name!r} has {len(shard.offset)} dims and cannot be transposed", tensor=shard.name)

    view = shard.view
    if isinstance(view, Computed):
        read = view.read
        flipped: torch.Tensor | Computed = replace(
            view, shape=view.shape[::-1], read=lambda box: read(Box(box.offset[::-1], box.extent[::-1])).t()
        )
    else:
        flipped = view.t()

    return Shard(shard.name, flipped, shard.offset[::-1], shard.global_shape[::-1], trainable=shard.trainable)


def _window(shard: Shard, box: Box) -> torch.Tensor | Computed:
    """Return what ``shard`` holds of ``box``, a part of its own box in the logical tensor."""
    start = _within(box, shard.box).offset
    if not isinstance(shard.view, Computed):
        return elements(shard.view, Box(start, box.extent))

    read = shard.view.read
    return replace(
        shard.view,
        shape=box.extent,
        read=lambda part: read(Box(tuple(a + b for a, b in zip(start, part.offset, strict=True)), part.extent)),
    )


def _select(view: torch.Tensor | Computed, index: int) -> torch.Tensor | Computed:
    if not isinstance(view, Computed):
        return view[index]

    read = view.read
    return replace(
        view,
        shape=view.shape[1:],
        read=lambda box: read(Box((index, *box.offset), (1, *box.extent))).squeeze(0),
    )
