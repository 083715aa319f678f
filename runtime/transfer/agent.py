"""The actor's half of a group: answers requests, whatever hosts the actor."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

import torch

from wavecast.runtime import errors
from wavecast.runtime.layout.shard import Layout, Place, Shard, describe
from wavecast.runtime.transfer.checksum import combine
from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, MoveTimeout
from wavecast.runtime.transfer.comm_torch import GlooCommunicator, NcclCommunicator, Rendezvous, host_store, join_store
from wavecast.runtime.transfer.compare import compare_step, read_step
from wavecast.runtime.transfer.lane import Lane
from wavecast.runtime.transfer.memory import Memory, count_nan
from wavecast.runtime.transfer.messages import (
    Abort,
    Began,
    Begin,
    Close,
    Commit,
    Compare,
    Connect,
    Connected,
    Describe,
    Described,
    Done,
    Excerpt,
    Failure,
    Finish,
    Finished,
    HostStore,
    Load,
    Probe,
    Reply,
    Request,
    RunStep,
    StepDone,
    StoreAddress,
)
from wavecast.runtime.transfer.program import Bucket, Program, fill_buckets
from wavecast.runtime.transfer.staging import Leg, Staging

__all__ = ("Agent", "Host")

#: How often a blocked call looks whether the driver has given up on it.
_LOOK_SECONDS = 0.01
#: How long an abort waits for the transfer thread before it leaves it behind.
_GRACE_SECONDS = 0.3


class Host(Protocol):
    """What the agent must know of whatever runs its actor. Sent along with each request."""

    def cancelled(self) -> bool:
        """Tell whether the driver has cancelled the call that is running. Called on the calling thread."""
        ...

    def node(self) -> str:
        """Return the node's id."""
        ...

    def address(self) -> str:
        """Return the node's own address, as other nodes reach it."""
        ...


