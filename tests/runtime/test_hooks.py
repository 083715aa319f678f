"""The users' hooks: when they are called, what they cost, and how each before_sync gets its end."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import cast

import anyio
import pytest

from tests.runtime.local_actors import Holder, Stage, holder, local
from tests.runtime.transfer.crew import SECONDS, ThreadHost, expect
from wavecast.runtime import ActorFailed, HookSeconds, ModelGroup, ParameterSyncGroup, SyncOptions, Torn
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.messages import (
    Abort,
    Began,
    Begin,
    Close,
    Done,
    Failure,
    Reply,
    Request,
    RunId,
    RunStep,
    decode,
    encode,
)
from wavecast.runtime.transfer.worker import overridden_hooks

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


class Hooked(Holder):
    """Notes its hooks, and fails in the one it is told to."""

    failing = ""

    def _note(self, hook: str, version: int) -> None:
        self.calls.append(f"{hook} {version}")
        if hook == self.failing:
            raise ValueError(f"{hook} is out of order")

    def before_sync(self, version: int) -> None:
        self._note("before_sync", version)

    def before_commit(self, version: int) -> None:
        self._note("before_commit", version)

    def after_commit(self, version: int) -> None:
        self._note("after_commit", version)

    def after_abort(self, version: int) -> None:
        self._note("after_abort", version)


class AsyncHooked(Hooked):
    """Waits in each."""

    async def before_sync(self, version: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self._note("before_sync", version)

    async def before_commit(self, version: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self._note("before_commit", version)

    async def after_commit(self, version: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self._note("after_commit", version)

    async def after_abort(self, version: int) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self._note("after_abort", version)


WHOLE_SYNC = ["before_sync 1", "transfer_shards", "before_commit 1", "after_commit 1"]


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", [Hooked, AsyncHooked])
async def test_hooks_are_called_in_order_on_both_sides(kind: type[Hooked]) -> None:
    stage = Stage(kind=kind)
    async with group_of(stage) as group:
        report = await group.sync(1)

    assert [holder(actor).calls for actor in stage.actors] == [WHOLE_SYNC] * 6
    assert min(report.hooks.before_sync, report.hooks.before_commit, report.hooks.after_commit) > 0
    assert [actor.kinds().count("RunHook") for actor in stage.actors] == [2] * 6


async def test_hooks_that_are_not_overridden_cost_no_round_trip() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        report = await group.sync(1)

    assert report.hooks.before_commit == report.hooks.after_commit == 0
    assert all("RunHook" not in actor.kinds() for actor in stage.actors)
    assert overridden_hooks(stage.trainers[0].worker) == {}
    assert HookSeconds() == HookSeconds(0.0, 0.0, 0.0)


def test_an_inherited_hook_that_is_wrapped_is_nobodys_own() -> None:
    """As Ray does with every method of an actor class."""

    class Wrapped(Holder):
        """Has one of its own."""

        def before_commit(self, version: int) -> None:
            pass

    for name in ("before_sync", "before_commit"):
        method = getattr(Wrapped, name)
        setattr(Wrapped, name, functools.wraps(method)(lambda self, version, method=method: method(self, version)))

    assert list(overridden_hooks(Wrapped(0, 2, 4, 1.0))) == ["before_commit"]


async def test_a_dry_run_ends_in_an_abort() -> None:
    stage = Stage(replicas=1, kind=Hooked)
    async with group_of(stage) as group:
        await group.sync(1, dry_run=True)

    assert [holder(actor).calls for actor in stage.actors] == [
        ["before_sync 1", "transfer_shards", "after_abort 1"]
    ] * 4


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_when_one_may_not_commit_no_replica_does(staging: str) -> None:
    stage = Stage(kind=Hooked)
    async with group_of(stage, staging=staging) as group:
        await group.sync(1)
        stage.fill(2.0)
        engine = holder(stage.replicas[1][1])
        assert isinstance(engine, Hooked)
        engine.failing = "before_commit"
        with pytest.raises(ActorFailed, match="ValueError: before_commit is out of order") as caught:
            await group.sync(2)

        assert (caught.value.phase, caught.value.actors) == ("commit", (5,))
        expected = {0: Torn(1, 2), 1: Torn(1, 2)} if staging == "in_place" else {0: 1, 1: 1}
        assert caught.value.versions == expected
        assert await group.refresh() == expected
        assert stage.values(0) == ({2.0} if staging == "in_place" else {1.0})
        assert [holder(actor).calls[-1] for actor in stage.actors] == ["after_abort 2"] * 6
        engine.failing = ""
        await group.sync(2)
        assert stage.values(0) == stage.values(1) == {2.0}


async def test_a_hook_that_fails_after_the_commit_leaves_all_on_the_new_version() -> None:
    stage = Stage(kind=Hooked)
    async with group_of(stage) as group:
        engine = holder(stage.replicas[0][0])
        assert isinstance(engine, Hooked)
        engine.failing = "after_commit"
        with pytest.raises(ActorFailed, match="after_commit is out of order") as caught:
            await group.sync(1)

        assert caught.value.versions == {0: 1, 1: 1}
        assert [holder(actor).calls for actor in stage.actors] == [WHOLE_SYNC] * 6
        assert await group.refresh() == {0: 1, 1: 1}


async def test_who_fails_in_before_sync_gets_its_end_too() -> None:
    stage = Stage(replicas=1, kind=Hooked)
    engine = holder(stage.replicas[0][0])
    assert isinstance(engine, Hooked)
    engine.failing = "before_sync"
    async with group_of(stage) as group:
        with pytest.raises(ActorFailed, match="before_sync is out of order") as caught:
            await group.sync(1)

        assert (caught.value.phase, caught.value.versions) == ("describe", {0: None})

    assert engine.calls == ["before_sync 1", "after_abort 1"]
    assert [holder(actor).calls[-1] for actor in stage.actors] == ["after_abort 1"] * 4


async def test_a_cancelled_sync_resumes_the_engines() -> None:
    stage = Stage(replicas=1, kind=AsyncHooked)
    async with group_of(stage) as group:
        with anyio.CancelScope() as scope:
            await group.sync(1, progress=lambda receipt: scope.cancel())

        assert scope.cancelled_caught
        assert [holder(actor).calls[-1] for actor in stage.actors] == ["after_abort 1"] * 4
        await group.sync(1)

    assert [holder(actor).calls[-1] for actor in stage.actors] == ["after_commit 1"] * 4


async def test_an_engine_that_a_lost_driver_left_behind_resumes_as_the_next_one_begins() -> None:
    stage = Stage(replicas=1, kind=Hooked)
    lost: list[Request] = []
    group = group_of(stage)

    class Gone(Exception):
        """The driver's end."""

    def vanish(request: Request) -> None:
        if isinstance(request, RunStep):
            lost.append(request)
            raise Gone

    stage.trainers[0].on_request = vanish
    # Nobody hears of the end: the actors are left in their run.
    group._lineup.known.actors.abort = _nothing  # type: ignore[method-assign, assignment]
    with pytest.raises(Exception, match="Gone"):
        await group.sync(1)

    assert lost
    assert holder(stage.replicas[0][0]).calls == ["before_sync 1", "transfer_shards"]
    stage.trainers[0].on_request = lambda request: None
    async with group_of(stage) as second:
        await second.sync(2)

    assert holder(stage.replicas[0][0]).calls[2:] == [
        "after_abort 1",
        "before_sync 2",
        "transfer_shards",
        "before_commit 2",
        "after_commit 2",
    ]


