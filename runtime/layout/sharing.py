"""Which views of one actor lie on the same memory: what is written to one is written to the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    #: Where a view begins and ends, its position among all, and the view.
    _Span = tuple[int, int, int, torch.Tensor]

__all__ = ("NOT_SHARED", "Sharing", "find_sharing")

#: Runs of bytes that are listed one by one for one view; two views of more that interleave oddly are taken as apart.
_MOST_RUNS = 1 << 22


class Sharing(NamedTuple):
    """
    Views on common memory, by their position in the list asked about.

    :ivar same: groups of views equal in address, shape, strides and dtype, each ascending
    :ivar overlapping: pairs of views with some bytes in common that are not equal so; each lower number first
    """

    same: tuple[tuple[int, ...], ...] = ()
    overlapping: tuple[tuple[int, int], ...] = ()


#: Views of memory of their own each.
NOT_SHARED = Sharing()


class _Extent(NamedTuple):
    """Where a view's bytes lie: runs of ``nbytes``, and the dims (size, pitch in bytes) that repeat them."""

    start: int
    stop: int
    number: int
    nbytes: int
    dims: tuple[tuple[int, int], ...]


def find_sharing(views: Iterable[torch.Tensor | None]) -> Sharing:
    """
    Find the views that share memory, exactly: interleaved columns of one storage do not.

    Linear in the views but for a sort where each has a range of its own; columns at one pitch are sorted again by
    where they lie in a row. Views without memory (empty ones, ``None``) share nothing.
    """
    spans = sorted(
        (view.data_ptr(), _end(view), index, view)
        for index, view in enumerate(views)
        if view is not None and view.numel() and view.data_ptr()
    )
    same: list[tuple[int, ...]] = []
    pairs: list[tuple[int, int]] = []
    for cluster in _clusters(spans):
        groups: dict[tuple[object, ...], list[int]] = {}
        extents: list[_Extent] = []
        for start, _, index, view in cluster:
            group = groups.setdefault((start, view.shape, view.stride(), view.dtype), [])
            if not group:
                extents.append(_extent(view, index))

            group.append(index)

        same += (tuple(group) for group in groups.values() if len(group) > 1)
        pairs += ((min(pair), max(pair)) for pair in _overlaps(sorted(extents)))

    return Sharing(tuple(sorted(same)), tuple(sorted(pairs)))


def _end(view: torch.Tensor) -> int:
    """Return the address behind the last byte."""
    size = view.element_size()
    if view.is_contiguous():
        return view.data_ptr() + view.numel() * size

    return view.data_ptr() + size * (1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)))


def _extent(view: torch.Tensor, index: int) -> _Extent:
    start, size = view.data_ptr(), view.element_size()
    if view.is_contiguous():
        nbytes = view.numel() * size
        return _Extent(start, start + nbytes, index, nbytes, ())

    # In the order of the memory, so that a transposed dense matrix is one run too. An expanded dim adds no memory.
    dims = sorted(
        ((n, stride * size) for n, stride in zip(view.shape, view.stride(), strict=True) if n > 1 and stride),
        key=lambda dim: dim[1],
    )
    nbytes = size
    repeated: list[tuple[int, int]] = []
    for n, pitch in dims:
        if not repeated and pitch == nbytes:
            nbytes *= n
        elif repeated and pitch == repeated[-1][0] * repeated[-1][1]:
            repeated[-1] = (repeated[-1][0] * n, repeated[-1][1])
        else:
            repeated.append((n, pitch))

    stop = start + nbytes + sum((n - 1) * pitch for n, pitch in repeated)
    return _Extent(start, stop, index, nbytes, tuple(repeated))


def _clusters(spans: Sequence[_Span]) -> Iterator[Sequence[_Span]]:
    """Yield the views whose ranges of addresses hang together, alone ones left out."""
    first, end = 0, 0
    for position, (start, stop, _, _) in enumerate(spans):
        if start >= end:
            if position - first > 1:
                yield spans[first:position]

            first = position

        end = max(end, stop)

    if len(spans) - first > 1:
        yield spans[first:]


def _overlaps(cluster: Sequence[_Extent]) -> Iterator[tuple[int, int]]:
    """Yield pairs that share bytes: all neighbours in memory, which is enough to tell that there are any."""
    pitches = {extent.dims[0][1] for extent in cluster if len(extent.dims) == 1}
    if len(pitches) == 1 and all(len(extent.dims) == 1 for extent in cluster):
        # Columns of one matrix, however many: apart in a row is apart everywhere.
        (pitch,) = pitches
        columns = sorted((extent.start % pitch, extent.nbytes) for extent in cluster)
        ends = [start + nbytes for start, nbytes in columns]
        starts = [start for start, _ in columns[1:]] + [columns[0][0] + pitch]
        if all(end <= start for end, start in zip(ends, starts, strict=True)):
            return

    for number, one in enumerate(cluster):
        for other in cluster[number + 1 :]:
            if other.start >= one.stop:
                break

            if _share_bytes(one, other):
                yield one.number, other.number


def _share_bytes(one: _Extent, other: _Extent) -> bool:
    """Tell whether two views whose ranges of addresses meet have a byte in common."""
    if not one.dims and not other.dims:
        return True

    # All runs of both begin at multiples of this, seen from their own first: a common phase keeps them apart.
    pitch = math.gcd(*(pitch for extent in (one, other) for _, pitch in extent.dims))
    gap = (other.start - one.start) % pitch
    if one.nbytes <= gap and other.nbytes <= pitch - gap:
        return False

    if max(_runs(one), _runs(other)) > _MOST_RUNS:
        return False

    import torch

    starts, others = _starts(one), _starts(other)
    # The first run of the other that ends behind the start of one of ours, and whether it begins before ours ends.
    found = torch.searchsorted(others + other.nbytes, starts, right=True)
    inside = found < len(others)
    return bool((others[found.clamp_max(len(others) - 1)] < starts + one.nbytes)[inside].any())


def _runs(extent: _Extent) -> int:
    return math.prod(n for n, _ in extent.dims)


def _starts(extent: _Extent) -> torch.Tensor:
    """Return the address of each run, ascending."""
    import torch

    starts = torch.tensor([extent.start], dtype=torch.int64)
    for n, pitch in extent.dims:
        starts = (starts[:, None] + torch.arange(n, dtype=torch.int64) * pitch).flatten()

    return starts.sort().values
