"""The whole life of a group against a small model: syncs that succeed and fail, members that come, go and die."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import TypeVar

import anyio
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.faults.cells import CELLS, STAGINGS, Cell
from tests.faults.injection import Fault
from tests.faults.local_cells import FaultyActor, LocalSides, cancel_later_if_stopped
from wavecast.runtime import ActorDied, GroupClosed, ParameterSyncGroup, SyncError, SyncReport

T = TypeVar("T")

_SECONDS = 30.0


def _bare(cell: Cell) -> Cell:
    return replace(cell, error="", versions=())


def _places(*faults: str) -> list[Cell]:
    """Return where a fault ends a sync, whatever the staging."""
    found = [_bare(cell) for cell in CELLS if cell.error and cell.fault in faults]
    return list(dict.fromkeys(replace(cell, staging=STAGINGS[0]) for cell in found))


@dataclass(frozen=True, slots=True)
class Whole:
    """What a replica is whole of."""

    version: int
    value: float


class Life(RuleBasedStateMachine):
    """
    The model: which replica is whole, of which version and weights; who is dead; the newest version there was.

    A replica that is not whole is ``None``: whether it is torn or was never synced is the matrix's to say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("ray.cancel", cancel_later_if_stopped)
        self.loop = asyncio.new_event_loop()
        self.opened: list[ParameterSyncGroup] = []
        self.value = 0.0
        self.newest: int | None = None
        self.dead: FaultyActor | None = None

    def do(self, work: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        try:
            for group in self.opened:
                self.do(group.aclose())
        finally:
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
            self.patch.undo()

    @initialize(staging=st.sampled_from(STAGINGS))
    def begin(self, staging: str) -> None:
        self.staging = staging
        self.sides = LocalSides()
        self.model: list[Whole | None] = [None, None]
        self.open()

    def open(self) -> None:
        self.group = self.sides.group(self.staging, reconnects=True, when_busy="coalesce")
        self.opened.append(self.group)

    def train(self) -> float:
        self.value += 1.0
        self.sides.fill(self.value)
        return self.value

    def take_on(self, version: int, value: float) -> None:
        self.newest = version
        self.model = [Whole(version, value)] * len(self.model)

    @property
    def coming(self) -> int:
        return 0 if self.newest is None else self.newest + 1

    # Syncs.

    @precondition(lambda self: self.dead is None)
    @rule()
    def sync(self) -> None:
        value, version = self.train(), self.coming
        report = self.do(self.group.sync(deadline=_SECONDS))
        assert report.version == version
        self.take_on(version, value)

    @precondition(lambda self: self.dead is None)
    @rule()
    def sync_three_at_once(self) -> None:
        value, version = self.train(), self.coming

        async def all_three() -> list[SyncReport]:
            return list(await asyncio.gather(*(self.group.sync(deadline=_SECONDS) for _ in range(3))))

        reports = self.do(all_three())
        # The first goes at once; the two that wait are served by one.
        assert [report.version for report in reports] == [version, version + 1, version + 1]
        assert reports[1] is reports[2]
        self.take_on(version + 1, value)

    @precondition(lambda self: self.dead is None)
    @rule(place=st.sampled_from(_places("memory", "bit", "cancel")))
    def fail(self, place: Cell) -> None:
        self.strike(place)

    @precondition(lambda self: self.dead is None)
    @rule(place=st.sampled_from(_places("kill")))
    def kill(self, place: Cell) -> None:
        self.strike(place)

    @precondition(lambda self: self.dead is None)
    @rule(place=st.sampled_from([place for place in _places("kill", "cancel") if place.phase == "commit"]))
    def fail_in_the_commit(self, place: Cell) -> None:
        self.strike(place)

    def strike(self, place: Cell) -> None:
        """Let a sync fail as the cell of this group's staging says that has this place."""
        cell = next(cell for cell in CELLS if replace(place, staging=self.staging) == _bare(cell))
        struck, version, value = self.sides.struck(cell.side), self.coming, self.train()
        struck.injector.arm(Fault(cell.fault, cell.phase))
        assert self.do(self._failing(struck, cell)) == cell.error
        assert struck.injector.hit
        struck.injector.arm(None)
        self.dead = struck if cell.fault == "kill" else None
        of_struck, of_others = cell.versions
        if "new" in cell.versions:
            # Where there are no others, the struck engine's neighbour has it: no later version may be as low.
            self.newest = version

        for index in range(len(self.model)):
            word = of_struck if index == 0 else of_others
            if word == "new":
                self.model[index] = Whole(version, value)
            elif word == "torn":
                self.model[index] = None

    async def _failing(self, struck: FaultyActor, cell: Cell) -> str:
        with anyio.CancelScope() as scope:
            struck.cancel_driver = scope.cancel
            try:
                await self.group.sync(deadline=_SECONDS, validate=cell.phase == "verify")
            except SyncError as error:
                return type(error).__name__

        return "cancelled" if scope.cancelled_caught else "none"

    @precondition(lambda self: self.dead is not None)
    @rule()
    def sync_with_a_dead_member(self) -> None:
        with pytest.raises(ActorDied):
            self.do(self.group.sync(deadline=_SECONDS))

    # Members.

    @precondition(lambda self: self.dead is not None)
    @rule()
    def replace_the_dead(self) -> None:
        dead, self.dead = self.dead, None
        assert dead is not None
        for index, replica in enumerate(self.sides.replicas):
            if dead in replica:
                self.model[index] = None

        self.do(self.group.replace(dead, self.sides.fresh(dead)))

    @precondition(lambda self: self.dead is None and len(self.model) < 3)
    @rule(late=st.booleans())
    def add_a_replica(self, late: bool) -> None:
        peers = [whole for whole in self.model if whole is not None and whole.version == self.newest]
        catch_up = "peer" if late and peers else "next"
        self.sides.replicas.append([self.sides.actor(rank, 0.0) for rank in range(2)])
        index = self.do(self.group.add_replica(self.sides.replicas[-1], catch_up=catch_up, deadline=_SECONDS))  # type: ignore[arg-type]
        assert index == len(self.model)
        self.model.append(peers[0] if catch_up == "peer" else None)

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def remove_a_replica(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.model) - 1))
        if self.dead in self.sides.replicas[index]:
            self.dead = None

        self.do(self.group.remove_replica(index))
        del self.model[index], self.sides.replicas[index]

    # Drivers.

    @precondition(lambda self: self.dead is None)
    @rule()
    def ask_the_actors(self) -> None:
        self.do(self.group.refresh(deadline=_SECONDS))

    @precondition(lambda self: self.dead is None)
    @rule()
    def close_and_start_anew(self) -> None:
        self.do(self.group.aclose())
        with pytest.raises(GroupClosed):
            self.do(self.group.sync())

        self.open()
        self.do(self.group.refresh(deadline=_SECONDS))
        engines = [actor for replica in self.sides.replicas for actor in replica]
        # All that is left of a version is what the actors have of it.
        self.newest = max((actor.agent.version for actor in engines if actor.agent.version is not None), default=None)

    # What always holds.

    @invariant()
    def replicas_are_whole_or_say_that_they_are_not(self) -> None:
        found = self.group.versions()
        assert {index: version for index, version in found.items() if isinstance(version, int)} == {
            index: whole.version for index, whole in enumerate(self.model) if whole is not None
        }
        for index, whole in enumerate(self.model):
            if whole is not None:
                assert self.sides.values(index) == {whole.value}


Life.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLife = pytest.mark.timeout(120)(Life.TestCase)
