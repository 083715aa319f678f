"""
GPUs made of host memory, one an actor, for whole groups in one process: pulls, bells and sums from end to end.

Every actor has a device of its own with a stream that its caller works on, and threads of its own that queue on others.
What is queued is kept until somebody asks for it, and then done in the most awkward order that the events allow.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.runtime.local_actors import ELEMENTS, Answer, Holder, LocalActor, Stage, StorelessSession, holder
from tests.runtime.transfer.crew import ThreadHost, Wires
from tests.runtime.transfer.host_device import UNITS_PER_TILE, Exporter, allocation_of, walk
from wavecast.runtime.errors import TransportUnavailable
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer import (
    arrivals,
    board,
    fused,
    holding,
    lending,
    mapped,
    pull,
    run,
    runs,
    shadow,
    staging,
    tables,
)
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.comm import Communicator, CudaFence, Deadline, Fence, Move
from wavecast.runtime.transfer.futures import Promise
from wavecast.runtime.transfer.holding import Holding
from wavecast.runtime.transfer.hooks import Hook
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.messages import (
    CloseRun,
    Commit,
    Committed,
    Connect,
    Reply,
    Request,
    RunStep,
    Standing,
    decode,
    encode,
)
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.runs import Runs
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.shadow import Shadow
from wavecast.runtime.transfer.tables import Table
from wavecast.runtime.transfer.weights import Weights
from wavecast.runtime.transfer.worker import overridden_hooks

CPU = torch.device("cpu")


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.machine = gpu.machine
        self.work: deque[Callable[[], bool]] = deque()
        self.cuda_stream = id(self)
        with self.machine.changed:
            self.machine.streams.append(self)

    def put(self, job: Callable[[], object]) -> None:
        def run() -> bool:
            job()
            return True

        self.put_waiting(run)

    def put_waiting(self, job: Callable[[], bool]) -> None:
        """Queue what is over once it returns true, and until then holds up what follows."""
        with self.machine.changed:
            self.gpu.queued += 1
            self.work.append(job)
            self.machine.changed.notify_all()

    def wait_event(self, event: Event) -> None:
        ticket = event.ticket
        self.put_waiting(lambda: ticket is None or ticket[0])

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def put_late(self, job: Callable[[], object]) -> None:
        """
        Queue what takes as long as it can: until somebody waits for a stream of this device that is held up, or
        something of it travels.
        """
        gate = [False]
        self.gpu.late.append(gate)
        self.put_waiting(lambda: gate[0])
        self.put(job)

    def synchronize(self) -> None:
        with self.machine.changed:
            self.machine.changed.wait_for(self._is_through)

    def _is_through(self) -> bool:
        self.machine.advance()
        if self.work:
            self.gpu.let_go()

        return not self.work


class Event:
    """Without a record it holds nobody up."""

    def __init__(self) -> None:
        self.ticket: list[bool] | None = None
        self.machine: Machine | None = None

    def record(self, stream: Stream) -> None:
        ticket = self.ticket = [False]
        self.machine = stream.machine

        def done() -> None:
            ticket[0] = True

        stream.put(done)

    def query(self) -> bool:
        if self.machine is not None:
            self.machine.advance()

        return self.ticket is None or self.ticket[0]


class Gpu:
    """
    Stands for a :class:`torch.device`.

    :ivar default: the stream of the actor's own work
    :ivar queued: how much has been queued on its streams so far
    :ivar late: gates of what takes as long as it can
    """

    type = "cuda"

    def __init__(self, machine: Machine, index: int) -> None:
        self.machine = machine
        self.index = index
        self.queued = 0
        self.late: list[list[bool]] = []
        self.default = Stream(self)

    def let_go(self) -> None:
        """Let what takes long come to its end."""
        with self.machine.changed:
            while self.late:
                self.machine.open_gate(self.late.pop())

            self.machine.advance()


class DeviceTensor(torch.Tensor):
    """What is written to it is queued on its device's current stream."""

    gpu: Gpu

    def fill_(self, value: int) -> DeviceTensor:  # type: ignore[override]
        plain = self.as_subclass(torch.Tensor)
        self.gpu.machine.current_stream(self.gpu).put(lambda: plain.fill_(value))
        return self

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> DeviceTensor:
        plain, read = self.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor)
        self.gpu.machine.current_stream(self.gpu).put(lambda: plain.copy_(read))
        return self

    def record_stream(self, stream: object) -> None:  # type: ignore[override]
        # There is no allocator here that knows when a stream is through with it.
        self.gpu.machine.kept.append(self)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return on_device(self.as_subclass(torch.Tensor)[index], self.gpu)


