"""Receivers fetch what they want straight out of their senders' memory: no staging, no packing, no communicator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from wavecast.runtime.errors import SyncError
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.transfer.arrivals import Arrival, Part, make_parts
from wavecast.runtime.transfer.board import Board, Boards, index_of
from wavecast.runtime.transfer.comm import CudaFence, Deadline, Fence
from wavecast.runtime.transfer.cuda_memory import (
    close_memory,
    make_current,
    open_memory,
)
from wavecast.runtime.transfer.fused import Tally
from wavecast.runtime.transfer.memory import Memory, strided
from wavecast.runtime.transfer.messages import Addresses
from wavecast.runtime.transfer.parts import Lent, lend, on_wire
from wavecast.runtime.transfer.program import Cut, Program, Step
from wavecast.runtime.transfer.segments import Segment, join_segments, pair_segments
from wavecast.runtime.transfer.tables import Table, build_tables, copy_table, sum_source

__all__ = ("Puller", "Turn")


@dataclass(frozen=True, slots=True)
class Turn:
    """
    A run, for what is done in it.

    :ivar serial: of the run
    :ivar check: raises once the run was given up, and ``given_up`` tells
    :ivar spend: is told what a thread that waits has spent on other things than waiting, in seconds
    """

    serial: int
    deadline: Deadline
    check: Callable[[], None]
    given_up: Callable[[], bool]
    spend: Callable[[float], None]


class Puller:
    """
    One actor's part in the steps that are pulled: it copies what it receives, and sums up both ends.

    All launches come from the transfer's thread. What copy engines fetch, what a kernel fetches, what is copied within
    the GPU and what is summed up have a stream each: none waits for another but sums for what they sum up, so that a
    link, the memory and the sums are at work at once.

    :param device: the actor's GPU
    :ivar sums: the stream on which both ends are summed up
    :ivar boards: of the senders, and of others that this actor agrees with
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        make_current(index_of(device))
        self._engine = torch.cuda.Stream(device)
        self._walk = torch.cuda.Stream(device)
        self._near = torch.cuda.Stream(device)
        self.sums = torch.cuda.Stream(device)
        self._opened: dict[int, tuple[bytes, ...]] = {}
        self._bases: dict[int, tuple[int, ...]] = {}
        self._remote: dict[int, bytes] = {}
        self._crowded = False
        self._pulls_far = False
        self.boards = Boards(device)
        self._memory: Memory | None = None
        self._receiving: dict[int, tuple[Part, ...]] = {}
        self._sending: dict[int, tuple[Table, ...]] = {}
        self._lending: tuple[Lent, ...] | None = None
        self._twins: dict[tuple[Cut, ...], int] = {}
        self._twin_of: dict[int, int] = {}
        self._summed: dict[int, torch.Tensor] = {}
        self._fetched = torch.zeros(1, dtype=torch.int64, pin_memory=True)

    def attach(self, found: Mapping[int, Addresses]) -> None:
        """
        Map the memory of senders, in place of what was mapped of them before.

        :raises TransportUnavailable: when a sender's memory cannot be mapped here
        """
        make_current(index_of(self.device))
        self.boards.detach(found)
        for sender, addresses in found.items():
            before = self._opened.pop(sender, ())
            opened: list[bytes] = []
            bases: list[int] = []
            try:
                for handle in addresses.handles:
                    bases.append(open_memory(handle))
                    opened.append(handle)
            finally:
                self._opened[sender] = tuple(opened)
                for handle in before:
                    close_memory(handle)

            self._bases[sender] = tuple(bases)
            number, offset, steps = addresses.board
            self.boards.attach(sender, bases[number] + offset, steps, addresses.places)
            self._remote.update(addresses.steps)

        self._receiving = {}

    def begin(self, memory: Memory, ready: torch.cuda.Event | None) -> None:
        """Start a run over ``memory``; device work waits for ``ready``."""
        self._summed = {}
        make_current(index_of(self.device))
        if memory is not self._memory:
            self._memory = memory
            self._receiving = {}
            self._sending = {}
            self._lending = None

        if ready is not None:
            for stream in self._streams:
                stream.wait_event(ready)

    def prepare_sends(self, program: Program) -> None:
        """Work out what others pull in ``program``, so that the first run does not have to."""
        self._lent(program)
        for step in program.steps:
            if step.pull and step.sender == program.actor:
                self._sums_of(step)

    def prepare_receives(self, program: Program) -> None:
        """Work out what this actor pulls in ``program``, from where :meth:`attach` was told it lies."""
        for step in program.steps:
            if step.pull and step.sender != program.actor:
                self._parts_of(step)

    def take_on(self, program: Program) -> None:
        """Drop what was worked out for another program."""
        self._crowded = any(step.near for step in program.steps)
        self._pulls_far = any(step.pull and not step.near and step.sender != program.actor for step in program.steps)
        self._receiving = {}
        self._sending = {}
        self._lending = None
        self._twins = {}
        self._twin_of = {}

    def vouch(self, program: Program, board: Board, turn: Turn) -> None:
        """
        Let others pull what this actor sends, part by part as it has been looked at, all steps in turns.

        :raises LayoutError: for a tensor that is not what or where it was
        """
        for lent in self._lent(program):
            turn.check()
            lent.watch.require_still()
            board.vouch(lent.place, lent.nbytes)

    def send(self, step: Step, total: torch.Tensor | None) -> None:
        """Queue the sum of what others pull in ``step``; it is added to ``total``."""
        if total is None:
            return

        # What goes to several receivers is summed up for the first of them.
        twin = self._twin_of.get(step.task)
        if twin is None:
            twin = self._twin_of[step.task] = self._twins.setdefault(step.cuts, step.task)

        known = self._summed.setdefault(twin, total)
        with torch.cuda.stream(self.sums):
            if known is not total:
                total.copy_(known, non_blocking=True)
            else:
                for table in self._sums_of(step):
                    sum_source(table, total, hurry=self._crowded)

    def receive(self, step: Step, total: Callable[[], torch.Tensor | None], turn: Turn) -> Iterator[Fence]:
        """
        Queue the copies of ``step`` and the sums of what they wrote, part by part; yield the fence of each part.

        What the sender vouches for is fetched while it looks at the rest. So are the tensors written to, before.

        :param total: returns what the sums are added to, if they are wanted; not asked before the first copies are on
            their way
        :raises LayoutError: for a tensor that is not what or where it was
        :raises MoveTimeout: when the sender does not vouch for all of it by the deadline
        """
        before: tuple[Part, list[torch.cuda.Event]] | None = None
        for part in self._parts_of(step):
            self.boards.wait_vouched(step.sender, step.task, turn.serial, part.needs, turn.deadline, turn.check)
            part.watch.require_still()
            copied = self._start(part, near=step.near)
            if before is not None:
                # After the next copies: the link must not wait for a launch.
                self._sum_up(*before, total())

            before = part, copied
            yield Arrival([CudaFence(event, turn.given_up) for event in copied], part.watch, turn.spend)

        if before is not None:
            self._sum_up(*before, total())

    def _sum_up(self, part: Part, copied: Sequence[torch.cuda.Event], total: torch.Tensor | None) -> None:
        """Queue the sum of what a part wrote, behind its copies."""
        if total is None:
            return

        for event in copied:
            self.sums.wait_event(event)

        hurry = part.is_small or (self._crowded and not self._pulls_far)
        with torch.cuda.stream(self.sums):
            for table in part.sums:
                sum_source(table, total, hurry=hurry)

    def _start(self, part: Part, *, near: bool) -> list[torch.cuda.Event]:
        """Queue the copies of a part; return the events after them."""
        streams: list[torch.cuda.Stream] = []
        if part.batch is not None:
            part.batch.start(self._engine.cuda_stream)
            streams.append(self._engine)

        if part.copies:
            streams.append(self._near if near else self._walk)
            with torch.cuda.stream(streams[-1]):
                for table in part.copies:
                    copy_table(table, near=near and not self._pulls_far)

        copied = [torch.cuda.Event() for _ in streams]
        for event, stream in zip(copied, streams, strict=True):
            event.record(stream)

        return copied

    def finished(self, tally: Tally | None = None) -> torch.cuda.Event:
        """
        Return the event after all that was queued.

        :param tally: to be fetched before it
        """
        event = torch.cuda.Event()
        for stream in self._streams:
            if stream is not self.sums:
                self.sums.wait_stream(stream)

        if tally is not None:
            if len(self._fetched) < tally.steps:
                self._fetched = torch.zeros(tally.steps, dtype=torch.int64, pin_memory=True)

            # Kept here: what was queued is over before this is closed, whatever becomes of the run.
            tally.fetch(self._fetched, self.sums)

        event.record(self.sums)
        return event

    def join(self, stream: torch.cuda.Stream) -> None:
        """Let ``stream`` come after all that was queued here, and what is queued next here after ``stream``."""
        stream.wait_event(self.finished())
        for own in self._streams:
            own.wait_stream(stream)

    def synchronize(self) -> None:
        """Block until the device is through with all that was queued: copies always come to their end."""
        for stream in self._streams:
            stream.synchronize()

    def close(self) -> None:
        """Unmap everything."""
        make_current(index_of(self.device))
        self.synchronize()
        self.boards.detach(self._opened)
        opened, self._opened = self._opened, {}
        self._receiving = {}
        for handles in opened.values():
            for handle in handles:
                close_memory(handle)

    @property
    def _streams(self) -> tuple[torch.cuda.Stream, ...]:
        return self._engine, self._walk, self._near, self.sums

    def _lent(self, program: Program) -> tuple[Lent, ...]:
        if self._lending is None:
            memory, seen = self._held(), set[int]()
            # What stays on this GPU has time: it is copied beside what takes a link.
            parts = (
                lend(place, step.cuts, memory, seen)
                for place, step in sorted(enumerate(program.steps), key=lambda each: each[1].near)
                if step.pull and step.sender == program.actor
            )
            turns = itertools.chain.from_iterable(itertools.zip_longest(*parts))
            self._lending = tuple(lent for lent in turns if lent is not None)

        return self._lending

    def _sums_of(self, step: Step) -> tuple[Table, ...]:
        found = self._sending.get(step.task)
        if found is None:
            memory = self._held()
            segments: list[Segment] = []
            for cut, wire in on_wire(step.cuts):
                place = strided(memory.source(cut))
                segments.extend(pair_segments(cut.extent, itemsize(cut.dtype), place, place, wire=wire))

            found = self._sending[step.task] = build_tables(join_segments(segments), self.device)

        return found

    def _parts_of(self, step: Step) -> tuple[Part, ...]:
        found = self._receiving.get(step.task)
        if found is None:
            bases, places = self._bases[step.sender], self._remote[step.task]
            parts = make_parts(step, self._held(), self.device, bases, places)
            found = self._receiving[step.task] = tuple(parts)

        return found

    def _held(self) -> Memory:
        if self._memory is None:
            raise SyncError("a pulled step was asked for before the run began")

        return self._memory
