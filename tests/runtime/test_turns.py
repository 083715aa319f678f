"""Several syncs at once: refused, one after the other, or several served by one."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from tests.runtime.local_actors import Stage, local
from wavecast.runtime import (
    ActorDied,
    ConfigError,
    GroupClosed,
    ModelGroup,
    ParameterSyncGroup,
    SyncInProgress,
    SyncOptions,
    SyncReport,
    SyncTimeout,
)
from wavecast.runtime.transfer.messages import Begin, Request

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", **options}),  # type: ignore[arg-type]
    )


class Callers:
    """Runs syncs at once and notes how each of them ended, in the order in which they did."""

    def __init__(self, group: ParameterSyncGroup) -> None:
        self.group = group
        self.ended: list[tuple[str, object]] = []
        self.reports: dict[str, SyncReport] = {}

    async def sync(self, name: str, version: int | None = None, **arguments: object) -> None:
        try:
            report = await self.group.sync(version, **arguments)  # type: ignore[arg-type]
        except Exception as error:
            self.ended.append((name, type(error)))
        else:
            self.ended.append((name, report.version))
            self.reports[name] = report


def begins(stage: Stage) -> int:
    return stage.trainers[0].kinds().count("Begin")


async def test_by_default_the_second_is_refused() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "first", 4)
            tasks.start_soon(callers.sync, "second", 5)

    assert callers.ended == [("second", SyncInProgress), ("first", 4)]


async def test_in_a_queue_each_has_its_turn_in_the_order_they_came() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy="queue") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            for name in "abcd":
                tasks.start_soon(callers.sync, name)

    assert callers.ended == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert begins(stage) == 4


async def test_in_a_queue_an_older_version_is_refused_at_its_turn() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy="queue") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "a", 9)
            tasks.start_soon(callers.sync, "b", 7)
            tasks.start_soon(callers.sync, "c", 11)

    assert callers.ended == [("a", 9), ("b", ConfigError), ("c", 11)]
    # Refused before anything was asked of anybody: the connection is still there.
    assert not callers.reports["c"].connected


async def test_those_that_wait_are_served_by_one_sync_to_the_newest_version() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy="coalesce") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            for name, version in (("a", 1), ("b", 2), ("c", 5), ("d", 3)):
                tasks.start_soon(callers.sync, name, version)

    assert callers.ended == [("a", 1), ("b", 5), ("c", 5), ("d", 5)]
    assert callers.reports["b"] is callers.reports["c"] is callers.reports["d"]
    assert begins(stage) == 2


async def test_what_wants_something_else_has_a_sync_of_its_own() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy="coalesce") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "a")
            tasks.start_soon(callers.sync, "b")
            tasks.start_soon(lambda: callers.sync("part", only={"scale"}))
            tasks.start_soon(lambda: callers.sync("dry", dry_run=True))
            tasks.start_soon(callers.sync, "c")

    assert dict(callers.ended) == {"a": 0, "b": 1, "c": 1, "part": 2, "dry": 3}
    assert begins(stage) == 4


async def test_when_the_one_that_serves_them_fails_the_others_get_turns_of_their_own() -> None:
    stage = Stage(replicas=1)
    trainer, seen = stage.trainers[1], []

    def die_once(request: Request) -> None:
        if isinstance(request, Begin):
            seen.append(request)
            trainer.dead = len(seen) == 2

    trainer.on_request = die_once
    async with group_of(stage, when_busy="coalesce") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(callers.sync, name)

    assert callers.ended == [("a", 0), ("b", ActorDied), ("c", 1)]


async def test_a_deadline_counts_from_the_call_and_not_from_the_turn() -> None:
    stage = Stage(replicas=1)
    release = anyio.Event()

    class Slow(type(stage.trainers[0].worker)):  # type: ignore[misc]
        async def before_sync(self, version: int) -> None:
            await release.wait()

    slow = Stage(replicas=1, kind=Slow)
    async with group_of(slow, when_busy="queue") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "first", 1)
            await anyio.lowlevel.checkpoint()
            with pytest.raises(
                SyncTimeout, match=r"the deadline of 0\.05 seconds passed behind another sync"
            ) as caught:
                await group.sync(2, deadline=0.05)

            assert caught.value.phase == "queue"
            release.set()

        assert callers.ended == [("first", 1)]
        # Nobody is left in line.
        assert (await group.sync(3)).version == 3


@pytest.mark.parametrize("when_busy", ["queue", "coalesce"])
async def test_who_is_cancelled_while_waiting_is_out_of_the_line(when_busy: str) -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy=when_busy) as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "a")
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(callers.sync, "b")
                    await anyio.lowlevel.checkpoint()
                    scope.cancel()

            tasks.start_soon(callers.sync, "c")

    assert callers.ended == [("a", 0), ("c", 1)]
    assert begins(stage) == 2


async def test_who_is_cancelled_in_his_turn_hands_it_on() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, when_busy="coalesce") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(lambda: callers.sync("a", progress=lambda receipt: scope.cancel()))
                    tasks.start_soon(callers.sync, "b")
                    tasks.start_soon(callers.sync, "c")

    assert callers.ended == [("b", 0), ("c", 0)]


async def test_closing_sends_away_those_that_wait() -> None:
    stage = Stage(replicas=1)
    group = group_of(stage, when_busy="queue")
    callers = Callers(group)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(callers.sync, "a")
        tasks.start_soon(callers.sync, "b")
        tasks.start_soon(callers.sync, "c")
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        await group.aclose()

    assert [kind for _, kind in callers.ended] == [GroupClosed] * 3
    # Nothing of the one that ran opened anything again behind the close.
    assert all(actor.agent._runs._sessions == {} for actor in stage.actors)


async def test_a_change_of_members_waits_for_its_turn_too() -> None:
    stage = Stage(replicas=2)
    async with group_of(stage, when_busy="queue") as group:
        callers = Callers(group)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(callers.sync, "a")
            tasks.start_soon(group.remove_replica, 1)
            tasks.start_soon(callers.sync, "b")

        assert group.versions() == {0: 1}
        assert callers.ended == [("a", 0), ("b", 1)]