def on_device(tensor: torch.Tensor, gpu: Gpu) -> DeviceTensor:
    found = tensor.as_subclass(DeviceTensor)
    found.gpu = gpu
    return found


def _first_address(handle: bytes) -> int:
    """Return where the page behind ``handle`` begins."""
    return int.from_bytes(handle[:8], "little") << 16


class Machine:
    """
    The GPUs of one test.

    :ivar changed: guards all that is queued
    :ivar opened: how often each handle is open now, by the device that opened it
    :ivar remade: how often each page was freed and allocated anew
    :ivar refused: devices that can map nothing
    :ivar reads: address and bytes of each copy that was made
    :ivar on_copy: called after a copy, on the stream, with the address that was written
    :ivar on_listen: called with a device's number and an address when it looks at another's board
    :ivar strays: looks at boards that were not mapped
    :ivar kept: what a stream may still write to
    """

    def __init__(self, *, backwards: bool) -> None:
        self.changed = threading.Condition()
        self.streams: list[Stream] = []
        self.gpus: list[Gpu] = []
        self.opened: Counter[tuple[int, bytes]] = Counter()
        self.remade: Counter[int] = Counter()
        self.refused: set[int] = set()
        self.reads: list[tuple[int, int]] = []
        self.on_copy: Callable[[int], object] = lambda address: None
        self.on_listen: Callable[[int, int], object] = lambda gpu, address: None
        self.strays: list[tuple[int, int]] = []
        self.kept: list[torch.Tensor] = []
        self._backwards = backwards
        self._here = threading.local()

    def gpu(self) -> Gpu:
        """Return one more device."""
        self.gpus.append(Gpu(self, len(self.gpus)))
        return self.gpus[-1]

    def advance(self) -> bool:
        """Do all that may be done by now, one stream as far as it goes."""
        with self.changed:
            going = True
            while going:
                going = False
                for stream in reversed(self.streams) if self._backwards else self.streams:
                    while stream.work and stream.work[0]():
                        stream.work.popleft()
                        going = True

                    if going:
                        self.changed.notify_all()
                        break

        return True

    def open_gate(self, gate: list[bool]) -> None:
        """Let a stream go on that waits for ``gate``."""
        with self.changed:
            gate[0] = True
            self.changed.notify_all()

    # What stands for torch.cuda.

    def make_current(self, index: int) -> None:
        self._here.index = index

    def here(self) -> int:
        """The current device's number."""
        return int(self._here.index)

    def current_stream(self, device: object = None) -> Stream:
        used: list[Stream] = getattr(self._here, "used", [])
        if used:
            return used[-1]

        return device.default if isinstance(device, Gpu) else self.gpus[self._here.index].default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        used = self._here.__dict__.setdefault("used", [])
        used.append(stream)
        try:
            yield
        finally:
            used.pop()

    # What stands for the driver's calls and the kernels.

    def open_memory(self, handle: bytes) -> int:
        if self._here.index in self.refused:
            raise TransportUnavailable("cuIpcOpenMemHandle failed with CUDA_ERROR_INVALID_CONTEXT (201)")

        with self.changed:
            self.opened[self._here.index, handle] += 1

        return _first_address(handle)

    def identity_of(self, address: int) -> int:
        return 1 + self.remade[address >> 16]

    def remake(self, tensor: torch.Tensor) -> None:
        """Free ``tensor`` and allocate it anew at the same address: what others have mapped is the old memory."""
        first, last = tensor.data_ptr() >> 16, (tensor.data_ptr() + tensor.nbytes - 1) >> 16
        self.remade.update(range(first, last + 1))

    def stale(self) -> list[int]:
        """The pages that are mapped by what they were before."""
        return [
            _first_address(handle)
            for (_, handle), count in self.opened.items()
            if count and int.from_bytes(handle[-8:], "little") != self.identity_of(_first_address(handle))
        ]

    def close_memory(self, handle: bytes) -> None:
        with self.changed:
            self.opened[self._here.index, handle] -= 1
            assert self.opened[self._here.index, handle] >= 0

    def read_async(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.on_listen(self._here.index, source)
        # A board is smaller than a page, and may begin in the one before.
        pages = (source >> 16 << 16, (source >> 16) - 1 << 16)
        with self.changed:
            mapped = any(
                count and gpu == self._here.index and _first_address(handle) in pages
                for (gpu, handle), count in self.opened.items()
            )

        if not mapped:
            self.strays.append((self._here.index, source))

        # Looking is a tight loop: others may want the lock.
        time.sleep(0)
        self._stream_of(stream).put(lambda: ctypes.memmove(target, source, nbytes))

    def fetch(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._stream_of(stream).put(lambda: ctypes.memmove(target, source, nbytes))

    def write_word(self, address: int, value: int, stream: int) -> None:
        self._stream_of(stream).put(
            functools.partial(ctypes.memmove, address, value.to_bytes(8, "little", signed=True), 8)
        )

    def clear_words(self, address: int, count: int, stream: int) -> None:
        self._stream_of(stream).put(functools.partial(ctypes.memset, address, 0, 8 * count))

    def copy(self, copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        for target, source, nbytes in copies:
            self._stream_of(stream).put(functools.partial(self._copy, target, source, nbytes))

    def launch(
        self, table: Table, source: int, target: int, total: torch.Tensor, mode: str, warps: int, share: float
    ) -> None:
        plain = total.as_subclass(torch.Tensor)

        def work() -> None:
            walk(table, source, target, plain, mode)
            if mode.startswith("COPY"):
                for row in table.rows.tolist():
                    self.reads.append((source + row[0], ((row[2] - 1) * row[4] + row[3]) * table.unit))
                    self.on_copy(target + row[1])

        self.current_stream().put(work)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)
        self.reads.append((source, nbytes))
        self.on_copy(target)

    def _stream_of(self, number: int) -> Stream:
        with self.changed:
            (found,) = [each for each in self.streams if each.cuda_stream == number]
            return found


class GpuTorch:
    """torch, but for its CUDA."""

    def __init__(self, machine: Machine) -> None:
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            stream=machine.stream,
            current_stream=machine.current_stream,
            current_device=machine.here,
            is_available=lambda: False,
            get_device_properties=lambda gpu: SimpleNamespace(uuid=f"GPU-{gpu.index}"),
        )

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def zeros(*sizes: object, device: object = None, pin_memory: bool = False, dtype: torch.dtype) -> torch.Tensor:
        found = torch.zeros(*sizes, dtype=dtype)  # type: ignore[call-overload]
        return on_device(found, device) if isinstance(device, Gpu) else found

    @staticmethod
    def empty(*sizes: object, device: object = None, pin_memory: bool = False, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype)  # type: ignore[call-overload, no-any-return]

    @staticmethod
    def _foreach_copy_(targets: list[torch.Tensor], sources: list[torch.Tensor], non_blocking: bool = False) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=non_blocking)


