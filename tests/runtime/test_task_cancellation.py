"""``task.cancel()``, by which asyncio's own timeouts cancel: no shield of anyio's keeps it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from tests.runtime.local_actors import LocalActor, Stage, local
from wavecast.runtime import ConfigError, ModelGroup, ParameterSyncGroup, SyncError, SyncOptions
from wavecast.runtime.transfer.messages import Close, Request
from wavecast.runtime.undisturbed import undisturbed

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

#: More than any sync of a stage asks for.
_LAST = 60


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


def hold(actor: LocalActor, kind: type[Request]) -> tuple[asyncio.Event, asyncio.Event]:
    """Let ``actor`` answer requests of a kind late; return what is set when one has come, and what lets it go on."""
    came, go = asyncio.Event(), asyncio.Event()
    serve = actor._serve

    async def late(request: Request, *rest: object) -> bytes:
        if isinstance(request, kind):
            came.set()
            await go.wait()

        return await serve(request, *rest)  # type: ignore[arg-type]

    actor._serve = late  # type: ignore[method-assign, assignment]
    return came, go


def when_asked(stage: Stage, number: int, act: Callable[[], object]) -> None:
    """Call ``act`` as the request of this number arrives at the stage's actors, and at each one after it."""
    seen: list[Request] = []

    def look(request: Request) -> None:
        seen.append(request)
        if len(seen) >= number:
            act()

    for actor in stage.actors:
        actor.on_request = look


def leave_alone(stage: Stage) -> None:
    for actor in stage.actors:
        actor.on_request = lambda request: None


def unanswered(stage: Stage) -> list[LocalActor]:
    return [actor for actor in stage.actors if actor.owes()]


async def cancelled_when_closing(stage: Stage, actor: LocalActor, work: Coroutine[object, object, object]) -> None:
    """Cancel ``work`` twice while ``actor`` has not answered that it lets go."""
    came, go = hold(actor, Close)
    task = asyncio.ensure_future(work)
    await came.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("often", [False, True], ids=["once", "and again"])
@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_a_sync_that_is_cancelled_at_any_request_leaves_nothing_running_and_the_group_usable(
    staging: str, often: bool
) -> None:
    ends = 0
    for number in range(1, _LAST):
        stage = Stage()
        async with group_of(stage, staging=staging) as group:
            task = asyncio.ensure_future(group.sync(1))
            strikes = [task.cancel] if not often else [task.cancel] * 3
            when_asked(stage, number, lambda strikes=strikes: strikes.pop()() if strikes else None)  # type: ignore[misc]
            try:
                await task
            except asyncio.CancelledError:
                ends += 1

            assert unanswered(stage) == []
            leave_alone(stage)
            stage.fill(2.0)
            report = await group.sync()
            assert stage.values(0) == stage.values(1) == {2.0}
            assert group.versions() == {0: report.version, 1: report.version}

    # The last ones came after the sync was through.
    assert 20 < ends < _LAST - 1


async def test_a_replacement_is_made_whole_although_its_caller_is_cancelled() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)
        stage.fill(5.0)
        dead, fresh = stage.replicas[0][0], stage.actor(0)
        await cancelled_when_closing(stage, dead, group.replace(dead, fresh))
        stage.replicas[0][0] = fresh
        # It holds weights of two kinds, and nobody may take it for whole.
        assert group.versions() == {0: None, 1: 7}
        stage.replicas.append(stage.replica())
        assert await group.add_replica(stage.replicas[2], catch_up="peer") == 2
        assert stage.values(2) == {1.0}
        await group.sync()
        assert stage.values(0) == stage.values(1) == stage.values(2) == {5.0}


async def test_a_replica_is_removed_although_its_caller_is_cancelled() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)
        await cancelled_when_closing(stage, stage.replicas[0][0], group.remove_replica(0))
        assert group.versions() == {0: 7}
        report = await group.sync()
        assert group.versions() == {0: report.version}


async def test_a_group_is_closed_although_its_closer_is_cancelled() -> None:
    stage = Stage()
    group = group_of(stage)
    await group.sync(1)
    await cancelled_when_closing(stage, stage.trainers[1], group.aclose())
    assert [len(actor.agent._runs._sessions) for actor in stage.actors] == [0] * 6
    await group.aclose()
    assert [actor.kinds().count("Close") for actor in stage.actors] == [1] * 6


async def test_whoever_closes_second_waits_for_the_first() -> None:
    stage = Stage()
    group = group_of(stage)
    await group.sync(1)
    came, go = hold(stage.trainers[1], Close)
    closers = [asyncio.ensure_future(group.aclose()) for _ in range(2)]
    await came.wait()
    await asyncio.sleep(0)
    assert not any(closer.done() for closer in closers)
    go.set()
    await asyncio.gather(*closers)
    assert [len(actor.agent._runs._sessions) for actor in stage.actors] == [0] * 6


async def test_a_peer_that_has_another_version_than_the_group_believes_is_not_copied() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)
        fresh = stage.actor(0)
        # Behind the group's back another process has come to the actor's name.
        stage.replicas[0][0].agent = fresh.agent
        stage.replicas.append(stage.replica())
        with pytest.raises(SyncError, match="the peer to copy from has version None, not 7"):
            await group.add_replica(stage.replicas[2], catch_up="peer")

        assert group.versions()[2] is None
        assert stage.values(2) == {0.0}


@pytest.mark.parametrize("version", ["7", 2.5, True, -3, float("nan")])
async def test_a_version_that_is_no_count_is_refused(version: object) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        with pytest.raises(ConfigError, match="it must be a whole number and not negative"):
            await group.sync(version)  # type: ignore[arg-type]

        assert group.versions() == {0: None, 1: None}
        assert (await group.sync()).version == 0


async def test_undisturbed_work_ends_before_its_waiter_does() -> None:
    go = asyncio.Event()
    ended: list[str] = []

    async def work() -> str:
        await go.wait()
        ended.append("work")
        return "result"

    async def wait() -> None:
        try:
            await undisturbed(work())
        finally:
            ended.append("waiter")

    waiter = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.sleep(0)
    assert ended == []
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter

    assert ended == ["work", "waiter"]
    assert await undisturbed(work()) == "result"


async def test_what_undisturbed_work_raises_is_raised() -> None:
    async def work() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await undisturbed(work())
