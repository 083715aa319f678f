"""What an actor keeps for one group: connection, program, staging memory and the run under way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait

import torch

from wavecast.runtime import errors
from wavecast.runtime.collector import collector_paused
from wavecast.runtime.transfer.agreement import Ending, agree
from wavecast.runtime.transfer.announcer import Announcer
from wavecast.runtime.transfer.board import AGREED, SUMMED
from wavecast.runtime.transfer.comm import Communicator, CudaFence, Deadline, Fence
from wavecast.runtime.transfer.copying import Copier, TensorCopier
from wavecast.runtime.transfer.fused import FusedCopier, Tables, Tally
from wavecast.runtime.transfer.futures import Promise, item_of, pass_on
from wavecast.runtime.transfer.lane import Lane
from wavecast.runtime.transfer.lending import export_addresses
from wavecast.runtime.transfer.meeting import Meeting
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import (
    Addresses,
    Connect,
    Connected,
    Finished,
    HostStore,
    Reply,
    RunId,
    RunStep,
    StepDone,
)
from wavecast.runtime.transfer.program import Bucket, Program, Step, fill_buckets
from wavecast.runtime.transfer.pull import Puller, Turn
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.staging import Leg, Staging

__all__ = ("Session",)

#: How long giving up waits for the transfer thread before it leaves it behind.
_GRACE_SECONDS = 0.3
#: So many parts before the end there is time to hear what the senders have summed up: each takes 0.3 ms, and what is
#: read of a board may wait for two of them.
_LAST_PARTS = 6


class Session:
    """
    One group's state on one actor.

    What moves bytes is started on :attr:`lane`, a thread of the session's own: the thread of a request stays free to
    notice that its call was cancelled. A second thread waits for the device, so that the next step can be queued
    meanwhile.

    :ivar run: the run under way, if any
    :ivar under_way: the first parts of what was started ahead are
    :ivar announcer: says on the actor's board how runs begin and end
    """

    def __init__(self) -> None:
        self.under_way = threading.Event()
        self.lane = Lane("wavecast-transfer")
        self.announcer = Announcer()
        self.run: Run | None = None
        self._waits = Lane("wavecast-arrivals")
        self._lock = threading.RLock()
        self._program: Program | None = None
        self._forwards = False
        self._buckets: dict[int, tuple[Bucket, ...]] = {}
        self._communicator: Communicator | None = None
        self._staging: Staging | None = None
        self._puller: Puller | None = None
        self._tables: Tables | None = None
        self._meeting = Meeting()
        self._started: dict[tuple[RunId, int], Promise[Reply]] = {}
        self._epoch = 0
        self._ended: tuple[RunId | None, str] = (None, "")

    def current(self, name: RunId) -> Run:
        """
        Return the run under way.

        :raises SyncAborted: when it is not the one named
        """
        run = self.run
        if run is None or run.name != name:
            ended, reason = self._ended
            raise errors.SyncAborted(reason if ended == name else "the run is no longer current on this actor")

        run.check()
        return run

    def start_ahead(self, requests: Sequence[RunStep]) -> None:
        """
        Start steps whose own calls are on their way: the first ones of the run that has just begun.

        What they became is kept beyond the end of the run, which may come before the calls.
        """
        self._started = {}
        if not requests:
            return

        self.under_way.clear()
        with self._lock:
            run = self.current(requests[0].run)
            run.next_step = len(requests)
            queued = self.lane.submit(lambda: self._steps(run, requests))
            for request in requests:
                future = self._started[request.run, request.step] = Promise()
                self._await(item_of(queued, request.step), run, request, future)

    def enqueue(self, request: RunStep) -> Promise[Reply]:
        """
        Hand the step to the lane as soon as all steps before it have been handed over.

        Of one that was started ahead this is what became of it.
        """
        future: Promise[Reply] = Promise()
        with self._lock:
            started_ahead = self._started.pop((request.run, request.step), None)
            if started_ahead is not None:
                return started_ahead

            run = self.current(request.run)
            if request.step < run.next_step or request.step in run.waiting:
                raise errors.SyncError(f"step {request.step} of the run was asked for twice")

            run.waiting[request.step] = (request, future)
            while run.next_step in run.waiting:
                ready, outer = run.waiting.pop(run.next_step)
                run.next_step += 1
                started = self.lane.submit(lambda ready=ready: self._step(run, ready))  # type: ignore[misc]
                self._await(started, run, ready, outer)

        return future

    def give_up(self, name: RunId, reason: str) -> None:
        """End the run at once: nothing is written after this returns. Another run than the one named is left alone."""
        with self._lock:
            run = self.run
            if run is None or run.name != name:
                # It may have ended by itself; an actor that begins it only now must not read what is here by then.
                self.announcer.take_back(name, agreed=False)
                return

            self.announcer.take_back(name, agreed=True)
            self.run = None
            self._epoch += 1
            self._ended = (name, reason)
            run.give_up(reason)
            puller, staging = self._puller, self._staging
            communicator = self._drop_connection(abort=True)
            # What is on its way out of a sender's memory arrives first, as may what is queued behind a receive.
            idle = self.lane.submit(lambda: _come_to_rest(puller, staging, communicator))
            if not wait((idle,), timeout=_GRACE_SECONDS).done:
                # Stuck in the transport, where it can do no harm: the run's check stops it before it writes.
                # Its mappings stay with it, to be given back once it is free: no two threads use one puller.
                if puller is not None:
                    self.lane.submit(puller.close)
                    self._puller = None

                self.lane.close()
                self._waits.close()
                self.lane = Lane("wavecast-transfer")
                self._waits = Lane("wavecast-arrivals")

    def close(self) -> None:
        """Release everything. The session must not be used again."""
        with self._lock:
            if self.run is not None:
                self.run.give_up("the group was closed")

            self.run = None
            self._program = None
            self._buckets = {}
            self._tables = None
            self.announcer.export(None)
            self._meeting.close()
            self._drop_connection(abort=False)
            puller, self._puller = self._puller, None
            if puller is not None:
                self.lane.submit(puller.close)

            self.lane.close()
            self._waits.close()

    # Connection, program and addresses.

    def host_store(self, request: HostStore, address: str) -> int:
        """Open the rendezvous of a connection and return its port."""
        return self._meeting.host(request, address)

    def connect(self, request: Connect, address: str) -> Future[Reply]:
        """Build this actor's end of a connection on the lane."""
        epoch = self._epoch
        return self.lane.submit(lambda: self._connect(request, address, epoch))

    def disconnect(self) -> None:
        """Give back communicators and staging memory; the next connection makes them anew. On the lane."""
        self._drop_connection(abort=False)

    def detach(self) -> None:
        """Unmap others' memory and forget where the shards are; the next :meth:`attach` maps it anew. On the lane."""
        puller, self._puller = self._puller, None
        if puller is not None:
            puller.close()

        self._tables = None
        self.announcer.export(None)

    def load(self, program: Program) -> None:
        """Take on a program. On the lane."""
        self._program = program
        self._buckets = {}
        self._tables = None
        if self._puller is not None:
            self._puller.take_on(program)

        if self.run is not None and self.run.memory.device.type == "cuda":
            # Whether others will read it is not known yet, but now is the time to make it.
            self.announcer.make_room(len(program.steps), self.run.memory.device)

        sends = any(step.sender == program.actor for step in program.steps)
        self._forwards = sends and any(program.actor in step.receivers for step in program.steps)
        self._allocate()

    def memory_of(self, run: Run) -> Memory:
        """Return the run's memory, found by the names that the program's cuts have. On the lane."""
        return run.memory if self._program is None else run.memory.under(self._program.renames)

    def export(self, name: RunId) -> Addresses:
        """Say where the cuts lie that others pull from this actor, and let them. On the lane."""
        run, program = self.current(name), self._loaded()
        board = self.announcer.board
        if board is None:
            raise errors.SyncError("the actor was asked for its addresses before it had its program on a GPU")

        memory = self.memory_of(run)
        with collector_paused():
            addresses = export_addresses(program, memory, board)

        self.announcer.export(run.memory)
        self.announcer.begin(run)
        # While the receivers map what they were told. What fails here fails again where it is answered for.
        self.lane.submit(lambda: self._prepare_sends(run, memory))
        return addresses

    def let_close(self, run: Run, peers: tuple[int, ...], close: Callable[[], object]) -> None:
        """
        Let ``run`` end by itself once its steps are through and ``peers`` agree.

        :param close: ends it on this actor
        """
        run.peers = peers
        run.close = close

    def refuse(self, run: Run, requests: Sequence[RunStep]) -> None:
        """Start none of the steps of ``run``: they were planned for another layout. Peers are told as well."""
        error = errors.LayoutError("the actor holds another layout than the one the run was planned for")
        self.announcer.refuse(run)
        run.next_step = len(requests)
        self._started = {(request.run, request.step): Promise() for request in requests}
        for future in self._started.values():
            future.set_exception(error)

    def attach(self, name: RunId, found: Mapping[int, Addresses]) -> None:
        """Map what this actor pulls from, and work out all that is pulled. On the lane."""
        run, program = self.current(name), self._loaded()
        memory = self.memory_of(run)
        puller = self._pulling(memory)
        puller.attach(found)
        puller.begin(memory, run.ready)
        with collector_paused():
            puller.prepare_receives(program)

    def _prepare_sends(self, run: Run, memory: Memory) -> None:
        run.check()
        puller = self._pulling(memory)
        puller.begin(memory, run.ready)
        with collector_paused():
            puller.prepare_sends(self._loaded())

    def buckets_of(self, step: int) -> tuple[Bucket, ...]:
        """Return how the bytes of a step travel."""
        program = self._loaded()
        if step not in self._buckets:
            self._buckets[step] = fill_buckets(program.steps[step].cuts, bucket_bytes=program.bucket_bytes)

        return self._buckets[step]

    def _loaded(self) -> Program:
        if self._program is None:
            raise errors.SyncError("the actor has no program")

        return self._program

    def _pulling(self, memory: Memory) -> Puller:
        if self._puller is None:
            self._puller = Puller(memory.device)
            self._puller.take_on(self._loaded())

        return self._puller

    def _connect(self, request: Connect, address: str, epoch: int) -> Connected:
        deadline = Deadline(request.seconds)
        started = deadline.left
        device = self.current(request.run).memory.device
        self._drop_connection(abort=False)
        communicator = self._join(request, address, device, deadline)
        with self._lock:
            if epoch != self._epoch:
                communicator.abort()
                raise errors.SyncAborted("the connection was given up while it was made")

            self._communicator = communicator
            self._allocate()

        return Connected(started - deadline.left, communicator.device_bytes)

    def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        """Meet the other members, and return this actor's end. The one place where they meet."""
        return self._meeting.join(request, address, device, deadline)

    def _allocate(self) -> None:
        """Hold two buckets, no larger than the largest that the program fills."""
        self._staging = None
        if self._communicator is None or self._program is None:
            return

        steps = [index for index, step in enumerate(self._program.steps) if not step.pull]
        largest = max((bucket.nbytes for step in steps for bucket in self.buckets_of(step)), default=0)
        self._staging = Staging(largest, self._communicator)

    def _drop_connection(self, *, abort: bool) -> Communicator | None:
        communicator, self._communicator = self._communicator, None
        self._staging = None
        if communicator is not None:
            if abort:
                communicator.abort()
            else:
                communicator.close()

        return communicator

    # Steps.

    def _steps(self, run: Run, requests: Sequence[RunStep]) -> list[list[Fence]]:
        """Queue the run's first steps; return for each the fences after which its bytes have moved."""
        try:
            return self._start_steps(run, requests)
        finally:
            self.under_way.set()

    def _start_steps(self, run: Run, requests: Sequence[RunStep]) -> list[list[Fence]]:
        program = self._loaded()
        steps = [program.steps[request.step] for request in requests]
        if not all(step.pull for step in steps):
            return [self._step(run, request) for request in requests]

        # Part by part in turns: all links are busy at once, and those first that are not on this GPU.
        fences: list[list[Fence]] = [[] for _ in requests]
        turns = [(fences[number], self._queue(run, request)) for number, request in enumerate(requests)]
        turns = [turns[number] for number in sorted(range(len(steps)), key=lambda number: steps[number].near)]
        with self._on_host(run):
            while turns:
                turns = [(found, parts) for found, parts in turns if _take_next(parts, found)]
                self.under_way.set()

        return fences

    def _step(self, run: Run, request: RunStep) -> list[Fence]:
        """Queue a step; return the fences after which its bytes have moved."""
        with self._on_host(run):
            return list(self._queue(run, request))

    def _queue(self, run: Run, request: RunStep) -> Iterator[Fence]:
        deadline = Deadline(request.seconds)
        run.check()
        program = self._loaded()
        if program.digest != request.digest:
            raise errors.SyncError(f"the actor has program {program.digest}, it was asked to run {request.digest}")

        if not run.opened:
            run.opened = True
            self._begin_steps(run, program, deadline)

        step = program.steps[request.step]
        if run.actor in step.receivers:
            run.wrote = True

        if self._forwards and self._puller is not None and self._staging is not None:
            for stream in self._staging.streams():
                self._puller.join(stream)

        yield from (
            self._pull(run, step, request.step, deadline)
            if step.pull
            else self._move(run, step, request.step, deadline)
        )
        run.queued += 1
        if run.queued == len(program.steps) and self._puller is not None:
            # Queued while bytes travel: in the end there is an event to wait for, and nothing to fetch.
            for stream in self._staging.streams() if self._staging is not None else ():
                self._puller.sums.wait_stream(stream)

            run.end = self._puller.finished(run.tally)

    @contextlib.contextmanager
    def _on_host(self, run: Run) -> Iterator[None]:
        """Count what this thread spends on the run."""
        started, waited = time.thread_time(), self._waited_seconds
        yield
        run.spend(time.thread_time() - started - (self._waited_seconds - waited))

    @property
    def _waited_seconds(self) -> float:
        return self._puller.boards.waited_seconds if self._puller is not None else 0.0

    def _begin_steps(self, run: Run, program: Program, deadline: Deadline) -> None:
        memory = self.memory_of(run)
        if self._staging is not None:
            self._staging.begin(run.ready)

        if any(step.pull for step in program.steps):
            puller = self._pulling(memory)
            puller.begin(memory, run.ready)
            if run.lends and self.announcer.board is not None:
                puller.vouch(program, self.announcer.board, self._turn(run, deadline))

    def _make_copier(self, run: Run) -> Copier:
        """Return what copies and sums up in ``run``, made at its first use: bytes that are pulled travel before."""
        if run.copier is not None:
            return run.copier

        program, memory = self._loaded(), self.memory_of(run)
        if program.kernels:
            if self._tables is None or self._tables.memory is not memory:
                self._tables = Tables(memory)

            run.tally = self._tally(len(program.steps), memory.device) if program.checksum else None
            end = len(program.steps) - 1
            buckets = () if program.steps[end].pull else self.buckets_of(end)
            run.copier = FusedCopier(self._tables, run.tally, last=(end, buckets[-1].first if buckets else 0))
        else:
            run.copier = TensorCopier(memory, checksum=program.checksum)

        return run.copier

    def _tally(self, steps: int, device: torch.device) -> Tally:
        return Tally(steps, device, self.announcer.board if self.announcer.has_room(steps) else None)

    def _turn(self, run: Run, deadline: Deadline) -> Turn:
        return Turn(run.name.serial, deadline, run.check, lambda: bool(run.given_up), run.spend)

    def _pull(self, run: Run, step: Step, index: int, deadline: Deadline) -> Iterator[Fence]:
        puller = self._pulling(run.memory)

        def total() -> torch.Tensor | None:
            self._make_copier(run)
            return run.tally.total(index, puller.sums) if run.tally is not None else None

        if run.actor == step.sender:
            puller.send(step, total())
        else:
            yield from puller.receive(step, total, self._turn(run, deadline))

    def _move(self, run: Run, step: Step, index: int, deadline: Deadline) -> Sequence[Fence]:
        staging, copier = self._staging, self._make_copier(run)
        if staging is None:
            raise errors.SyncError("the actor was asked to run before it was connected and had its program")

        leg = Leg(
            step=index,
            sender=step.sender,
            receivers=step.receivers,
            buckets=self.buckets_of(index),
            ahead=self._ahead(index, run, self._loaded()),
            forwards=self._forwards,
            copier=copier,
            deadline=deadline,
            meet=lambda: self._meet(run, step, deadline),
            check=run.check,
        )
        if run.actor in step.through:
            return staging.carry(leg)

        return staging.send(leg) if run.actor == step.sender else staging.receive(leg)

    def _meet(self, run: Run, step: Step, deadline: Deadline) -> None:
        """Enter no collective before all whose boards this actor reads have begun the run."""
        if self._puller is None:
            return

        boards = self._puller.boards
        for peer in (step.sender, *step.receivers):
            if boards.reads(peer):
                boards.wait_begun(peer, run.name.serial, deadline, run.check)

    def _ahead(self, step: int, run: Run, program: Program) -> Bucket | None:
        """Return the first bucket of the next step, when this actor sends it and had all of it from the start."""
        if self._forwards or step + 1 == len(program.steps):
            return None

        following = program.steps[step + 1]
        if following.pull or following.sender != run.actor:
            return None

        buckets = self.buckets_of(step + 1)
        return buckets[0] if buckets else None

    def _await(self, started: Future[list[Fence]], run: Run, request: RunStep, outer: Future[Reply]) -> None:
        """Answer a step once its bytes have moved; the last one once everything is in place."""
        waits = self._waits

        def arrive(fences: list[Fence]) -> Reply:
            deadline = Deadline(request.seconds)
            last = request.step + 1 == len(self._loaded().steps)
            for number, fence in enumerate(fences):
                if last and number == max(len(fences) - _LAST_PARTS, 0):
                    self._listen(run)

                fence.wait(deadline)

            if not last:
                return StepDone()

            finished = self._finish(run, deadline)
            return StepDone(finished, closed=self._close_run(run, finished, deadline))

        def queued(done: Future[list[Fence]]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
            else:
                pass_on(waits.submit(lambda: arrive(done.result())), outer)

        def note(done: Future[Reply]) -> None:
            run.failed = run.failed or done.exception() is not None

        outer.add_done_callback(note)
        started.add_done_callback(queued)

    def _finish(self, run: Run, deadline: Deadline) -> Finished:
        """Wait until all that was written is in place; return the sums of the run's steps."""
        program, staging, puller = self._loaded(), self._staging, self._puller
        started = time.thread_time()
        if not all(step.pull for step in program.steps):
            run.memory.require_still()
        elif any(step.sender == run.actor for step in program.steps):
            # Looked at as a whole before it was lent; what was received was looked at as it arrived.
            run.memory.require_in_place()

        run.spend(time.thread_time() - started)

        if staging is not None:
            staging.finish(deadline)

        if puller is not None:
            CudaFence(run.end or puller.finished(), lambda: bool(run.given_up)).wait(deadline)

        run.check()
        started = time.thread_time()
        sums = self._make_copier(run).sums(len(program.steps)) if program.checksum else []
        run.spend(time.thread_time() - started)
        return Finished(tuple(sums), staging.nbytes if staging is not None else 0, run.host_seconds)

    def _listen(self, run: Run) -> None:
        """Hear what the senders have summed up while the last bytes travel, to compare it as soon as they are there."""
        if run.close is not None and self._puller is not None:
            program = self._loaded()
            for sender in {step.sender for step in program.steps if step.sender != run.actor}:
                tasks = [step.task for step in program.steps if step.sender == sender]
                self._puller.boards.listen(sender, tasks, run.name.serial)

    def _close_run(self, run: Run, finished: Finished, deadline: Deadline) -> bool:
        """End the run on this actor, if it may do so by itself and all agree; return whether it has ended."""
        board, puller = self.announcer.board, self._puller
        if run.close is None or board is None or puller is None:
            return False

        def say(word: int, serial: int) -> None:
            # Not once the run was given up: by then a later one may have said something.
            with self._lock:
                run.check()
                board.post(word, serial)

        if run.failed:
            # Without sums nothing else would show it.
            say(SUMMED, -run.name.serial)
            say(AGREED, -run.name.serial)
            return False

        ending = Ending(run.name.serial, run.actor, run.peers, deadline, run.check, say)
        if not agree(ending, self._loaded(), finished.checksums, puller.boards):
            return False

        run.close()
        return True


def _come_to_rest(puller: Puller | None, staging: Staging | None, communicator: Communicator | None) -> None:
    if puller is not None:
        puller.synchronize()

    if staging is not None:
        for stream in staging.streams():
            stream.synchronize()

    if communicator is not None and communicator.device.type == "cuda":
        # What it has mapped of others' memory is read by nothing any more. Gloo maps none, and may take its time.
        communicator.close()


def _take_next(parts: Iterator[Fence], found: list[Fence]) -> bool:
    """Add the next of ``parts`` to ``found``; tell whether there was one."""
    for part in parts:
        found.append(part)
        return True

    return False
