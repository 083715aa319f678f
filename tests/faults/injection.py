"""Faults at an exact place of a sync: an agent that fails as it comes to one request, in process or under Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from wavecast.runtime import Shard
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.comm import Communicator, Deadline, Fence, Move
from wavecast.runtime.transfer.hooks import Hook
from wavecast.runtime.transfer.host import Host
from wavecast.runtime.transfer.memory import as_bits
from wavecast.runtime.transfer.messages import Commit, Compare, Connect, Probe, Reply, Request, RunHook, RunStep
from wavecast.runtime.transfer.program import Program
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.session import Session

__all__ = ("Fault", "FaultyAgent", "Injector", "faulty_session")

#: The request at which a phase reaches an actor; the waves are told apart by the step's place in its program.
_REQUESTS = {
    "describe": ("Begin",),
    "connect": ("Connect",),
    "first wave": ("RunStep",),
    "middle wave": ("RunStep",),
    "last wave": ("RunStep",),
    "verify": ("Probe", "Compare"),
    "vote": ("RunHook",),
    "commit": ("Commit",),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """
    What is to happen once, and where.

    :ivar kind: one of the matrix's faults
    :ivar phase: one of the matrix's phases
    """

    kind: str
    phase: str

    def is_at(self, request: Request, steps: int) -> bool:
        """Tell whether ``request`` is the place, on an actor whose program has ``steps`` steps."""
        if type(request).__name__ not in _REQUESTS[self.phase]:
            return False

        if isinstance(request, RunStep):
            return request.step == {"first wave": 0, "middle wave": steps // 2, "last wave": steps - 1}[self.phase]

        return True


@dataclass
class Injector:
    """
    The fault that an actor waits for, and what it needs to commit it.

    :ivar hit: the fault has happened
    :ivar steps: of the actor's program
    :ivar sends: it is a trainer: what it loses on the way is a message, and else an answer
    :ivar reads: of the user's computed view since it was armed; ``reads_a_sync`` how many a whole sync makes
    """

    fault: Fault | None = None
    hit: bool = False
    steps: int = 0
    step: int = -1
    reads: int = 0
    reads_a_sync: int = 0
    sends: bool = False
    shards: Callable[[], Sequence[Shard]] = field(default=lambda: ())

    def arm(self, fault: Fault | None) -> None:
        self.fault, self.hit = fault, False
        self.reads_a_sync, self.reads = max(self.reads, self.reads_a_sync), 0

    def due(self, request: Request, *kinds: str) -> bool:
        """Tell whether a fault of one of ``kinds`` is to happen at ``request``, now and never again."""
        fault = self.fault
        if fault is None or self.hit or fault.kind not in kinds or not fault.is_at(request, self.steps):
            return False

        self.hit = True
        return True

    def arrived(self, request: Request) -> None:
        """Do what the user's own code may do to its tensors when it must not."""
        if self.due(request, "shape"):
            _spoil(self.shards(), lambda view: view.new_zeros((view.shape[0], view.shape[1] + 1)))
        elif self.due(request, "dtype"):
            _spoil(self.shards(), lambda view: view.to(torch.int32))

    def loses(self, request: Request) -> bool:
        """Tell whether the answer to ``request`` gets lost. A trainer's step loses its message instead."""
        return not (self.sends and isinstance(request, RunStep)) and self.due(request, "lost")

    def call_hook(self, name: str) -> None:
        """Raise as the user's hook where that is the fault."""
        fault = self.fault
        wanted = {"describe": "transfer_shards", "vote": "before_commit", "commit": "after_commit"}
        if fault is None or self.hit or fault.kind != "hook" or wanted.get(fault.phase) != name:
            return

        self.hit = True
        raise ValueError("the user's own code failed")

    def computed(self, view: torch.Tensor) -> Computed:
        """Return a view that is worked out by the user's code, which may fail as it is read."""
        return Computed(tuple(view.shape), view.dtype, view.device, partial(self._read, view))

    def _read(self, view: torch.Tensor, box: Box) -> torch.Tensor:
        at, self.reads = self.reads, self.reads + 1
        places = {"first wave": 0, "middle wave": self.reads_a_sync // 2, "last wave": self.reads_a_sync - 1}
        fault = self.fault
        if fault is not None and not self.hit and fault.kind == "hook" and places.get(fault.phase) == at:
            self.hit = True
            raise ValueError("the user's own code failed")

        return view[tuple(slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True))]


