"""Versions, hooks, shadow and lost members with real actors: what only Ray itself can show."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
import ray

from tests.integration.actors import AsyncActor, PoolActor, ThreadedActor
from tests.integration.conftest import MakeSides, Pool
from wavecast.runtime import ParameterSyncGroup, SyncOptions, Torn

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

MANY_TASKS = SyncOptions(chunk_bytes=1 << 16, in_flight=1)


class HookNotes(PoolActor):
    """Notes when it is called."""

    notes: tuple[str, ...] = ()

    def before_sync(self, version: int) -> None:
        self.notes = (f"before_sync {version}",)

    def after_commit(self, version: int) -> None:
        self.notes += (f"after_commit {version}",)

    def after_abort(self, version: int) -> None:
        self.notes += (f"after_abort {version}",)

    def noted(self) -> tuple[str, ...]:
        return self.notes


class AsyncHookNotes(AsyncActor):
    """Waits in its hooks."""

    notes: tuple[str, ...] = ()

    async def before_sync(self, version: int) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        self.notes = (f"before_sync {version}",)

    async def after_commit(self, version: int) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        self.notes += (f"after_commit {version}",)

    async def after_abort(self, version: int) -> None:  # type: ignore[override]
        await anyio.lowlevel.checkpoint()
        self.notes += (f"after_abort {version}",)

    def noted(self) -> tuple[str, ...]:
        return self.notes


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_a_new_driver_goes_on_where_the_last_one_failed(make_sides: MakeSides, staging: str) -> None:
    sides = make_sides("tp=2", "tp=1", replicas=2)
    options = SyncOptions(chunk_bytes=1 << 16, in_flight=1, staging=staging)  # type: ignore[arg-type]
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        await group.sync(5)
        sides.fill(1)
        with anyio.CancelScope() as scope:
            await group.sync(6, progress=lambda receipt: scope.cancel())

    assert scope.cancelled_caught
    if staging == "shadow":
        assert sides.differing(0) == {}

    async with ParameterSyncGroup(*sides.groups(), options) as group:
        found = await group.refresh()
        assert found == {0: 5, 1: 5} if staging == "shadow" else Torn(5, 6) in found.values()
        assert (await group.sync()).version == 6
        assert group.versions() == {0: 6, 1: 6}

    assert sides.differing(1) == {}


@pytest.mark.parametrize("kind", [PoolActor, ThreadedActor, AsyncActor])
async def test_every_kind_of_actor_flips(make_sides: MakeSides, kind: type) -> None:
    sides = make_sides("tp=2", "tp=1", replicas=2, kind=kind)
    async with ParameterSyncGroup(*sides.groups(), SyncOptions(staging="shadow")) as group:
        for step in range(2):
            sides.fill(step)
            report = await group.sync(validate=True)
            assert sides.differing(step) == {}

    assert 0 < report.pause_seconds < report.seconds.total
    assert report.shadow_bytes > 0


@pytest.mark.parametrize("kind", [HookNotes, AsyncHookNotes])
async def test_hooks_run_on_the_actor_and_a_cancelled_sync_resumes_it(make_sides: MakeSides, kind: type) -> None:
    sides = make_sides("tp=1", "tp=1", kind=kind)
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), MANY_TASKS) as group:
        report = await group.sync(3)
        for actor in (*sides.sources, *sides.destinations):
            assert ray.get(actor.noted.remote()) == ("before_sync 3", "after_commit 3")  # type: ignore[attr-defined]

        assert report.hooks.before_commit == 0
        assert report.hooks.after_commit > 0
        with anyio.CancelScope() as scope:
            await group.sync(4, progress=lambda receipt: scope.cancel())

        for actor in (*sides.sources, *sides.destinations):
            assert ray.get(actor.noted.remote()) == ("before_sync 4", "after_abort 4")  # type: ignore[attr-defined]


async def test_a_killed_replica_is_dropped_within_the_deadline(make_sides: MakeSides, pool: Pool) -> None:
    sides = make_sides("tp=2", "tp=1", replicas=3)
    options = SyncOptions(chunk_bytes=1 << 16, in_flight=1, on_lost_replica="drop")
    killed: list[object] = []

    def kill(receipt: object) -> None:
        if not killed:
            killed.append(receipt)
            pool.kill(sides.replicas[1][0])

    sides.fill(2)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        with anyio.fail_after(31):
            report = await group.sync(2, deadline=30, progress=kill)

        assert (report.dropped, report.attempts) == ((1,), 2)
        assert group.versions() == {0: 2, 1: 2}
        del sides.replicas[1]
        assert sides.differing(2) == {}


async def test_a_killed_trainer_is_planned_around_where_others_hold_its_shards(
    make_sides: MakeSides, pool: Pool
) -> None:
    sides = make_sides("tp=1,dp=2", "tp=2")
    options = SyncOptions(chunk_bytes=1 << 16, in_flight=1, on_lost_trainer="replan")
    killed: list[object] = []

    def kill(receipt: object) -> None:
        if not killed:
            killed.append(receipt)
            pool.kill(sides.sources[0])

    sides.fill(2)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        report = await group.sync(2, deadline=30, progress=kill)

    assert report.lost_trainers == 1
    assert sides.differing(2) == {}


async def test_a_late_joiner_is_served_by_a_peer(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=2")
    late = make_sides("tp=2", "tp=2")
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups()) as group:
        await group.sync(7)
        sides.fill(1)
        busy = [actor.busy.remote(1.0) for actor in sides.sources]  # type: ignore[attr-defined]
        await group.add_replica(late.destinations, catch_up="peer")
        assert group.versions() == {0: 7, 1: 7}
        assert late.differing(0) == {}
        ray.get(busy)
        assert (await group.sync()).version == 8

    assert late.differing(1) == sides.differing(1) == {}
