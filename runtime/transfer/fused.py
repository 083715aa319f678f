"""Packing, unpacking and summing up by a few launches a bucket, whatever the number of tensors in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.transfer.board import Board
from wavecast.runtime.transfer.copying import bytes_of, is_held_as_sent, window_of
from wavecast.runtime.transfer.cuda_memory import read_async
from wavecast.runtime.transfer.memory import Memory, Watch, dtype_of, strided
from wavecast.runtime.transfer.program import Bucket, Placed
from wavecast.runtime.transfer.segments import Segment, Strided, join_segments, pair_segments
from wavecast.runtime.transfer.tables import (
    Table,
    build_tables,
    stage_and_sum_table,
    stage_table,
    sum_source,
    sum_target,
)

__all__ = ("FusedCopier", "Tables", "Tally")


class Tally:
    """
    The sums of a run's steps, on the device.

    :param steps: how many
    :ivar steps: how many there is room for
    :param board: where they are kept, for others to see; ``None``: in memory of their own
    """

    def __init__(self, steps: int, device: torch.device, board: Board | None = None) -> None:
        if board is None:
            self._totals = torch.zeros(max(steps, 1), dtype=torch.int64, device=device)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(device))
        else:
            self._totals = board.sums
            self._ready = board.cleared

        self.steps = len(self._totals)
        self._fetched: torch.Tensor | None = None

    def total(self, step: int, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
        """Return the place of a step's sum; what ``stream`` (else the current one) adds comes after its clearing."""
        (stream or torch.cuda.current_stream(self._totals.device)).wait_event(self._ready)
        return self._totals[step : step + 1]

    def fetch(self, target: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """
        Queue on ``stream``, behind all that adds to the sums, that they are brought to the host.

        :param target: int64, page-locked, at least as long; must outlive the stream's work
        """
        self._fetched = target[: len(self._totals)]
        nbytes = self._totals.numel() * self._totals.element_size()
        read_async(self._fetched.data_ptr(), self._totals.data_ptr(), nbytes, stream.cuda_stream)

    def values(self, steps: int) -> list[int]:
        """Return the sums. The device must be through with its work."""
        found = self._totals if self._fetched is None else self._fetched
        return [int(value) for value in found.tolist()[:steps]]


@dataclass(frozen=True, slots=True, eq=False)
class _Packing:
    """
    :ivar watch: the tensors that are read, by their addresses
    :ivar in_place: it can be sent out of the only tensor itself, nothing being copied
    :ivar worked: cuts that need more than a copy: a cast, or to be worked out
    """

    watch: Watch
    in_place: bool
    copies: tuple[Table, ...]
    worked: tuple[Placed, ...]
    worked_sums: tuple[Table, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Unpacking:
    """:ivar watch: the tensors that are written, by their addresses; ``more``: copies to further views of a cut"""

    watch: Watch
    copies: tuple[Table, ...]
    more: tuple[Table, ...]


class Tables:
    """What was worked out for the buckets of one program over one memory; kept from run to run."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.packing: dict[tuple[int, int], _Packing] = {}
        self.unpacking: dict[tuple[int, int], _Unpacking] = {}


class FusedCopier:
    """
    A :class:`~wavecast.runtime.transfer.copying.Copier` on CUDA whose launches do not grow in number with the tensors.

    A sender sums up what it reads from its weights, a receiver what it finds in its own after writing. Where
    tensors lie is kept from run to run: those of a bucket are looked at before it is packed or unpacked, and one that
    is not what or where it was is a :class:`~wavecast.runtime.errors.LayoutError`.

    :param tally: takes the sums; ``None``: none are wanted
    :param last: the run's last step, and where its last bucket begins: nothing travels while that is unpacked, nor
        while the run's very first one is packed
    """

    def __init__(self, tables: Tables, tally: Tally | None, *, last: tuple[int, int] = (-1, 0)) -> None:
        self._last = last
        self._tables = tables
        self._memory = tables.memory
        self._tally = tally
        self._in_place: set[tuple[int, int]] = set()

    def pack(self, step: int, bucket: Bucket, window: torch.Tensor, *, in_place: bool = True) -> torch.Tensor:
        plan = self._tables.packing.get((step, bucket.first))
        if plan is None:
            plan = self._tables.packing[step, bucket.first] = self._plan_packing(bucket, window.device)

        plan.watch.require_still()
        if in_place and plan.in_place:
            self._in_place.add((step, bucket.first))
            # Made anew each time: to keep it would keep memory that its owner may give up between syncs.
            return bytes_of(self._memory.source(bucket.items[0].cut))

        base = window.data_ptr()
        alone = (step, bucket.first) == (0, 0)
        for item in plan.worked:
            window_of(item, window).copy_(self._memory.source(item.cut), non_blocking=True)

        if self._tally is None:
            for table in plan.copies:
                stage_table(table, target_base=base, alone=alone)
        else:
            total = self._tally.total(step)
            for table in plan.copies:
                stage_and_sum_table(table, total, target_base=base, alone=alone)

            for table in plan.worked_sums:
                sum_source(table, total, source_base=base)

        return window

    def packed(self, step: int, bucket: Bucket, sent: torch.Tensor) -> None:
        # What was copied was summed up on the way.
        plan = self._tables.packing[step, bucket.first]
        if (step, bucket.first) in self._in_place and self._tally is not None:
            total = self._tally.total(step)
            for table in plan.copies:
                sum_source(table, total, hurry=False)

    def unpack(self, step: int, bucket: Bucket, window: torch.Tensor, check: Callable[[], None]) -> None:
        plan = self._tables.unpacking.get((step, bucket.first))
        if plan is None:
            plan = self._tables.unpacking[step, bucket.first] = self._plan_unpacking(bucket)

        check()
        plan.watch.require_still()
        base = window.data_ptr()
        alone = (step, bucket.first) == self._last
        for table in (*plan.more, *plan.copies):
            stage_table(table, source_base=base, alone=alone)

        if self._tally is not None:
            total = self._tally.total(step)
            for table in plan.copies:
                sum_target(table, total, alone=alone)

    def sums(self, steps: int) -> list[int]:
        return [] if self._tally is None else self._tally.values(steps)

    def _plan_packing(self, bucket: Bucket, device: torch.device) -> _Packing:
        segments: list[Segment] = []
        worked: list[Placed] = []
        summed: list[Segment] = []
        for item in bucket.items:
            cut, wire = item.cut, bucket.first + item.start
            place = _packed(item)
            if self._memory.holds_as_is(cut):
                source = strided(self._memory.source(cut))
                segments.extend(pair_segments(cut.extent, itemsize(cut.dtype), source, place, wire=wire))
            else:
                worked.append(item)
                summed.extend(pair_segments(cut.extent, itemsize(cut.dtype), place, place, wire=wire))

        return _Packing(
            self._watch(bucket),
            is_held_as_sent(bucket, self._memory, device),
            build_tables(join_segments(segments), device),
            tuple(worked),
            build_tables(join_segments(summed), device),
        )

    def _plan_unpacking(self, bucket: Bucket) -> _Unpacking:
        segments: list[Segment] = []
        others: list[Segment] = []
        for item in bucket.items:
            cut, wire = item.cut, bucket.first + item.start
            *more, last = self._memory.targets(cut)
            place = _packed(item)
            segments.extend(pair_segments(cut.extent, itemsize(cut.dtype), place, strided(last), wire=wire))
            for view in more:
                others.extend(pair_segments(cut.extent, itemsize(cut.dtype), place, strided(view), wire=wire))

        device = self._memory.device
        return _Unpacking(
            self._watch(bucket),
            build_tables(join_segments(segments), device),
            build_tables(join_segments(others), device),
        )

    def _watch(self, bucket: Bucket) -> Watch:
        return self._memory.watch(item.cut for item in bucket.items)


def _packed(item: Placed) -> Strided:
    """Return where a cut lies in its bucket, as if that began at address 0."""
    strides: list[int] = []
    step = dtype_of(item.cut.dtype).itemsize
    for size in reversed(item.cut.extent):
        strides.append(step)
        step *= size

    return Strided(item.start, tuple(reversed(strides)))
