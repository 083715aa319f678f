"""Adapters on a module's own weight, told to the logical matrices that are views of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.lora.adapter import Adapter, each_box, factor_name
from wavecast.runtime.layout.shard import Computed, Shard

__all__ = ("attached",)


def attached(
    base: Iterable[Shard], weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float
) -> list[Adapter]:
    """
    Return the adapters that an adapter on one *local* weight means for the base shards that are views of it.

    For fused and sharded modules, whose adapter follows the module's own rows and columns: of a fused query, key and
    value projection each logical matrix gets its rows of B, whatever their order, and shares A.

    :param base: all of this actor's shards; those that are no views of ``weight`` are passed over
    :param weight: this actor's weight as the module holds it, of shape (rows, columns)
    :param a: what is multiplied with the weight's columns, of shape (rank, columns)
    :param b: what makes the weight's rows, of shape (rows, rank)
    :raises LayoutError: when shapes disagree, no shard is a view of the weight, or one takes other than evenly spaced
        rows and columns of it
    """
    rows, columns = tuple(weight.shape) if weight.dim() == 2 else (-1, -1)
    if (rows, columns) != (b.shape[0], a.shape[-1]) or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise LayoutError(
            f"A of {tuple(a.shape)} and B of {tuple(b.shape)} do not make a weight of {tuple(weight.shape)}"
        )

    a, b, rank = a.detach(), b.detach(), a.shape[0]
    parts: dict[str, tuple[list[Shard], list[Shard]]] = {}
    for shard in base:
        if isinstance(shard.view, Computed) or not _overlaps(shard.view, weight):
            continue

        down, across = _rows_and_columns(shard, shard.view, weight)
        held = parts.setdefault(shard.name, ([], []))
        (top, left), (height, width) = shard.offset, shard.global_shape
        held[0].append(Shard(factor_name(shard.name, "A"), a[:, across], (0, left), (rank, width)))
        held[1].append(Shard(factor_name(shard.name, "B"), b[down], (top, 0), (height, rank)))

    if not parts:
        raise LayoutError(f"no base shard is a view of the adapted weight of {tuple(weight.shape)}")

    return [Adapter(name, each_box(held[0]), each_box(held[1]), scale) for name, held in parts.items()]


def _overlaps(view: torch.Tensor, weight: torch.Tensor) -> bool:
    if view.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr() or not view.numel():
        return False

    first, last = _span(view)
    low, high = _span(weight)
    return first <= high and last >= low


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of the first and of the last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _rows_and_columns(shard: Shard, view: torch.Tensor, weight: torch.Tensor) -> tuple[slice, slice]:
    """Return which rows and columns of ``weight`` a view of it takes."""
    where = (view.data_ptr() - weight.data_ptr()) // weight.element_size()
    found: list[slice] = []
    if view.dim() == 2 and view.dtype == weight.dtype and where >= 0:
        for dim, base in sorted(enumerate(weight.stride()), key=lambda item: -item[1]):
            first, where = divmod(where, base)
            step = view.stride(dim) // base if view.shape[dim] > 1 else 1
            stop = first + (view.shape[dim] - 1) * step + 1
            if step < 1 or stop > weight.shape[dim] or (view.shape[dim] > 1 and view.stride(dim) % base):
                break

            found.insert(0 if dim == 0 else len(found), slice(first, stop, step))

    if len(found) != 2 or where:
        raise LayoutError(
            f"{shard.name!r} is a view of the adapted weight that does not take evenly spaced rows and columns of it",
            tensor=shard.name,
        )

    return found[0], found[1]
