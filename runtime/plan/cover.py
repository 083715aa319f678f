"""One tensor's geometry: destination boxes cut against source boxes, and the proof that they are covered."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box, best_dim, overlaps
from wavecast.runtime.layout.dtypes import ITEMSIZE
from wavecast.runtime.plan.placement import Holding
from wavecast.runtime.plan.route import is_castable

__all__ = ("Cell", "cover_tensor")

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Cell:
    """
    A box that some actors want and others hold: a route whose sender is not chosen yet.

    :ivar box: the elements
    :ivar dtype: what the receivers want
    :ivar holders: source actors that hold all of the box, ascending
    :ivar receivers: destination actors that want it in this dtype, ascending
    :ivar nbytes: elements times the dtype's size
    """

    box: Box
    dtype: str
    holders: tuple[int, ...]
    receivers: tuple[int, ...]
    nbytes: int


def cover_tensor(tensor: str, sources: Sequence[Holding], destinations: Sequence[Holding]) -> tuple[Cell, ...]:
    """
    Cut what ``destinations`` want of one tensor into boxes that ``sources`` hold.

    Every element of every destination box is in exactly one of its actor's cells. Cells equal in box and dtype are
    one, with all who want them. Where no two sources overlap partly there is one cell for each pair of boxes that
    meet; where some do, the smaller box comes first, which leaves each cell the most holders to choose from.

    Where sources hold the tensor in several dtypes, each element is sent by one in the receivers' own dtype, or, where
    none has it, in the widest: boxes are cut so that no rounded element takes the place of an exact one.

    :raises LayoutError: when global shapes disagree, a dtype cannot be cast, a box does not fit, boxes of one
        destination actor overlap without being equal, or elements are held by no source
    """
    _check_shapes(tensor, (*sources, *destinations))
    _check_dtypes(tensor, sources, destinations)
    _check_disjoint(tensor, destinations)

    held = _index_by_dtype(sources)
    wanted = _merge_actors(((each.box, each.dtype), each.actors) for each in destinations if each.box.numel)
    receivers: dict[tuple[Box, str], tuple[int, ...]] = {}
    holders: dict[tuple[Box, str], tuple[int, ...]] = {}
    for (box, dtype), actors in wanted.items():
        for part, owners in _cover(tensor, box, _by_preference(held, dtype), actors):
            holders[part, dtype] = owners
            receivers[part, dtype] = (*receivers.get((part, dtype), ()), *actors)

    return tuple(
        Cell(box, dtype, holders[box, dtype], tuple(sorted(set(actors))), box.numel * ITEMSIZE[dtype])
        for (box, dtype), actors in receivers.items()
    )


class _BoxIndex:
    """Boxes with their holders, sorted along the dim that tells them apart best."""

    def __init__(self, held: dict[Box, tuple[int, ...]]) -> None:
        self.dim = best_dim(held)
        self.boxes = sorted(held, key=self._start)
        self.holders = held
        self._starts = [self._start(box) for box in self.boxes]
        self._longest = max((box.extent[self.dim] for box in held), default=0) if self.dim >= 0 else 0

    def _start(self, box: Box) -> int:
        return box.offset[self.dim] if self.dim >= 0 else 0

    def near(self, box: Box) -> list[Box]:
        """Return every box that may meet ``box``, and few others."""
        if self.dim < 0:
            return self.boxes

        low = box.offset[self.dim]
        first = bisect_left(self._starts, low - self._longest + 1)
        return self.boxes[first : bisect_left(self._starts, low + box.extent[self.dim])]


def _index_by_dtype(sources: Sequence[Holding]) -> dict[str, _BoxIndex]:
    by_dtype: dict[str, list[tuple[Box, tuple[int, ...]]]] = {}
    for each in sources:
        if each.box.numel:
            by_dtype.setdefault(each.dtype, []).append((each.box, each.actors))

    return {dtype: _BoxIndex(_merge_actors(found)) for dtype, found in by_dtype.items()}


def _by_preference(held: dict[str, _BoxIndex], wanted: str) -> list[_BoxIndex]:
    """Return who holds what in the dtype wanted, then in the others from the widest on."""
    if len(held) == 1:
        return list(held.values())

    order = sorted(held, key=lambda dtype: (dtype == wanted, ITEMSIZE[dtype], dtype), reverse=True)
    return [held[dtype] for dtype in order]


def _cover(
    tensor: str, box: Box, held: Sequence[_BoxIndex], receivers: tuple[int, ...]
) -> list[tuple[Box, tuple[int, ...]]]:
    """Return disjoint parts that make up ``box``, each with all its holders: what the first lack, the next have."""
    cells: list[tuple[Box, tuple[int, ...]]] = []
    missing = [box]
    for index in held:
        lacking: list[Box] = []
        for fragment in missing:
            found, rest = _cut(fragment, index)
            cells += found
            lacking += rest

        missing = lacking
        if not missing:
            # Row by row, whoever holds them; what one index gives is in that order.
            return cells if len(held) == 1 else sorted(cells)

    first = min(missing)
    raise LayoutError(
        f"no source holds {tensor!r} at offset {first.offset}, extent {first.extent}, "
        f"of what actors {receivers} want: offset {box.offset}, extent {box.extent}",
        tensor=tensor,
        actors=receivers,
    )


def _cut(box: Box, held: _BoxIndex) -> tuple[list[tuple[Box, tuple[int, ...]]], list[Box]]:
    """
    Return disjoint parts of ``box`` that are held, in row-major order of their offsets, each with all its holders.

    Beside them what is not held, in disjoint parts too.
    """
    near = held.near(box)
    parts: dict[Box, list[int]] = {}
    for source in near:
        common = box.intersect(source)
        if common is not None:
            parts.setdefault(common, []).extend(held.holders[source])

    if sum(part.numel for part in parts) == box.numel and not any(overlaps(parts)):
        return [(part, tuple(sorted(set(parts[part])))) for part in sorted(parts)], []

    cells: list[Box] = []
    missing = [box]
    for part in sorted(parts, key=lambda part: (part.numel, part)):
        rest: list[Box] = []
        for fragment in missing:
            common = fragment.intersect(part)
            if common is None:
                rest.append(fragment)
            else:
                cells.append(common)
                rest.extend(fragment.subtract(common))

        missing = rest

    owners = [(source, held.holders[source]) for source in near]
    found = [
        (cell, tuple(sorted({actor for source, actors in owners if source.contains(cell) for actor in actors})))
        for cell in sorted(cells)
    ]
    return found, missing


def _merge_actors(items: Iterable[tuple[_Key, tuple[int, ...]]]) -> dict[_Key, tuple[int, ...]]:
    merged: dict[_Key, tuple[int, ...]] = {}
    for key, actors in items:
        merged[key] = (*merged.get(key, ()), *actors)

    return merged


def _check_shapes(tensor: str, holdings: Sequence[Holding]) -> None:
    first = holdings[0]
    for other in holdings:
        _check_fit(tensor, other)
        if other.global_shape != first.global_shape:
            raise LayoutError(
                f"actors disagree on the global shape of {tensor!r}: {first.global_shape} on {first.actors}, "
                f"{other.global_shape} on {other.actors}",
                tensor=tensor,
                actors=(*first.actors, *other.actors),
            )


def _check_fit(tensor: str, holding: Holding) -> None:
    offset, extent, shape = holding.box.offset, holding.box.extent, holding.global_shape
    fits = len(offset) == len(extent) == len(shape) and all(
        0 <= a <= a + n <= size for a, n, size in zip(offset, extent, shape, strict=True)
    )
    if not fits:
        raise LayoutError(
            f"a piece of {tensor!r} on {holding.actors} at offset {offset}, extent {extent} does not fit in global "
            f"shape {shape}",
            tensor=tensor,
            actors=holding.actors,
        )


def _check_dtypes(tensor: str, sources: Sequence[Holding], destinations: Sequence[Holding]) -> None:
    for holding in (*sources, *destinations):
        if holding.dtype not in ITEMSIZE:
            raise LayoutError(
                f"{tensor!r} has the unknown dtype {holding.dtype!r} on {holding.actors}",
                tensor=tensor,
                actors=holding.actors,
            )

    for source in {holding.dtype: holding for holding in sources}.values():
        for destination in {holding.dtype: holding for holding in destinations}.values():
            if not is_castable(source.dtype, destination.dtype):
                raise LayoutError(
                    f"{tensor!r} is {source.dtype} on {source.actors}, which is not cast to {destination.dtype} "
                    f"on {destination.actors}{_advice(destination.dtype)}",
                    tensor=tensor,
                    actors=(*source.actors, *destination.actors),
                )


def _advice(dtype: str) -> str:
    return ": quantise at the source, by fp8.quantised()" if dtype == "float8_e4m3fn" else ""


def _check_disjoint(tensor: str, destinations: Sequence[Holding]) -> None:
    by_layout: dict[tuple[int, ...], dict[Box, None]] = {}
    for holding in destinations:
        if holding.box.numel:
            by_layout.setdefault(holding.actors, {})[holding.box] = None

    for actors, boxes in by_layout.items():
        overlap = next(overlaps(boxes), None)
        if overlap is not None:
            a, b = overlap
            raise LayoutError(
                f"pieces of {tensor!r} overlap without being equal on {actors}: offset {a.offset}, extent {a.extent} "
                f"and offset {b.offset}, extent {b.extent}",
                tensor=tensor,
                actors=actors,
            )
