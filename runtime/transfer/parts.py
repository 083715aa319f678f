"""What is pulled is started part by part: which cuts and segments go together."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from wavecast.runtime.transfer.memory import Memory, Watch
from wavecast.runtime.transfer.program import Cut, padded
from wavecast.runtime.transfer.segments import Segment, split_segment

__all__ = ("Lent", "fill_parts", "is_small", "lend", "on_wire", "touched_cuts")

#: What was written is summed up part by part, each a third of what is left, so that little is left to sum up when the
#: last byte has arrived. The first part is small and the next ones grow: bytes travel while the tensors behind them are
#: looked at, a third of a microsecond each and more.
_SHARE = 3
_GROWTH = 3
_LEAST_PART_NBYTES = 128 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Lent:
    """:ivar nbytes: of the step, in wire order, up to where ``watch`` tells of the tensors they are in"""

    place: int
    nbytes: int
    watch: Watch


def is_small(segments: Iterable[Segment]) -> bool:
    """Tell whether a part is about the smallest there is: its sum holds up nobody for long."""
    return sum(segment.rows * segment.nbytes for segment in segments) <= 2 * _LEAST_PART_NBYTES


def fill_parts(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield ``segments`` in order, cut and put together to parts."""
    left = sum(segment.rows * segment.nbytes for segment in segments)
    room = _LEAST_PART_NBYTES
    part: list[Segment] = []
    used = 0
    for whole in segments:
        for segment in split_segment(whole, _LEAST_PART_NBYTES):
            if part and used + segment.rows * segment.nbytes > room:
                yield part
                left -= used
                room = max(min(left // _SHARE, _GROWTH * room), _LEAST_PART_NBYTES)
                part, used = [], 0

            part.append(segment)
            used += segment.rows * segment.nbytes

    if part:
        yield part


def touched_cuts(starts: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """Return the numbers of the cuts that start at ``starts`` of the wire and have some of ``spans``."""
    found: set[int] = set()
    for start, end in spans:
        found.update(range(bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, end)))

    return sorted(found)


def lend(place: int, cuts: Sequence[Cut], memory: Memory, seen: set[int]) -> Iterator[Lent]:
    """
    Yield ``cuts`` in wire order, put together to parts.

    :param place: of their step in the sender's program
    :param seen: tensors of parts that are vouched for before; those of each part are added
    """
    room = _LEAST_PART_NBYTES
    lent: list[Cut] = []
    used = 0
    for cut, wire in on_wire(cuts):
        lent.append(cut)
        used += cut.nbytes
        if used >= room or cut is cuts[-1]:
            yield Lent(place, wire + cut.nbytes, memory.watch_lent(lent, seen))
            room *= _GROWTH
            lent, used = [], 0


def on_wire(cuts: Iterable[Cut]) -> Iterator[tuple[Cut, int]]:
    """Yield each cut with the byte at which it would start if the step were packed."""
    wire = 0
    for cut in cuts:
        yield cut, wire
        wire += padded(cut.nbytes)