def _spoil(shards: Sequence[Shard], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put something else into the first matrix, as ``parameter.data = ...`` does."""
    view = next(shard.view for shard in shards if shard.view.ndim == 2 if isinstance(shard.view, torch.Tensor))
    view.data = change(view)


def _flip(view: object) -> None:
    assert isinstance(view, torch.Tensor)
    bits = as_bits(view).flatten()
    bits[bits.numel() // 2 : bits.numel() // 2 + 1] ^= 1


class _Flipped:
    """A move that ends with one bit of the buffer flipped."""

    def __init__(self, inner: Move, buffer: torch.Tensor) -> None:
        self._inner = inner
        self._buffer = buffer

    def finish(self, deadline: Deadline) -> None:
        self._inner.finish(deadline)
        self._buffer[:1] ^= 1


class _Lost:
    """A move that nobody hears of."""

    def finish(self, deadline: Deadline) -> None:
        pass


class _Kept:
    """A move out of a buffer that must live until it is over."""

    def __init__(self, inner: Move, buffer: torch.Tensor) -> None:
        self._inner = inner
        self._buffer: torch.Tensor | None = buffer

    def finish(self, deadline: Deadline) -> None:
        self._inner.finish(deadline)
        self._buffer = None


class _FaultyCommunicator:
    """Flips a bit on the way, or loses a message."""

    def __init__(self, inner: Communicator, injector: Injector, at: Callable[[], RunStep | None]) -> None:
        self._inner = inner
        self._injector = injector
        self._at = at
        self.rank = inner.rank
        self.device = inner.device
        self.device_bytes = inner.device_bytes
        self.exports = inner.exports

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        request = self._at()
        sends = self.rank == sender
        if request is not None and sends and self._injector.due(request, "lost"):
            return _Lost()

        if request is not None and self._injector.due(request, "bit"):
            if not sends:
                return _Flipped(
                    self._inner.start(buffer, sender=sender, receivers=receivers, deadline=deadline), buffer
                )

            sent = buffer.clone()
            sent[:1] ^= 1
            return _Kept(self._inner.start(sent, sender=sender, receivers=receivers, deadline=deadline), sent)

        return self._inner.start(buffer, sender=sender, receivers=receivers, deadline=deadline)

    def fence(self) -> Fence:
        return self._inner.fence()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


def faulty_session(injector: Injector, kind: type[Session], *args: object) -> Session:
    """Return a session of ``kind`` with faults of the injector's."""

    class FaultySession(kind):  # type: ignore[misc, valid-type]
        _at: RunStep | None = None

        def __init__(self) -> None:
            super().__init__(*args)
            load, queue = self.equipment.load, self.steps.queue

            def counted(program: Program, device: torch.device) -> None:
                injector.steps = len(program.steps)
                load(program, device)

            def struck(run: Run, request: RunStep) -> list[Fence]:
                self._at = request
                if injector.due(request, "memory"):
                    raise torch.OutOfMemoryError("CUDA out of memory")

                return queue(run, request)  # type: ignore[no-any-return]

            self.equipment.load, self.steps.queue = counted, struck

        def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
            if injector.due(request, "memory"):
                raise torch.OutOfMemoryError("CUDA out of memory")

            return _FaultyCommunicator(super()._join(request, address, device, deadline), injector, lambda: self._at)

    return FaultySession()


class FaultyAgent(Agent):
    """An agent that fails where its injector says so."""

    def __init__(
        self,
        shards: Callable[[], Sequence[Shard]],
        *,
        hooks: dict[str, Hook],
        make_session: Callable[[], Session],
        injector: Injector,
    ) -> None:
        super().__init__(shards, hooks=hooks, make_session=make_session)
        self._injector = injector

    def _start(
        self, request: Request, host: Host, attachments: tuple[object, ...], hook_seconds: float
    ) -> Future[Reply]:
        waits = isinstance(request, RunStep | Connect)
        if not waits and self._injector.due(request, "memory"):
            raise torch.OutOfMemoryError("CUDA out of memory")

        if isinstance(request, Commit | RunHook):
            self._injector.arrived(request)

        if isinstance(request, Probe | Compare) and self._injector.due(request, "bit"):
            run = self._runs.session(request.run).current(request.run)
            _flip(next(shard.view for shard in run.memory.shards if shard.view.ndim == 2))

        return super()._start(request, host, attachments, hook_seconds)
