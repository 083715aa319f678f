"""What is started together when a step is pulled, and when it has arrived."""

from __future__ import annotations

import itertools
import operator
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.transfer.comm import CudaFence, Deadline
from wavecast.runtime.transfer.cuda_memory import CopyBatch, allocation_of
from wavecast.runtime.transfer.memory import Memory, Watch, strided
from wavecast.runtime.transfer.parts import fill_parts, is_small, on_wire, touched_cuts
from wavecast.runtime.transfer.program import Step
from wavecast.runtime.transfer.segments import Segment, Strided, join_segments, pair_segments
from wavecast.runtime.transfer.tables import Table, build_tables

__all__ = ("Arrival", "Part", "make_parts")

#: A row of at least so many bytes goes by a copy engine, which is faster than a kernel there: between two H200 379 GB/s
#: at 4 MiB and 388 at 8 MiB against 373, but 363 at 2 MiB. Both at once are no faster than the better of them.
_ENGINE_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """
    What is started together.

    :ivar batch: contiguous copies, and ``copies`` the others
    :ivar sums: what was written
    :ivar needs: bytes of the step, in wire order, that the sender must vouch for
    :ivar watch: the tensors that are written to
    :ivar is_small: to sum it up with all of the device holds up nobody for long
    """

    batch: CopyBatch | None
    copies: tuple[Table, ...]
    sums: tuple[Table, ...]
    needs: int
    watch: Watch
    is_small: bool


class Arrival:
    """The fence of a part: its bytes are there, and so are the tensors they were meant for."""

    def __init__(self, fences: Sequence[CudaFence], watch: Watch, spend: Callable[[float], None]) -> None:
        self._fences = fences
        self._watch = watch
        self._spend = spend

    def wait(self, deadline: Deadline) -> None:
        for fence in self._fences:
            fence.wait(deadline)

        started = time.thread_time()
        self._watch.require_in_place()
        self._spend(time.thread_time() - started)


def make_parts(step: Step, memory: Memory, device: torch.device, bases: Sequence[int], places: bytes) -> Iterator[Part]:
    """
    Yield the parts of a step, first to last.

    :param device: whose tables they are for
    :param bases: where the sender's allocations are mapped here
    :param places: as in :class:`Addresses`: where each cut lies in them
    """
    counted, others = _pulled(step, memory, bases, places)
    near = step.near
    if not near:
        # Copy engines first: they need no multiprocessor, which senders on their GPUs are summing up with by then.
        counted.sort(key=lambda segment: segment.nbytes < _ENGINE_NBYTES)

    starts = [wire for _, wire in on_wire(step.cuts)]
    for counts, pulled in ((False, others), (True, counted)):
        for segments in fill_parts(pulled):
            spans = [(segment.wire, segment.wire + segment.rows * segment.nbytes) for segment in segments]
            watch = memory.watch(step.cuts[number] for number in touched_cuts(starts, spans))
            batch, copies, sums = _plan(segments, device, counted=counts, near=near)
            yield Part(batch, copies, sums, max(end for _, end in spans), watch, is_small(segments))


def _pulled(step: Step, memory: Memory, bases: Sequence[int], places: bytes) -> tuple[list[Segment], list[Segment]]:
    """
    Return the segments from the sender's memory to this actor's views.

    A cut held in several views is pulled to each of them, and summed up in the last, which is in the first list.
    Tensors that follow each other at both ends are one segment, for as long as both ends are in one allocation: a
    copy across two of them is refused by the driver.
    """
    counted: list[tuple[tuple[int, int], Segment]] = []
    others: list[Segment] = []
    numbers = array("q")
    numbers.frombytes(places)
    at = 0
    for cut, wire in on_wire(step.cuts):
        dims = len(cut.extent)
        handle = numbers[at]
        source = Strided(bases[handle] + numbers[at + 1], tuple(numbers[at + 2 : at + 2 + dims]))
        at += 2 + dims
        *more, last = memory.targets(cut)
        for view in more:
            others.extend(pair_segments(cut.extent, itemsize(cut.dtype), source, strided(view), wire=wire))

        target = strided(last)
        within = handle, allocation_of(target.address)
        found = pair_segments(cut.extent, itemsize(cut.dtype), source, target, wire=wire)
        counted.extend((within, segment) for segment in found)

    joined = [
        segment
        for _, group in itertools.groupby(counted, key=operator.itemgetter(0))
        for segment in join_segments(segment for _, segment in group)
    ]
    return joined, others


def _plan(
    segments: Sequence[Segment], device: torch.device, *, counted: bool, near: bool
) -> tuple[CopyBatch | None, tuple[Table, ...], tuple[Table, ...]]:
    """Return what copies ``segments``, by engines and by the kernel, and what sums them up if they are counted."""
    # Within one GPU a kernel copies at memory's speed, several times what an engine does.
    engine = [segment for segment in segments if segment.nbytes >= _ENGINE_NBYTES and not near]
    rest = [segment for segment in segments if segment.nbytes < _ENGINE_NBYTES or near]
    copies = [
        (
            segment.target + row * segment.target_pitch,
            segment.source + row * segment.source_pitch,
            segment.nbytes,
        )
        for segment in engine
        for row in range(segment.rows)
    ]
    own = [segment._replace(source=segment.target, source_pitch=segment.target_pitch) for segment in segments]
    return (
        CopyBatch(copies) if copies else None,
        build_tables(join_segments(rest), device),
        build_tables(join_segments(own), device) if counted else (),
    )