def install(monkeypatch: pytest.MonkeyPatch, *, backwards: bool = False) -> Machine:
    """Put host memory in the place of GPUs'."""
    machine = Machine(backwards=backwards)
    monkeypatch.setitem(
        sys.modules, "wavecast.runtime.transfer.kernels", cast("Any", SimpleNamespace(UNITS_PER_TILE=UNITS_PER_TILE))
    )
    for module in (board, fused, holding, pull, run, shadow, staging):
        monkeypatch.setattr(module, "torch", GpuTorch(machine))

    class Owned(Exporter):
        """Each actor lends pages of its own: here two actors' tensors may lie in one."""

        def handle_of(self, page: int) -> bytes:
            owner, made = machine.here(), machine.identity_of(page << 16)
            return super().handle_of(page) + owner.to_bytes(8, "little") + made.to_bytes(8, "little")

    lay_down = tables._table
    monkeypatch.setattr(tables, "_table", lambda segments, unit, tile, device: lay_down(segments, unit, tile, CPU))
    monkeypatch.setattr(tables, "_launch", machine.launch)
    # A flip copies between these.
    monkeypatch.setattr(shadow, "as_bits", lambda view: on_device(as_bits(view), machine.gpus[machine.here()]))
    monkeypatch.setattr(runs, "has_kernels", lambda: True)
    monkeypatch.setattr(runs, "warm_up", lambda device: None)
    monkeypatch.setattr(fused, "read_async", machine.fetch)
    monkeypatch.setattr(lending, "Exporter", Owned)
    monkeypatch.setattr(lending, "make_current", machine.make_current)
    monkeypatch.setattr(mapped, "identity_of", machine.identity_of)
    monkeypatch.setattr(mapped, "ensure_current", lambda index: None)
    monkeypatch.setattr(arrivals, "allocation_of", allocation_of)
    for name in ("make_current", "open_memory", "close_memory"):
        monkeypatch.setattr(pull, name, getattr(machine, name))

    for name in ("make_current", "read_async", "write_word", "clear_words"):
        monkeypatch.setattr(board, name, getattr(machine, name))

    class CopyBatch:
        def __init__(self, copies: Sequence[tuple[int, int, int]]) -> None:
            self.start = functools.partial(machine.copy, copies)

    monkeypatch.setattr(arrivals, "CopyBatch", CopyBatch)
    return machine


