"""From strided views to rows of bytes: pure arithmetic on addresses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = ("Strided", "Segment", "pair_segments", "join_segments", "split_segment", "unit_nbytes")

#: Units of a segment are counted in 31 bits.
_MOST_NBYTES = 1 << 30


class Strided(NamedTuple):
    """
    Where a box of elements lies in memory.

    :ivar address: of the first element
    :ivar strides: bytes from one index to the next, one number a dim
    """

    address: int
    strides: tuple[int, ...]


class Segment(NamedTuple):
    """
    Rows of bytes, contiguous in themselves, at both ends and on the wire.

    :ivar source: address of the first row to read, and ``target`` of the first one to write
    :ivar nbytes: of one row
    :ivar source_pitch: bytes from row to row at the source, and ``target_pitch`` at the target; 0 for a single row
    :ivar wire: the byte at which the first row starts on the wire; the others follow without a gap
    """

    source: int
    target: int
    rows: int
    nbytes: int
    source_pitch: int
    target_pitch: int
    wire: int


def pair_segments(
    extent: tuple[int, ...], itemsize: int, source: Strided, target: Strided, *, wire: int
) -> Iterator[Segment]:
    """
    Yield the segments that bring a box of ``extent`` elements from ``source`` to ``target``, in row-major order.

    Dims that are contiguous at both ends become one row, dims in step at both ends one dim. What is left is a segment
    for each index of all but the innermost of them: one for most weights, cut along whichever dim.
    """
    dims = [(size, a, b) for size, a, b in zip(extent, source.strides, target.strides, strict=True) if size != 1]
    if any(size == 0 for size, _, _ in dims):
        return

    nbytes = itemsize
    while dims and dims[-1][1] == dims[-1][2] == nbytes:
        nbytes *= dims.pop()[0]

    merged: list[tuple[int, int, int]] = []
    for size, a, b in dims:
        if merged and merged[-1][1] == a * size and merged[-1][2] == b * size:
            merged[-1] = (merged[-1][0] * size, a, b)
        else:
            merged.append((size, a, b))

    if not merged:
        yield Segment(source.address, target.address, 1, nbytes, 0, 0, wire)
        return

    rows, source_pitch, target_pitch = merged.pop()
    for index in itertools.product(*(range(size) for size, _, _ in merged)):
        start = source.address + sum(i * a for i, (_, a, _) in zip(index, merged, strict=True))
        stop = target.address + sum(i * b for i, (_, _, b) in zip(index, merged, strict=True))
        yield Segment(start, stop, rows, nbytes, source_pitch, target_pitch, wire)
        wire += rows * nbytes


def join_segments(segments: Iterable[Segment]) -> list[Segment]:
    """Return ``segments`` with single rows that follow each other at both ends and on the wire made one."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.rows == segment.rows == 1
            and last.source + last.nbytes == segment.source
            and last.target + last.nbytes == segment.target
            and last.wire + last.nbytes == segment.wire
        ):
            joined[-1] = last._replace(nbytes=last.nbytes + segment.nbytes)
        else:
            joined.append(segment)

    return joined


def split_segment(segment: Segment, most: int = _MOST_NBYTES) -> Iterator[Segment]:
    """Yield ``segment`` in parts of at most ``most`` bytes, or of one row where a row of several has more."""
    source, target, rows, nbytes, source_pitch, target_pitch, wire = segment
    if rows * nbytes <= most:
        yield segment
    elif rows == 1:
        for start in range(0, nbytes, most):
            part = min(most, nbytes - start)
            yield Segment(source + start, target + start, 1, part, 0, 0, wire + start)
    else:
        step = max(most // nbytes, 1)
        for first in range(0, rows, step):
            part = min(step, rows - first)
            row = Segment(
                source + first * source_pitch,
                target + first * target_pitch,
                part,
                nbytes,
                source_pitch if part > 1 else 0,
                target_pitch if part > 1 else 0,
                wire + first * nbytes,
            )
            yield from split_segment(row, most) if part == 1 else (row,)


def unit_nbytes(segment: Segment) -> int:
    """Return 16, 4, 2 or 1: the largest that a segment's addresses, sizes and pitches are all multiples of."""
    common = math.gcd(*segment[:2], *segment[3:], 16)
    return common if common != 8 else 4
