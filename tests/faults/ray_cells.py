"""Cells of the matrix run on real Ray actors: processes that are killed and stopped, gloo over real sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import cast

import anyio
import pytest

from tests.faults.cells import Cell
from tests.faults.injection import Fault, FaultyAgent, Injector, faulty_session
from tests.faults.local_cells import Outcome, text_of
from tests.integration.actors import PoolActor
from tests.integration.conftest import MakeSides, Pool, Sides
from wavecast.runtime import Layout, ParameterSyncGroup, Shard, SyncError, SyncOptions
from wavecast.runtime.cluster import RayActors, RayHost
from wavecast.runtime.transfer.messages import Request, RunStep, decode, encode
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.worker import overridden_hooks

__all__ = (
    "RAY_DEADLINE_SECONDS",
    "FaultyPoolActor",
    "cancelling",
    "counting_steps",
    "deadline_of",
    "failing",
    "mend",
    "run_ray_cell",
)

RAY_DEADLINE_SECONDS = 2.0
_LONG_SECONDS = 60.0
_WAITING = ("stop", "lost")


class FaultyPoolActor(PoolActor):
    """A demo actor that dies, stops or fails as it comes to a request: by its own hand, so that the place is exact."""

    def __init__(self) -> None:
        self._injector = Injector(shards=lambda: PoolActor.transfer_shards(self))
        super().__init__()

    def start_over(self, layout: object, new_weights: object) -> None:
        super().start_over(layout, new_weights)  # type: ignore[arg-type]
        self._injector = Injector(shards=lambda: PoolActor.transfer_shards(self))
        vars(self)["_wavecast_agent"] = FaultyAgent(
            self.transfer_shards,
            hooks=overridden_hooks(self),
            make_session=lambda: faulty_session(self._injector, Session),
            injector=self._injector,
        )

    def arm(self, fault: Fault | None, sends: bool) -> bool:
        """Return whether the fault before has happened."""
        hit = self._injector.hit
        self._injector.sends = sends
        self._injector.arm(fault)
        if fault is not None:
            self._data = [(view, view.data) for _, view in self._held]

        return hit

    def restore(self) -> None:
        """Give every tensor the storage, shape and dtype that it had."""
        for view, data in self._data:
            view.data = data

    def transfer_shards(self) -> list[Shard]:
        self._injector.call_hook("transfer_shards")
        return super().transfer_shards()

    def before_commit(self, version: int) -> None:
        self._injector.call_hook("before_commit")

    def after_commit(self, version: int) -> None:
        self._injector.call_hook("after_commit")

    def wavecast_request(self, call: bytes, *attachments: bytes) -> bytes:
        request, host = cast("tuple[Request, RayHost]", decode(call))
        if self._injector.due(request, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._injector.due(request, "stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif type(request).__name__ not in ("Commit", "RunHook"):
            self._injector.arrived(request)

        lost = self._injector.loses(request)
        # What is lost is lost on both ways.
        answer = super().wavecast_request(encode((request, RayHost())) if lost else call, *attachments)
        while lost and not host.cancelled():
            time.sleep(0.01)

        return answer


@contextlib.contextmanager
def cancelling(scope: anyio.CancelScope, struck: object, cell: Cell, steps: int) -> Iterator[None]:
    """Cancel the driver as it sends the struck actor the request at which the cell's fault is."""
    start = RayActors.start
    fault = Fault(cell.fault, cell.phase)

    def look(self: RayActors, actor: int, request: Request, *attachments: object, **options: object) -> object:
        if self.handles[actor] == struck and fault.is_at(request, steps):
            scope.cancel()

        return start(self, actor, request, *attachments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        if cell.fault == "cancel":
            patch.setattr(RayActors, "start", look)

        yield


@contextlib.contextmanager
def counting_steps(struck: object) -> Iterator[list[RunStep]]:
    """Collect the steps that the struck actor is asked for."""
    start, seen = RayActors.start, []

    def look(self: RayActors, actor: int, request: Request, *attachments: object, **options: object) -> object:
        if self.handles[actor] == struck and isinstance(request, RunStep):
            seen.append(request)

        return start(self, actor, request, *attachments, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayActors, "start", look)
        yield seen


async def run_ray_cell(cell: Cell, make_sides: MakeSides, pool: Pool) -> Outcome:
    """As :func:`tests.faults.local_cells.run_cell`, on two trainers and two replicas of two engines."""
    sides = make_sides("tp=2", "tp=2", replicas=2, layers=1, kind=FaultyPoolActor)
    trainer = cell.side == "trainer"
    struck = sides.sources[1] if trainer else sides.replicas[0][1]
    process, layout = await struck.process_id.remote(), await struck.held_layout.remote()  # type: ignore[attr-defined]
    options = SyncOptions(
        transport="gloo",
        chunk_bytes=1 << 16,
        in_flight=1,
        lookahead=0,
        staging=cell.staging,
        release_communicators=cell.phase == "connect",
    )
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        with counting_steps(struck) as steps:
            await group.sync(1, deadline=_LONG_SECONDS)

        sides.fill(1)
        if cell.fault != "cancel":
            await struck.arm.remote(Fault(cell.fault, cell.phase), trainer)  # type: ignore[attr-defined]

        scope = anyio.CancelScope()
        with cancelling(scope, struck, cell, len(steps)):
            error, message, seconds = await failing(group, scope, cell, 2)

        versions = group.versions()
        await mend(group, sides, struck, process, layout, cell, pool)
        sides.fill(2)
        report = await group.sync(deadline=_LONG_SECONDS, validate=True)
        healed = sides.differing(2) == {} and group.versions() == dict.fromkeys((0, 1), report.version)

    return Outcome(error, seconds, tuple(text_of(version, 1) for version in versions.values()), (), healed, message)


def deadline_of(cell: Cell) -> float:
    """Return the deadline of the sync that fails: long where it must end by something else, on a busy machine too."""
    return RAY_DEADLINE_SECONDS if cell.fault in _WAITING else _LONG_SECONDS


async def failing(
    group: ParameterSyncGroup, scope: anyio.CancelScope, cell: Cell, version: int | None
) -> tuple[str, str, float]:
    """Sync an armed group; return the error's class, its words and the seconds."""
    start = time.monotonic()
    error, message = "none", ""
    with scope:
        try:
            await group.sync(version, deadline=deadline_of(cell), validate=cell.phase == "verify")
        except SyncError as failure:
            error, message = type(failure).__name__, str(failure)

    return "cancelled" if scope.cancelled_caught else error, message, time.monotonic() - start


async def mend(
    group: ParameterSyncGroup,
    sides: Sides,
    struck: object,
    process: int,
    layout: Layout,
    cell: Cell,
    pool: Pool,
    kind: type = FaultyPoolActor,
) -> None:
    """Make sure that the fault has happened, and undo it, so that the next sync may go well."""
    if cell.fault == "kill":
        pool.discard(struck)
        (fresh,) = pool.take([layout], kind)
        await group.replace(struck, fresh)
        for side in (sides.sources, *sides.replicas):
            side[:] = [fresh if actor == struck else actor for actor in side]

        return

    if cell.fault == "stop":
        os.kill(process, signal.SIGCONT)

    hit = await struck.arm.remote(None, False)  # type: ignore[attr-defined]
    assert hit or cell.fault == "cancel" or not cell.error, f"{cell} never happened"
    if cell.fault in ("shape", "dtype"):
        await struck.restore.remote()  # type: ignore[attr-defined]
