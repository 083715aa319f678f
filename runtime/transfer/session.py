"""What an actor keeps for one group: connection, program, staging memory and the run under way."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import torch

from wavecast.runtime import errors
from wavecast.runtime.transfer.checksum import combine
from wavecast.runtime.transfer.comm import Communicator, Deadline
from wavecast.runtime.transfer.comm_torch import GlooCommunicator, NcclCommunicator, Rendezvous, host_store, join_store
from wavecast.runtime.transfer.lane import Lane
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import Connect, Connected, Finished, HostStore, Reply, RunId, RunStep, StepDone
from wavecast.runtime.transfer.program import Bucket, Program, fill_buckets
from wavecast.runtime.transfer.staging import Leg, Staging

__all__ = ("Run", "Session")

#: How long giving up waits for the transfer thread before it leaves it behind.
_GRACE_SECONDS = 0.3


class Run:
    """One sync, as one actor sees it."""

    def __init__(self, name: RunId, actor: int, memory: Memory) -> None:
        self.name = name
        self.actor = actor
        self.memory = memory
        self.addressed: Memory | None = None
        self.next_step = 0
        self.waiting: dict[int, tuple[RunStep, Future[Reply]]] = {}
        self.given_up = ""
        self.sums: dict[int, list[torch.Tensor]] = {}
        self.wrote = False
        self.ready: torch.cuda.Event | None = None
        if memory.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(memory.device))

    def check(self) -> None:
        """Raise once the run has been given up."""
        if self.given_up:
            raise errors.SyncAborted(self.given_up)

    def give_up(self, reason: str) -> None:
        """Let nothing more be read or written, and answer the steps that wait for their turn."""
        self.given_up = reason
        for _, future in self.waiting.values():
            future.set_exception(errors.SyncAborted(reason))

        self.waiting.clear()


class Session:
    """
    One group's state on one actor.

    What moves bytes runs on :attr:`lane`, a thread of the session's own: the thread of a request stays free to notice
    that its call was cancelled.

    :ivar run: the run under way, if any
    """

    def __init__(self) -> None:
        self.lane = Lane("wavecast-transfer")
        self.run: Run | None = None
        self._lock = threading.RLock()
        self._program: Program | None = None
        self._forwards = False
        self._buckets: dict[int, tuple[Bucket, ...]] = {}
        self._communicator: Communicator | None = None
        self._staging: Staging | None = None
        self._stores: dict[str, torch.distributed.Store] = {}
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

    def enqueue(self, request: RunStep) -> Future[Reply]:
        """Hand the step to the lane as soon as all steps before it have been handed over."""
        future: Future[Reply] = Future()
        # A caller on an event loop that stops waiting must not cancel what is yet to be answered.
        future.set_running_or_notify_cancel()
        with self._lock:
            run = self.current(request.run)
            if request.step < run.next_step or request.step in run.waiting:
                raise errors.SyncError(f"step {request.step} of the run was asked for twice")

            run.waiting[request.step] = (request, future)
            while run.next_step in run.waiting:
                ready, outer = run.waiting.pop(run.next_step)
                run.next_step += 1
                _chain(self.lane.submit(lambda ready=ready: self._step(run, ready)), outer)  # type: ignore[misc]

        return future

    def finish(self, name: RunId, deadline: Deadline) -> Finished:
        """Wait until all that was written is in place; return the sums of the run's steps. On the lane."""
        run = self.current(name)
        staging = self._staging
        if staging is None:
            return Finished((), 0)

        staging.finish(deadline)
        run.check()
        checksums = [combine([int(value) for value in run.sums[step]]) for step in sorted(run.sums)]
        return Finished(tuple(checksums), staging.nbytes)

    def give_up(self, name: RunId, reason: str) -> None:
        """End the run at once: nothing is written after this returns. Another run than the one named is left alone."""
        with self._lock:
            run = self.run
            if run is None or run.name != name:
                return

            self.run = None
            self._epoch += 1
            run.give_up(reason)
            self._drop_connection(abort=True)
            idle = self.lane.submit(lambda: None)
            if not wait((idle,), timeout=_GRACE_SECONDS).done:
                # Stuck in the transport, where it can do no harm: the run's check stops it before it writes.
                self.lane.close()
                self.lane = Lane("wavecast-transfer")

    def close(self) -> None:
        """Release everything. The session must not be used again."""
        with self._lock:
            if self.run is not None:
                self.run.give_up("the group was closed")

            self.run = None
            self._program = None
            self._buckets = {}
            self._stores.clear()
            self._drop_connection(abort=False)
            self.lane.close()

    # Connection and program.

    def host_store(self, request: HostStore, address: str) -> int:
        """Open the rendezvous of a connection and return its port."""
        store, port = host_store(address, seconds=request.seconds)
        self._stores = {request.connection: store}
        return port

    def connect(self, request: Connect, address: str) -> Future[Reply]:
        """Build this actor's end of a connection on the lane."""
        epoch = self._epoch
        return self.lane.submit(lambda: self._connect(request, address, epoch))

    def load(self, program: Program) -> None:
        """Take on a program. On the lane."""
        self._program = program
        self._buckets = {}
        if self.run is not None:
            self.run.addressed = None

        sends = any(step.sender == program.actor for step in program.steps)
        self._forwards = sends and any(program.actor in step.receivers for step in program.steps)
        self._allocate()

    def memory_of(self, run: Run) -> Memory:
        """Return the run's memory, found by the names that the program's cuts have. On the lane."""
        if self._program is not None and run.addressed is None:
            run.addressed = run.memory.under(self._program.renames)

        return run.addressed or run.memory

    def buckets_of(self, step: int) -> tuple[Bucket, ...]:
        """Return how the bytes of a step travel."""
        program = self._program
        if program is None:
            raise errors.SyncError("the actor has no program")

        if step not in self._buckets:
            self._buckets[step] = fill_buckets(program.steps[step].cuts, bucket_bytes=program.bucket_bytes)

        return self._buckets[step]

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
        """Meet the other members at the store, and return this actor's end. The one place where they meet."""
        store = self._stores.pop(request.connection, None)
        if store is None:
            store = join_store(request.host, request.port, seconds=deadline.left)

        rendezvous = Rendezvous(
            store,
            key=request.connection,
            host=address,
            rank=request.rank,
            size=request.size,
            groups=request.groups,
            edges=request.edges,
            deadline=deadline,
        )
        return NcclCommunicator(rendezvous, device) if request.transport == "nccl" else GlooCommunicator(rendezvous)

    def _allocate(self) -> None:
        """Hold two buckets, no larger than the largest that the program fills."""
        self._staging = None
        if self._communicator is None or self._program is None:
            return

        steps = range(len(self._program.steps))
        largest = max((bucket.nbytes for step in steps for bucket in self.buckets_of(step)), default=0)
        self._staging = Staging(largest, self._communicator)

    def _drop_connection(self, *, abort: bool) -> None:
        communicator, self._communicator = self._communicator, None
        self._staging = None
        if communicator is not None:
            if abort:
                communicator.abort()
            else:
                communicator.close()

    # Steps.

    def _step(self, run: Run, request: RunStep) -> Reply:
        deadline = Deadline(request.seconds)
        started = deadline.left
        run.check()
        program, staging = self._program, self._staging
        if program is None or staging is None:
            raise errors.SyncError("the actor was asked to run before it was connected and had its program")

        if program.digest != request.digest:
            raise errors.SyncError(f"the actor has program {program.digest}, it was asked to run {request.digest}")

        step = program.steps[request.step]
        sums = run.sums.setdefault(request.step, []) if program.checksum else None
        if request.step == 0:
            staging.begin(run.ready)

        leg = Leg(
            sender=step.sender,
            receivers=step.receivers,
            buckets=self.buckets_of(request.step),
            ahead=self._ahead(request.step, run, program),
            forwards=self._forwards,
            memory=self.memory_of(run),
            sums=sums,
            deadline=deadline,
            check=run.check,
        )
        if run.actor == step.sender:
            staging.send(leg)
        else:
            run.wrote = True
            staging.receive(leg)

        return StepDone(started - deadline.left)

    def _ahead(self, step: int, run: Run, program: Program) -> Bucket | None:
        """Return the first bucket of the next step, when this actor sends it and had all of it from the start."""
        following = step + 1
        if self._forwards or following == len(program.steps) or program.steps[following].sender != run.actor:
            return None

        buckets = self.buckets_of(following)
        return buckets[0] if buckets else None


def _chain(inner: Future[Reply], outer: Future[Reply]) -> None:
    def pass_on(done: Future[Reply]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        else:
            outer.set_exception(error)

    inner.add_done_callback(pass_on)
