"""Rectangles in a logical tensor: the only geometry the planner knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ("Box",)


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
