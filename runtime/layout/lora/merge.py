"""Adapters merged into base shards as these are sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.lora.adapter import Adapter, factor_name
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.layout.views import assembled, elements

__all__ = ("merged",)

#: Elements merged at a time: bounds the temporary memory to a few times 16 MiB.
_BAND = 1 << 22


def merged(base: Iterable[Shard], adapters: Iterable[Adapter], *, allow_unused: bool = False) -> list[Shard]:
    """
    Return ``base`` with adapters added to the shards they are on, worked out as they are sent.

    The base weights are never written to, so nothing drifts. The product is worked out in float64, added in float32
    (to a float64 base in float64), and the sum rounded once to the base's dtype: how a matrix is cut changes no bit
    of it, save where float64's own last bit decides a float32.
    Several adapters on one matrix add up. Reading a box costs two operations times rank for each of its elements.

    :param allow_unused: take adapters on matrices of which ``base`` has nothing, such as another stage's
    :raises LayoutError: for an adapter without a base, shapes that do not fit, a base that is not floating point, or
        a base shard for which this actor lacks rows of B or columns of A (see :func:`gathered`)
    """
    shards = list(base)
    by_name: dict[str, list[Adapter]] = {}
    for each in adapters:
        by_name.setdefault(each.name, []).append(each)

    unused = sorted(by_name.keys() - {shard.name for shard in shards})
    if unused and not allow_unused:
        raise LayoutError(f"an adapter is on {unused[0]!r}, of which no base shard was given", tensor=unused[0])

    return [_with_adapters(shard, tuple(by_name[shard.name])) if shard.name in by_name else shard for shard in shards]


def _with_adapters(shard: Shard, adapters: tuple[Adapter, ...]) -> Shard:
    """Return a base shard as the sum; it is trainable where an adapter is, frozen though the base may be."""
    trainable = shard.trainable or any(part.trainable for each in adapters for part in (*each.a, *each.b))
    return replace(shard, view=_merge(shard, adapters), trainable=trainable)


def _merge(shard: Shard, adapters: tuple[Adapter, ...]) -> Computed:
    """Return the stand-in for a base shard's view, after checking that all it needs is here."""
    if not shard.view.dtype.is_floating_point or shard.view.dtype.itemsize == 1:
        raise LayoutError(
            f"{shard.name!r} is {shard.view.dtype}: adapters are merged into floating point bases only",
            tensor=shard.name,
        )

    for each in adapters:
        _check_shapes(shard, each)
        _factors(each, shard.box)

    base, origin = shard.view, shard.offset
    compute = torch.promote_types(base.dtype, torch.float32)

    def read(box: Box) -> torch.Tensor:
        result = torch.empty(box.extent, dtype=base.dtype, device=base.device)
        with torch.no_grad():
            for start, stop in _bands(box):
                band = box.rows(start, stop)
                total = elements(base, band).to(compute)
                place = Box((origin[0] + band.offset[0], origin[1] + band.offset[1]), band.extent)
                for each in adapters:
                    left, right = _factors(each, place)
                    # In float64, so that neither TF32 nor the way a box is cut decides a bit of the sum.
                    delta = torch.mm(left.to(base.device, torch.float64), right.to(base.device, torch.float64))
                    total = total + delta.mul_(each.scale).to(compute)

                result[start:stop].copy_(total)

        return result

    return Computed(tuple(base.shape), base.dtype, base.device, read)


def _check_shapes(shard: Shard, each: Adapter) -> None:
    wanted = shard.global_shape[::-1] if each.transposed else shard.global_shape
    fits = len(wanted) == 2 and all(
        part.global_shape[dim] == wanted[dim] for dim, parts in enumerate((each.b, each.a)) for part in parts
    )
    if not fits:
        raise LayoutError(
            f"{shard.name!r} has the global shape {shard.global_shape}, which its adapter of A "
            f"{[part.global_shape for part in each.a][:1]} and B {[part.global_shape for part in each.b][:1]} "
            "does not make",
            tensor=shard.name,
        )


def _factors(each: Adapter, box: Box) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two matrices whose product is added, unscaled, to ``box`` of the base."""
    rank = each.rank
    flip = -1 if each.transposed else 1
    (row, column), (rows, columns) = box.offset[::flip], box.extent[::flip]
    left = assembled(factor_name(each.name, "B"), each.b, Box((row, 0), (rows, rank)))
    right = assembled(factor_name(each.name, "A"), each.a, Box((0, column), (rank, columns)))
    return (right.t(), left.t()) if each.transposed else (left, right)


def _bands(box: Box) -> Iterator[tuple[int, int]]:
    """Cut the rows of a box into runs of at most ``_BAND`` elements, of one row at least."""
    each = max(_BAND // max(box.extent[1], 1), 1)
    for start in range(0, box.extent[0], each):
        yield start, min(start + each, box.extent[0])
