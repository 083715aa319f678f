"""Cells of the matrix run in one process: whole groups on actors that are threads; nothing waits but for deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import anyio
import pytest

from tests.faults.cells import Cell
from tests.faults.injection import Fault, FaultyAgent, Injector, faulty_session
from tests.runtime.local_actors import Answer, Holder, LocalActor, StorelessSession, cancel
from tests.runtime.transfer.crew import ThreadHost, Wires
from wavecast.runtime import ModelGroup, ParameterSyncGroup, Shard, SyncError, SyncOptions, Torn
from wavecast.runtime.transfer.messages import Request, decode, encode
from wavecast.runtime.transfer.worker import overridden_hooks

__all__ = ("DEADLINE_SECONDS", "FaultyActor", "LocalSides", "Outcome", "run_cell", "run_cells", "strike", "text_of")

#: Of the sync that fails: some faults only end by it.
DEADLINE_SECONDS = 1.5
#: Of those that must not.
_LONG_SECONDS = 30.0
_WAITING = ("stop", "lost")


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What became of a cell.

    :ivar error: class name, ``"cancelled"``, or ``"none"``
    :ivar versions: of the replicas as the group had them right afterwards
    :ivar mixed: replicas that the group called whole and that held anything but their version's weights
    :ivar healed: after the dead were replaced, the next sync brought every element of every replica
    """

    error: str
    seconds: float
    versions: tuple[str, ...]
    mixed: tuple[int, ...]
    healed: bool
    message: str = ""


class FaultyHolder(Holder):
    """A holder whose code fails where its injector says so; a trainer's matrix can be worked out as it is sent."""

    def __init__(self, first: int, value: float, *, computed: bool) -> None:
        super().__init__(first, 2, 4, value)
        self.injector = Injector(shards=lambda: list(Holder.transfer_shards(self)))
        self._computed = computed

    def transfer_shards(self) -> Sequence[Shard]:
        self.injector.call_hook("transfer_shards")
        shards = Holder.transfer_shards(self)
        if not self._computed:
            return shards

        view = self.injector.computed(self.matrix)
        return [Shard("matrix", view, (self.first, 0), (self.of, self.matrix.shape[1])), *shards[1:]]

    def before_commit(self, version: int) -> None:
        self.injector.call_hook("before_commit")

    def after_commit(self, version: int) -> None:
        self.injector.call_hook("after_commit")


class FaultyActor(LocalActor):
    """A handle of an actor that dies, stops, or loses an answer as it comes to a request."""

    def __init__(self, worker: FaultyHolder, wires: Wires) -> None:
        super().__init__(worker, wires)
        self.injector = worker.injector
        self.agent = FaultyAgent(
            worker.transfer_shards,
            hooks=overridden_hooks(worker),
            make_session=lambda: faulty_session(self.injector, StorelessSession, wires),
            injector=self.injector,
        )
        self.cancel_driver: Callable[[], object] = lambda: None
        self.unheard: list[Answer] = []
        self._runs = asyncio.Event()
        self._runs.set()
        self.on_request = self._arrived

    def bury(self) -> None:
        """End the threads of a dead actor, as its process' end does."""
        for session in self.agent._runs._sessions.values():
            session.close()

    @property
    def stopped(self) -> bool:
        return not self._runs.is_set()

    def resume(self) -> None:
        """Go on, as after SIGCONT."""
        unheard, self.unheard = self.unheard, []
        for answer in unheard:
            cancel(answer, recursive=False)

        self._runs.set()

    def remote(self, call: bytes, *attachments: Answer) -> Answer:
        return FaultyAnswer(super().remote(call, *attachments).found, self)

    def _arrived(self, request: Request) -> None:
        if self.injector.due(request, "kill"):
            self.kill()
        elif self.injector.due(request, "stop"):
            self._runs.clear()
        elif self.injector.due(request, "cancel"):
            self.cancel_driver()
        elif type(request).__name__ not in ("Commit", "RunHook"):
            self.injector.arrived(request)

    async def _serve(self, request: Request, host: ThreadHost, attachments: Sequence[Answer]) -> bytes:
        lost = self.injector.loses(request)
        await self._runs.wait()
        found = [decode(await attachment) for attachment in attachments]
        if lost:
            # On both ways.
            host.slip = None

        answer = encode(await self.agent.serve_async(request, host, *found))
        await self._runs.wait()
        if lost:
            await asyncio.Event().wait()

        return answer


class FaultyAnswer(Answer):
    """Knows whose it is: a stopped process hears of its cancellation when it goes on."""

    def __init__(self, future: asyncio.Future[bytes], actor: FaultyActor) -> None:
        super().__init__(future)
        self.actor = actor


def cancel_later_if_stopped(answer: FaultyAnswer, *, recursive: bool) -> None:
    """Stands in for ``ray.cancel``."""
    if answer.actor.stopped:
        answer.actor.unheard.append(answer)
    else:
        cancel(answer, recursive=recursive)