# Actors on them.


class StreamedCommunicator:
    """A communicator of this process's that comes after what the current stream holds."""

    device_bytes = 1000
    exports = False

    def __init__(self, inner: Communicator, gpu: Gpu) -> None:
        self.rank = inner.rank
        self.device = cast("torch.device", gpu)
        self._inner = inner
        self._machine = gpu.machine
        self._aborted = False

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        self._machine.current_stream().synchronize()
        move = self._inner.start(buffer, sender=sender, receivers=receivers, deadline=deadline)
        cast("Gpu", self.device).let_go()
        return move

    def fence(self) -> Fence:
        event = Event()
        event.record(self._machine.current_stream())
        return CudaFence(cast("torch.cuda.Event", event), lambda: self._aborted)

    def abort(self) -> None:
        self._aborted = True
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


class GpuSession(StorelessSession):
    def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        return StreamedCommunicator(super()._join(request, address, device, deadline), cast("Gpu", device))


class GpuHolding(Holding):
    """Takes its shards for a device's memory."""

    def __init__(self, hook: Callable[[], Sequence[Shard]], gpu: Gpu) -> None:
        super().__init__(hook)
        self._gpu = gpu

    def read(self, actor: int, *, in_haste: bool = False) -> Memory:
        return placed(super().read(actor, in_haste=in_haste), self._gpu)