class _Run:
    """One sync, as one actor sees it."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name = name
        self.memory = memory
        self.next_step = 0
        self.waiting: dict[int, tuple[RunStep, Future[Reply]]] = {}
        self.given_up = ""
        self.sums: dict[int, list[torch.Tensor]] = {}
        self.ready: torch.cuda.Event | None = None
        if memory.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(memory.device))

    def check(self) -> None:
        """Raise once the run has been given up."""
        if self.given_up:
            raise errors.SyncAborted(self.given_up)


class Agent:
    """
    Everything an actor keeps for its groups: shards, program, staging memory, connection, version.

    Requests may come on several threads. What moves bytes runs on one thread of the agent's own, so that the calling
    thread can notice a cancelled call and end it.

    :param shards: the user's hook; called at the begin of each run, on the thread of the request
    """

    def __init__(self, shards: Callable[[], Sequence[Shard]]) -> None:
        self._shards = shards
        self._lock = threading.RLock()
        self._lane = Lane("wavecast-transfer")
        self._run: _Run | None = None
        self._layout = Layout(())
        self._signature: tuple[object, ...] | None = None
        self._digest = ""
        self._program: Program | None = None
        self._forwards = False
        self._buckets: dict[int, tuple[Bucket, ...]] = {}
        self._communicator: Communicator | None = None
        self._staging: Staging | None = None
        self._stores: dict[str, object] = {}
        self._epoch = 0
        self._actor = -1
        self.version: int | None = None
        self.torn = False

    def serve(self, request: Request, host: Host, attachment: object = None) -> Reply:
        """Answer ``request``, blocking. A cancelled call gives up its run and returns within the grace time."""
        try:
            future = self._start(request, host, attachment)
            while not future.done():
                wait((future,), timeout=_LOOK_SECONDS)
                if not future.done() and host.cancelled():
                    self._give_up(request, "the driver cancelled the call")
                    return Failure("SyncAborted", "the driver cancelled the call")

            return future.result()
        except Exception as error:
            return self._failed(request, error)

    async def serve_async(self, request: Request, host: Host, attachment: object = None) -> Reply:
        """Answer ``request`` on an actor's event loop, without blocking it while bytes move."""
        try:
            future = self._start(request, host, attachment)
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._give_up(request, "the driver cancelled the call")
            raise
        except Exception as error:
            return self._failed(request, error)

    def _start(self, request: Request, host: Host, attachment: object) -> Future[Reply]:
        match request:
            case RunStep():
                return self._enqueue(request)
            case Connect():
                epoch = self._epoch
                return self._lane.submit(lambda: self._connect(request, host, epoch))
            case Load():
                return self._lane.submit(lambda: self._load(request.program.unpack()))
            case Finish():
                return self._lane.submit(lambda: self._finish(request))
            case Probe():
                return self._lane.submit(lambda: self._probe(request))
            case Compare():
                return self._lane.submit(lambda: self._compare(request, attachment))
            case _:
                future: Future[Reply] = Future()
                future.set_result(self._answer(request, host))
                return future

    def _answer(self, request: Request, host: Host) -> Reply:
        match request:
            case Begin():
                return self._begin(request, host)
            case Describe():
                self._current(request.run)
                return Described.of(self._layout)
            case HostStore():
                store, port = host_store(host.address(), seconds=request.seconds)
                self._stores = {request.connection: store}
                return StoreAddress(host.address(), port)
            case Commit():
                return self._commit(request)
            case Abort():
                self._give_up(request, request.reason)
                return Done()
            case Close():
                return self._close()
            case _:
                raise TypeError(f"{type(request).__name__} is not a request")

    def _failed(self, request: Request, error: Exception) -> Failure:
        """Turn an exception into an answer. A failed transport is dropped: its other members get the same."""
        if isinstance(request, RunStep | Finish | Connect):
            self._give_up(request, f"{type(error).__name__}: {error}")

        return _failure(error)

    # Runs.

    def _begin(self, request: Begin, host: Host) -> Began:
        shards = list(self._shards())
        for shard in shards:
            if not isinstance(shard, Shard):
                raise errors.LayoutError(
                    f"transfer_shards() must return Shard values, got {type(shard).__name__}", actors=(request.actor,)
                )

        memory = Memory(shards)
        place = Place(host.node(), _device_name(memory.device))
        with self._lock:
            if memory.signature != self._signature:
                self._signature = memory.signature
                self._layout = describe(shards)
                self._digest = _digest(self._layout)

            self._actor = request.actor
            self._run = _Run(request.run, memory)

        return Began(
            digest=self._digest,
            place=place,
            nan=count_nan(shards) if request.scan else (),
            version=self.version,
            torn=self.torn,
        )

    def _enqueue(self, request: RunStep) -> Future[Reply]:
        """Hand the step to the transfer thread as soon as all steps before it have been handed over."""
        future: Future[Reply] = Future()
        with self._lock:
            run = self._current(request.run)
            run.check()
            run.waiting[request.step] = (request, future)
            while run.next_step in run.waiting:
                ready, outer = run.waiting.pop(run.next_step)
                run.next_step += 1
                _chain(self._lane.submit(lambda ready=ready: self._step(run, ready)), outer)  # type: ignore[misc]

        return future

    def _step(self, run: _Run, request: RunStep) -> Reply:
        deadline = Deadline(request.seconds)
        started = deadline.left
        run.check()
        program, staging = self._program, self._staging
        if program is None or staging is None:
            raise errors.SyncError("the actor was asked to run before it was connected and had its program")

        if program.digest != request.digest:
            raise errors.SyncError(f"the actor has program {program.digest}, it was asked to run {request.digest}")

        step = program.steps[request.step]
        sends = self._actor == step.sender
        sums = run.sums.setdefault(request.step, []) if program.checksum else None
        if request.step == 0:
            staging.begin(run.ready)

        leg = Leg(
            sender=step.sender,
            receivers=step.receivers,
            buckets=self._buckets_of(request.step, program),
            ahead=self._ahead(request.step, program),
            forwards=self._forwards,
            memory=run.memory,
            sums=sums,
            deadline=deadline,
            check=run.check,
        )
        if sends:
            staging.send(leg)
        else:
            self.torn = True
            staging.receive(leg)

        return StepDone(started - deadline.left)

    def _ahead(self, step: int, program: Program) -> Bucket | None:
        """Return the first bucket of the next step, when this actor sends it and had all of it from the start."""
        following = step + 1
        if self._forwards or following == len(program.steps) or program.steps[following].sender != self._actor:
            return None

        buckets = self._buckets_of(following, program)
        return buckets[0] if buckets else None

    def _finish(self, request: Finish) -> Finished:
        run = self._current(request.run)
        if self._staging is None:
            return Finished((), 0)

        self._staging.finish(Deadline(request.seconds))
        run.check()
        checksums = [combine([int(value) for value in run.sums[step]]) for step in sorted(run.sums)]
        return Finished(tuple(checksums), self._staging.nbytes)

    def _commit(self, request: Commit) -> Done:
        with self._lock:
            self._current(request.run).check()
            self.version = request.version
            self.torn = False
            self._run = None

        return Done()

    def _give_up(self, request: Request, reason: str) -> None:
        """End the request's run at once: nothing is written after this returns. A later run is left alone."""
        with self._lock:
            run = self._run
            if run is None or getattr(request, "run", run.name) != run.name:
                return

            self._run = None
            self._epoch += 1
            run.given_up = reason
            for _, future in run.waiting.values():
                future.set_exception(errors.SyncAborted(reason))
            run.waiting.clear()

            self._drop_connection(abort=True)
            idle = self._lane.submit(lambda: None)
            if not wait((idle,), timeout=_GRACE_SECONDS).done:
                # Stuck in the transport, where it can do no harm: the run's check stops it before it writes.
                self._lane.close()
                self._lane = Lane("wavecast-transfer")

    # Connection and program.

    def _connect(self, request: Connect, host: Host, epoch: int) -> Connected:
        deadline = Deadline(request.seconds)
        started = deadline.left
        device = self._device()
        self._drop_connection(abort=False)
        store = self._stores.pop(request.connection, None)
        if store is None:
            store = join_store(request.host, request.port, seconds=deadline.left)

        if not isinstance(store, torch.distributed.Store):
            raise TypeError(f"{type(store).__name__} is not a store")

        rendezvous = Rendezvous(
            store,
            key=request.connection,
            host=host.address(),
            rank=request.rank,
            size=request.size,
            groups=request.groups,
            edges=request.edges,
            deadline=deadline,
        )
        if request.transport == "nccl":
            communicator: Communicator = NcclCommunicator(rendezvous, device)
        else:
            communicator = GlooCommunicator(rendezvous)

        with self._lock:
            if epoch != self._epoch:
                communicator.abort()
                raise errors.SyncAborted("the connection was given up while it was made")

            self._communicator = communicator
            self._allocate()

        return Connected(started - deadline.left, communicator.device_bytes)

    def _load(self, program: Program) -> Done:
        self._program = program
        self._forwards = any(
            step.sender == program.actor and step.receivers != (program.actor,) for step in program.steps
        ) and any(program.actor in step.receivers for step in program.steps)
        self._buckets = {}
        self._allocate()
        return Done()

    def _allocate(self) -> None:
        """Hold two buckets, no larger than the largest that the program fills."""
        self._staging = None
        if self._communicator is None or self._program is None:
            return

        program = self._program
        largest = max(
            (bucket.nbytes for step in range(len(program.steps)) for bucket in self._buckets_of(step, program)),
            default=0,
        )
        self._staging = Staging(largest, self._communicator)

    def _buckets_of(self, step: int, program: Program) -> tuple[Bucket, ...]:
        if step not in self._buckets:
            self._buckets[step] = fill_buckets(program.steps[step].cuts, bucket_bytes=program.bucket_bytes)

        return self._buckets[step]

    def _drop_connection(self, *, abort: bool) -> None:
        communicator, self._communicator = self._communicator, None
        self._staging = None
        if communicator is not None:
            if abort:
                communicator.abort()
            else:
                communicator.close()

    def _close(self) -> Done:
        with self._lock:
            self._run = None
            self._program = None
            self._buckets = {}
            self._stores.clear()
            self._drop_connection(abort=False)

        return Done()

    # Validation.

    def _probe(self, request: Probe) -> Excerpt:
        run = self._current(request.run)
        return Excerpt(read_step(self._program_step(request.step), run.memory))

    def _compare(self, request: Compare, attachment: object) -> Reply:
        run = self._current(request.run)
        if isinstance(attachment, Failure):
            return attachment

        if not isinstance(attachment, Excerpt):
            raise TypeError(f"expected the sender's excerpt, got {type(attachment).__name__}")

        return Done(compare_step(self._program_step(request.step), run.memory, attachment.data))

    def _program_step(self, step: int) -> tuple[Bucket, ...]:
        if self._program is None:
            raise errors.SyncError("the actor has no program")

        return self._buckets_of(step, self._program)

    # Small things.

    def _current(self, name: str) -> _Run:
        if self._run is None or self._run.name != name:
            raise errors.SyncAborted("the run is no longer current on this actor")

        return self._run

    def _device(self) -> torch.device:
        if self._run is None:
            raise errors.SyncError("no run has begun on this actor")

        return self._run.memory.device


def _chain(inner: Future[Reply], outer: Future[Reply]) -> None:
    def pass_on(done: Future[Reply]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        else:
            outer.set_exception(error)

    inner.add_done_callback(pass_on)


def _failure(error: Exception) -> Failure:
    kind = "ActorFailed"
    if isinstance(error, errors.WavecastError):
        kind = type(error).__name__
    elif isinstance(error, MoveTimeout):
        kind = "SyncTimeout"
    elif isinstance(error, CommunicatorError) and "abort" in str(error):
        kind = "SyncAborted"

    message = (
        str(error)
        if isinstance(error, (errors.WavecastError, CommunicatorError))
        else f"{type(error).__name__}: {error}"
    )
    return Failure(kind, message, "".join(traceback.format_exception(error)), getattr(error, "tensor", ""))


def _digest(layout: Layout) -> str:
    summary = hashlib.sha256()
    for piece in layout.pieces:
        summary.update(repr(piece).encode())

    return summary.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type

    return str(torch.cuda.get_device_properties(device).uuid)