class LocalSides:
    """Two trainers of two rows each, two replicas of two engines of as many."""

    def __init__(self, *, computed: bool = False) -> None:
        self.wires = Wires()
        self.computed = computed
        self.trainers = [self.actor(rank, 1.0, computed=computed) for rank in range(2)]
        self.replicas = [[self.actor(rank, 0.0) for rank in range(2)] for _ in range(2)]
        for actor in self.trainers:
            actor.injector.sends = True

    def actor(self, rank: int, value: float, *, computed: bool = False) -> FaultyActor:
        return FaultyActor(FaultyHolder(2 * rank, value, computed=computed), self.wires)

    @property
    def actors(self) -> list[FaultyActor]:
        return [*self.trainers, *(actor for replica in self.replicas for actor in replica)]

    def struck(self, side: str) -> FaultyActor:
        return self.trainers[1] if side == "trainer" else self.replicas[0][1]

    def fill(self, value: float) -> None:
        for actor in self.trainers:
            holder_of(actor).fill(value)

    def values(self, replica: int) -> set[float]:
        return set().union(*(holder_of(actor).values() for actor in self.replicas[replica]))

    def group(self, staging: str, *, reconnects: bool, when_busy: str = "raise") -> ParameterSyncGroup:
        options = SyncOptions(
            transport="gloo",
            chunk_bytes=1 << 8,
            in_flight=1,
            lookahead=0,
            staging=staging,  # type: ignore[arg-type]
            release_communicators=reconnects,
            when_busy=when_busy,  # type: ignore[arg-type]
        )
        return ParameterSyncGroup(ModelGroup("policy", [self.trainers]), ModelGroup("rollout", self.replicas), options)

    def fresh(self, actor: FaultyActor) -> FaultyActor:
        """Return a new actor for the place of ``actor``."""
        if actor in self.trainers:
            rank = self.trainers.index(actor)
            self.trainers[rank] = self.actor(rank, 0.0, computed=self.computed)
            return self.trainers[rank]

        for replica in self.replicas:
            if actor in replica:
                rank = replica.index(actor)
                replica[rank] = self.actor(rank, 0.0)
                return replica[rank]

        raise ValueError("the actor is on neither side")


def holder_of(actor: FaultyActor) -> FaultyHolder:
    assert isinstance(actor.worker, FaultyHolder)
    return actor.worker


def text_of(version: object, old: int) -> str:
    """Return a replica's version in the table's words."""
    if isinstance(version, Torn):
        return "torn"

    return {old: "old", old + 1: "new"}.get(version, str(version))  # type: ignore[call-overload, no-any-return]


async def run_cell(cell: Cell) -> Outcome:
    """Sync once, let the second sync fail, mend what the fault broke, sync again and compare every element."""
    computed = cell.fault == "hook" and cell.phase.endswith("wave")
    sides = LocalSides(computed=computed)
    struck = sides.struck(cell.side)
    async with sides.group(cell.staging, reconnects=cell.phase == "connect") as group:
        await group.sync(1, deadline=_LONG_SECONDS)
        sides.fill(2.0)
        struck.injector.arm(Fault(cell.fault, cell.phase))
        error, message, seconds = await strike(group, struck, cell, 2)
        versions = group.versions()
        held = {"old": {1.0}, "new": {2.0}}
        mixed = tuple(
            index
            for index, version in versions.items()
            if text_of(version, 1) in held
            # What a dead engine holds is nobody's any more.
            and not (struck.dead and struck in sides.replicas[index])
            # There the live weights are the user's own new tensor.
            and cell.fault not in ("shape", "dtype")
            and sides.values(index) != held[text_of(version, 1)]
        )
        await _mend(group, sides, struck, cell)
        sides.fill(3.0)
        report = await group.sync(deadline=_LONG_SECONDS, validate=not computed)
        healed = sides.values(0) == sides.values(1) == {3.0}
        healed = healed and group.versions() == dict.fromkeys((0, 1), report.version)

    return Outcome(error, seconds, tuple(text_of(version, 1) for version in versions.values()), mixed, healed, message)


async def strike(
    group: ParameterSyncGroup, struck: FaultyActor, cell: Cell, version: int | None
) -> tuple[str, str, float]:
    """Let a sync fail as ``cell`` says, on an armed actor; return the error's class, its words and the seconds."""
    start = time.monotonic()
    seconds = DEADLINE_SECONDS if cell.fault in _WAITING else _LONG_SECONDS
    error, message = "none", ""
    with anyio.CancelScope() as scope:
        struck.cancel_driver = scope.cancel
        try:
            await group.sync(version, deadline=seconds, validate=cell.phase == "verify")
        except SyncError as failure:
            error, message = type(failure).__name__, str(failure)
            if failure.versions != group.versions():
                message = error = f"the error says {failure.versions}, the group {group.versions()}"

    if scope.cancelled_caught:
        error = "cancelled"

    if cell.error:
        assert struck.injector.hit, f"{cell} never happened"

    return error, message, time.monotonic() - start


async def _mend(group: ParameterSyncGroup, sides: LocalSides, struck: FaultyActor, cell: Cell) -> None:
    struck.injector.arm(None)
    struck.resume()
    if cell.fault == "kill":
        await group.replace(struck, sides.fresh(struck))
    elif cell.fault in ("shape", "dtype"):
        holder = holder_of(struck)
        holder.matrix.data = holder.matrix.new_zeros((2, 96)).float()


async def run_cells(cells: Iterable[Cell]) -> dict[Cell, Outcome | Exception]:
    """
    Run cells side by side: those that wait for a deadline leave the machine to the others.

    One goes before them by itself: what a process does once in its life should not eat into the others' deadlines.
    """
    found: dict[Cell, Outcome | Exception] = {}
    waiting, working = anyio.CapacityLimiter(6), anyio.CapacityLimiter(1)
    first, *rest = sorted(cells, key=lambda cell: cell.fault in _WAITING)

    async def run(cell: Cell) -> None:
        async with waiting if cell.fault in _WAITING else working:
            try:
                found[cell] = await run_cell(cell)
            except Exception as error:
                found[cell] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.cancel", cancel_later_if_stopped)
        await run(first)
        async with anyio.create_task_group() as tasks:
            for cell in rest:
                tasks.start_soon(run, cell)

    return found