class GpuWeights(Weights):
    """Takes the second copy of its shards for a device's memory."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def _second_copy(self, live: Memory) -> Shadow:
        copy = super()._second_copy(live)
        placed(copy.memory, self._gpu)
        return copy

    def _flip(self, run: Run) -> float:
        # An actor's process has no other GPU.
        self._gpu.machine.make_current(self._gpu.index)
        return super()._flip(run)


def placed(memory: Memory, gpu: Gpu) -> Memory:
    memory.device = cast("torch.device", gpu)
    return memory


class GpuRuns(Runs):
    """
    Tells of what happens.

    :ivar commits: the versions of its commits, whoever asked for them
    :ivar on_commit: called after each
    :ivar on_early: called while steps wait for their begin
    :ivar on_step: called with each step that was asked for, before it is taken up
    :ivar on_let_close: called in a begin, before its steps start
    """

    on_commit: Callable[[], object] = staticmethod(lambda: None)
    on_early: Callable[[], object] = staticmethod(lambda: None)
    on_step: Callable[[], object] = staticmethod(lambda: None)
    on_let_close: Callable[[], object] = staticmethod(lambda: None)

    @functools.cached_property
    def commits(self) -> list[int | None]:
        return []

    def commit(self, session: Session, request: Commit) -> Committed:
        reply = super().commit(session, request)
        self.commits.append(request.version)
        self.on_commit()
        return reply

    def _let_close(self, session: Session, run: Run, close: CloseRun, before: Standing, *, idle: bool) -> None:
        self.on_let_close()
        super()._let_close(session, run, close, before, idle=idle)

    def step(self, request: RunStep) -> Promise[Reply]:
        self.on_step()
        reply = super().step(request)
        if self._early:
            self.on_early()

        return reply


class GpuAgent(Agent):
    """An agent of a process with a GPU."""

    def __init__(
        self, shards: Callable[[], Sequence[Shard]], *, gpu: Gpu, hooks: dict[str, Hook], wires: Wires
    ) -> None:
        super().__init__(shards, hooks=hooks)
        self._holding: GpuHolding = GpuHolding(shards, gpu)
        self._weights: GpuWeights = GpuWeights(gpu)
        self._runs: GpuRuns = GpuRuns(self._holding, self._weights, self._hooks, make_session=lambda: GpuSession(wires))

    def place(self, gpu: Gpu) -> None:
        """Take what is held from now on for memory of ``gpu``."""
        self._holding._gpu = self._weights._gpu = gpu


class GpuActor(LocalActor):
    """
    A handle of an actor with a GPU.

    :ivar held: requests of these kinds are not served before their event is set
    :ivar log: of all actors of a stage: "asked" or "answered", the actor's device and the request's name
    :param pool: threads on which requests are served, as on a threaded actor; ``None``: on the event loop
    """

    def __init__(self, worker: Holder, wires: Wires, gpu: Gpu, log: Log, pool: ThreadPoolExecutor | None) -> None:
        super().__init__(worker, wires)
        self.gpu = gpu
        self.log = log
        self.held: dict[type[Request], asyncio.Event] = {}
        self._pool = pool
        self.agent: GpuAgent = GpuAgent(worker.transfer_shards, gpu=gpu, hooks=overridden_hooks(worker), wires=wires)

    def move_to(self, gpu: Gpu) -> None:
        """Hold the same in new memory, on another device."""
        worker = kept(self)
        worker.matrix, worker.scale, worker.kept = worker.matrix.clone(), worker.scale.clone(), None
        self.gpu = gpu
        self.agent.place(gpu)

    def remote(self, call: bytes, *attachments: Answer) -> Answer:
        request, _ = cast("tuple[Request, object]", decode(call))
        name = type(request).__name__
        self.log.append(("asked", self.gpu.index, name))
        answer = super().remote(call, *attachments)
        answer.found.add_done_callback(lambda done: self.log.append(("answered", self.gpu.index, name)))
        return answer

    async def _serve(self, request: Request, host: ThreadHost, attachments: Sequence[Answer]) -> bytes:
        if type(request) in self.held:
            await self.held[type(request)].wait()

        if self._pool is None:
            return await super()._serve(request, host, attachments)

        found = [decode(await attachment) for attachment in attachments]
        try:
            reply = await asyncio.get_running_loop().run_in_executor(
                self._pool, functools.partial(self.agent.serve, request, host, *found)
            )
        except asyncio.CancelledError:
            host.ended = True
            raise

        return encode(reply)


class Log(list[tuple[str, int, str]]):
    """What actors were asked and when they answered, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._wanted: list[tuple[tuple[str, int, str], asyncio.Event]] = []
        self._growing = asyncio.Event()

    def append(self, entry: tuple[str, int, str]) -> None:
        super().append(entry)
        growing, self._growing = self._growing, asyncio.Event()
        growing.set()
        for wanted, found in self._wanted:
            if wanted == entry:
                found.set()

    async def grown(self) -> None:
        """Wait for the next entry."""
        await self._growing.wait()

    def wait_for(self, entry: tuple[str, int, str]) -> asyncio.Event:
        """Return what is set once there is such an entry."""
        found = asyncio.Event()
        self._wanted.append((entry, found))
        if entry in self:
            found.set()

        return found


