"""Rectangles in a logical tensor: the only geometry the planner knows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ("Box", "best_dim", "overlaps")


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """
    The elements ``offset[d] <= index[d] < offset[d] + extent[d]`` of a logical tensor.

    A 0-d tensor's box has empty tuples and one element.
    """

    offset: tuple[int, ...]
    extent: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it holds."""
        return math.prod(self.extent)

    def intersect(self, other: Box) -> Box | None:
        """Return the common box, or ``None`` where there is none."""
        offset: list[int] = []
        extent: list[int] = []
        for a, n, b, m in zip(self.offset, self.extent, other.offset, other.extent, strict=True):
            start = a if a > b else b
            stop = min(a + n, b + m)
            if stop <= start:
                return None

            offset.append(start)
            extent.append(stop - start)

        return Box(tuple(offset), tuple(extent))

    def contains(self, other: Box) -> bool:
        """Tell whether every element of ``other`` is in this box."""
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.offset, self.extent, other.offset, other.extent, strict=True)
        )

    def subtract(self, other: Box) -> tuple[Box, ...]:
        """
        Return disjoint boxes that hold exactly the elements of this box outside ``other``.

        At most two a dim, in the order of the dims: the slab before ``other``, then the slab behind it.
        """
        common = self.intersect(other)
        if common is None:
            return (self,) if self.numel else ()

        rest: list[Box] = []
        offset, extent = list(self.offset), list(self.extent)
        for dim, (start, size) in enumerate(zip(common.offset, common.extent, strict=True)):
            stop, end = start + size, offset[dim] + extent[dim]
            for low, high in ((offset[dim], start), (stop, end)):
                if low < high:
                    offset[dim], extent[dim] = low, high - low
                    rest.append(Box(tuple(offset), tuple(extent)))

            offset[dim], extent[dim] = start, size

        return tuple(rest)

    def rows(self, start: int, stop: int, *, dim: int = 0) -> Box:
        """
        Return the box of the indices ``start`` to ``stop`` along ``dim``, counted from this box's own first.

        :raises ValueError: when the range does not lie in this box
        """
        if not 0 <= start <= stop <= self.extent[dim]:
            raise ValueError(f"rows {start} to {stop} are not in a box of {self.extent[dim]}")

        return Box(
            (*self.offset[:dim], self.offset[dim] + start, *self.offset[dim + 1 :]),
            (*self.extent[:dim], stop - start, *self.extent[dim + 1 :]),
        )

    def split_flat(self, start: int, stop: int) -> tuple[Box, ...]:
        """
        Return the boxes of the elements ``start`` to ``stop`` of this box, counted in row-major order.

        In that order themselves, so that their elements one after the other are the range; at most ``2 n - 1`` of
        them in ``n`` dims: a ragged beginning, whole rows, a ragged end.

        :raises ValueError: when the range does not lie in this box
        """
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"elements {start} to {stop} are not in a box of {self.numel}")

        return _split_flat((), self.offset, (), self.extent, start, stop)


def _split_flat(
    fixed: tuple[int, ...],
    offset: tuple[int, ...],
    ones: tuple[int, ...],
    extent: tuple[int, ...],
    start: int,
    stop: int,
) -> tuple[Box, ...]:
    if start == stop:
        return ()

    row = math.prod(extent[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if not extent or (head == 0 and tail == 0):
        whole = (offset[0] + first, *offset[1:]) if extent else ()
        return (Box(fixed + whole, ones + ((last - first, *extent[1:]) if extent else ())),)

    def within(index: int, low: int, high: int) -> tuple[Box, ...]:
        return _split_flat((*fixed, offset[0] + index), offset[1:], (*ones, 1), extent[1:], low, high)

    if first == last:
        return within(first, head, tail)

    boxes = within(first, head, row) if head else ()
    first += head > 0
    if first < last:
        boxes += (Box((*fixed, offset[0] + first, *offset[1:]), (*ones, last - first, *extent[1:])),)

    return boxes + (within(last, 0, tail) if tail else ())


def best_dim(boxes: Iterable[Box]) -> int:
    """Return the dim with the most different starts, or -1 without dims."""
    starts: list[set[int]] = []
    for box in boxes:
        starts = starts or [set() for _ in box.offset]
        for seen, start in zip(starts, box.offset, strict=True):
            seen.add(start)

    return max(range(len(starts)), key=lambda dim: (len(starts[dim]), -dim), default=-1)


def overlaps(boxes: Iterable[Box]) -> Iterator[tuple[Box, Box]]:
    """Yield every two of ``boxes`` that share an element: a sweep along the dim that tells them apart best."""
    found = list(boxes)
    if len(found) < 2:
        return

    dim = best_dim(found)
    if dim >= 0:
        found.sort(key=lambda box: box.offset[dim])

    active: list[Box] = []
    for box in found:
        if dim >= 0:
            active = [other for other in active if other.offset[dim] + other.extent[dim] > box.offset[dim]]

        for other in active:
            if box.intersect(other) is not None:
                yield other, box

        active.append(box)