def ask(worker: Holder, request: Request) -> Reply:
    return cast("Reply", decode(worker.wavecast_request(encode((request, ThreadHost())))))


async def _nothing(*args: object) -> None:
    pass


def test_an_awaitable_runs_on_a_plain_actor_too() -> None:
    class Returns(Hooked):
        def before_sync(self, version: int):  # type: ignore[no-untyped-def]
            return AsyncHooked.before_sync(self, version)  # type: ignore[arg-type]

    worker = Returns(0, 2, 4, 1.0)
    (began,) = expect(Began, [ask(worker, Begin(RunId("group", 1), 0, version=3))])
    assert worker.calls == ["before_sync 3", "transfer_shards"]
    assert began.hooks == ("before_sync", "before_commit", "after_commit", "after_abort")
    assert isinstance(ask(worker, Close("group")), Done)
    assert worker.calls[-1] == "after_abort 3"


def test_a_run_given_up_while_its_hook_is_called_ends_behind_the_hook() -> None:
    """On a threaded actor: the abort comes on another thread."""
    entered, gate = threading.Event(), threading.Event()
    calls: list[str] = []

    def before_sync(version: int) -> None:
        calls.append("in")
        entered.set()
        assert gate.wait(SECONDS)
        calls.append("out")

    agent = Agent(list, hooks={"before_sync": before_sync, "after_abort": lambda version: calls.append("after_abort")})
    run, replies = RunId("group", 1), []
    thread = threading.Thread(target=lambda: replies.append(agent.serve(Begin(run, 0, version=1), ThreadHost())))
    thread.start()
    assert entered.wait(SECONDS)
    # Nor may another run begin meanwhile.
    busy = agent.serve(Begin(RunId("other", 2), 0, version=2), ThreadHost())
    assert isinstance(busy, Failure)
    assert busy.kind == "SyncInProgress"
    assert isinstance(agent.serve(Abort(run, "the test gave it up"), ThreadHost()), Done)
    assert calls == ["in"]
    gate.set()
    thread.join(SECONDS)
    assert calls == ["in", "out", "after_abort"]
    (reply,) = replies
    assert isinstance(reply, Failure)
    assert reply.kind == "SyncAborted"


def test_what_after_abort_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(version: int) -> None:
        raise ValueError("cannot resume")

    agent = Agent(list, hooks={"after_abort": fail})
    run = RunId("group", 1)
    assert isinstance(agent.serve(Begin(run, 0, version=1), ThreadHost()), Began)
    assert isinstance(agent.serve(Abort(run, "the test gave it up"), ThreadHost()), Done)
    assert "after_abort(1) failed" in caplog.text
    assert "cannot resume" in caplog.text


def test_a_peer_that_lends_its_weights_is_not_disturbed() -> None:
    worker = Hooked(0, 2, 4, 1.0)
    ask(worker, Begin(RunId("group", 1), 0, version=None))
    assert worker.calls == ["transfer_shards"]