class Kept(Holder):
    """Returns the same shards while its tensors are the same objects, as users are told to."""

    kept: list[Shard] | None = None

    def transfer_shards(self) -> Sequence[Shard]:
        if self.kept is None:
            self.kept = [*super().transfer_shards()]

        return self.kept

    def hold(self, first: int, rows: int) -> None:
        """Hold other rows, in new memory."""
        self.first, self.matrix, self.kept = first, torch.zeros(rows, ELEMENTS), None


def kept(actor: LocalActor) -> Kept:
    assert isinstance(actor.worker, Kept)
    return actor.worker


class GpuStage(Stage):
    """
    Trainers with equal shares of four rows, and replicas of two engines with two rows each; a device an actor.

    :ivar whole: what the trainers hold, as bits
    :ivar log: what actors were asked and when they answered
    """

    def __init__(
        self,
        machine: Machine,
        *,
        trainers: int = 2,
        replicas: int = 1,
        kind: Callable[..., Holder] = Kept,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        self.wires = Wires()
        self.kind = kind
        self.machine = machine
        self.pool = pool
        self.log = Log()
        rows = 4 // trainers
        self.trainers = [self.actor(rows * rank, rows=rows) for rank in range(trainers)]
        self.replicas = [self.replica() for _ in range(replicas)]
        self.renew(0)

    def actor(self, first: int, *, rows: int = 2, value: float = 0.0) -> LocalActor:
        return GpuActor(self.kind(first, rows, 4, value), self.wires, self.machine.gpu(), self.log, self.pool)

    def renew(self, seed: int, *, finite: bool = False) -> None:
        """Give the trainers new weights: any bits, NaN payloads among them unless they are to be ``finite``."""
        random = torch.Generator().manual_seed(seed)
        self.whole = torch.randint(-(1 << 31), 1 << 31, (4, ELEMENTS), generator=random).to(torch.int32)
        self.scale = torch.randint(-(1 << 31), 1 << 31, (), generator=random).to(torch.int32)
        if finite:
            # No exponent is of ones alone.
            self.whole &= ~(1 << 30)
            self.scale &= ~(1 << 30)

        for actor in self.trainers:
            self.fill_in(actor)

    def fill_in(self, actor: LocalActor) -> None:
        held = holder(actor)
        held.matrix.view(torch.int32).copy_(self.whole[held.first : held.first + len(held.matrix)])
        held.scale.view(torch.int32).copy_(self.scale)

    def arrived(self) -> bool:
        """Tell whether every engine holds bit for bit what the trainers were given last."""
        return all(
            torch.equal(bits(held.matrix), self.whole[held.first : held.first + len(held.matrix)])
            and torch.equal(bits(held.scale), self.scale)
            for replica in self.replicas
            for held in map(holder, replica)
        )

    def bits(self) -> list[list[int]]:
        """All that the engines hold."""
        return [bits(holder(actor).matrix).flatten().tolist() for replica in self.replicas for actor in replica]

    def take(self) -> list[list[str]]:
        """Return what each actor was asked since the last time, in order."""
        found = [[name for what, actor, name in self.log if (what, actor) == ("asked", own)] for own in self.numbers()]
        self.log.clear()
        return found

    def answered(self, actor: LocalActor, name: str) -> asyncio.Event:
        """Return what is set once ``actor`` has answered a request called ``name``."""
        return self.log.wait_for(("answered", self.actors.index(actor), name))

    def numbers(self) -> range:
        return range(len(self.machine.gpus))

    def ran_ahead(self) -> bool:
        """Tell whether a step was asked for before all of the first begins were answered."""
        steps = [place for place, (what, _, name) in enumerate(self.log) if (what, name) == ("asked", "RunStep")]
        if not steps:
            return False

        begun = [actor for what, actor, name in self.log[: steps[0]] if (what, name) == ("answered", "Begin")]
        return len(begun) < len(self.actors)

    def lanes(self) -> list[threading.Thread]:
        """The threads on which actors' sessions map and unmap memory."""
        return [each.lane._thread for actor in self.actors for each in actor.agent._runs._sessions.values()]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(torch.int32)


def move(tensor: torch.Tensor, poison: int) -> torch.Tensor:
    """Put other storage under ``tensor`` and return the old one, of which nothing is right any more."""
    old = tensor.data
    tensor.data = old.clone()
    old.view(torch.int32).fill_(poison)
    return old
