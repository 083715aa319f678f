"""The hooks of one sync on an actor never run into those of another, and nobody waits for them without end."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tests.runtime.local_actors import Holder, Stage, holder, local
from tests.runtime.transfer.crew import SECONDS, ThreadHost
from wavecast.runtime import ModelGroup, ParameterSyncGroup, SyncOptions, SyncTimeout
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.messages import Abort, Began, Begin, Close, Done, Failure, Reply, Request, RunId, RunStep

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


class Engine(Holder):
    """Pauses and resumes as an engine with an event loop does; its resume can be held."""

    def __init__(self, first: int, rows: int, of: int, value: float) -> None:
        super().__init__(first, rows, of, value)
        self.resuming = asyncio.Event()
        self.may_resume = asyncio.Event()
        self.may_resume.set()

    async def before_sync(self, version: int) -> None:
        self.calls.append(f"pause {version}")

    async def after_commit(self, version: int) -> None:
        self.calls.append(f"resume {version}")

    async def after_abort(self, version: int) -> None:
        self.calls.append(f"resume {version}..")
        self.resuming.set()
        await self.may_resume.wait()
        self.calls.append(f"..resumed {version}")


def group_of(stage: Stage) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(transport="gloo", chunk_bytes=1 << 8),
    )


def engine_of(stage: Stage) -> Engine:
    found = holder(stage.replicas[0][0])
    assert isinstance(found, Engine)
    return found


async def fail_one(stage: Stage, group: ParameterSyncGroup) -> None:
    """Sync to version 1 and fail in a step, with the engine's ``after_abort`` held."""
    engine_of(stage).may_resume.clear()

    def fail(request: Request) -> None:
        if isinstance(request, RunStep):
            raise ValueError("the test fails the step")

    stage.trainers[0].on_request = fail
    with pytest.raises(Exception, match="the test fails the step"):
        await group.sync(1, deadline=SECONDS)

    stage.trainers[0].on_request = lambda request: None
    await engine_of(stage).resuming.wait()


async def test_the_next_sync_pauses_an_engine_only_once_it_has_resumed_from_the_last() -> None:
    stage = Stage(replicas=1, kind=Engine)
    async with group_of(stage) as group:
        await fail_one(stage, group)
        engine = engine_of(stage)
        second = asyncio.ensure_future(group.sync(2, deadline=SECONDS))
        begun = asyncio.Event()

        def look(request: Request) -> None:
            if isinstance(request, Begin):
                begun.set()

        stage.replicas[0][0].on_request = look
        await begun.wait()
        # The begin has come and waits; the others' have been answered.
        for _ in range(20):
            await asyncio.sleep(0)

        assert engine.calls == ["pause 1", "transfer_shards", "resume 1.."]
        engine.may_resume.set()
        await second

    assert engine.calls == [
        "pause 1",
        "transfer_shards",
        "resume 1..",
        "..resumed 1",
        "pause 2",
        "transfer_shards",
        "resume 2",
    ]


async def test_a_sync_behind_an_engine_that_does_not_resume_ends_at_its_deadline_and_the_one_after_goes_on() -> None:
    stage = Stage(replicas=1, kind=Engine)
    async with group_of(stage) as group:
        await fail_one(stage, group)
        engine = engine_of(stage)
        start = time.monotonic()
        with pytest.raises(SyncTimeout) as caught:
            await group.sync(2, deadline=0.2)

        assert time.monotonic() - start <= 1.2
        assert (caught.value.phase, caught.value.actors) == ("describe", (2,))
        engine.may_resume.set()
        await group.sync(3, deadline=SECONDS)

    # The begin that was given up has called nothing.
    assert engine.calls[2:] == ["resume 1..", "..resumed 1", "pause 3", "transfer_shards", "resume 3"]
    assert stage.values(0) == {1.0}


class Threaded:
    """An agent on threads, with hooks that note themselves; one of them can be held."""

    def __init__(self, held: str = "after_abort") -> None:
        self.calls: list[str] = []
        self.held = held
        self.entered, self.go = threading.Event(), threading.Event()
        self.agent = Agent(
            list, hooks={name: self._hook(name) for name in ("before_sync", "after_commit", "after_abort")}
        )
        self.replies: list[Reply] = []

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def call(version: int) -> None:
            self.calls.append(f"{name} {version}")
            if name == self.held and not self.entered.is_set():
                self.entered.set()
                assert self.go.wait(SECONDS)
                self.calls.append(f"{name} {version} is over")

        return call

    def ask(self, request: Request, host: ThreadHost | None = None) -> Reply:
        return self.agent.serve(request, host or ThreadHost())

    def start(self, request: Request, host: ThreadHost | None = None) -> threading.Thread:
        thread = threading.Thread(target=lambda: self.replies.append(self.ask(request, host)))
        thread.start()
        return thread


@pytest.mark.parametrize("end", [Abort(RunId("group", 1), "the test"), Close("group")], ids=["abort", "close"])
def test_on_threads_a_begin_waits_for_the_end_of_the_run_before(end: Request) -> None:
    actor = Threaded()
    assert isinstance(actor.ask(Begin(RunId("group", 1), 0, version=1)), Began)
    ending = actor.start(end)
    assert actor.entered.wait(SECONDS)
    asked = threading.Event()

    class Waiting(ThreadHost):
        def cancelled(self) -> bool:
            # Looked at by calls that wait.
            asked.set()
            return False

    begin = actor.start(Begin(RunId("other", 2), 0, version=2), Waiting())
    assert asked.wait(SECONDS)
    assert actor.calls == ["before_sync 1", "after_abort 1"]
    actor.go.set()
    for thread in (ending, begin):
        thread.join(SECONDS)

    assert actor.calls == ["before_sync 1", "after_abort 1", "after_abort 1 is over", "before_sync 2"]
    assert sorted(type(reply).__name__ for reply in actor.replies) == ["Began", "Done"]


def test_on_threads_a_begin_that_is_cancelled_leaves_the_line_and_calls_nothing() -> None:
    actor = Threaded()
    actor.ask(Begin(RunId("group", 1), 0, version=1))
    ending = actor.start(Abort(RunId("group", 1), "the test"))
    assert actor.entered.wait(SECONDS)
    given_up = ThreadHost()
    given_up.ended = True
    failure = actor.ask(Begin(RunId("group", 2), 0, version=2), given_up)
    assert isinstance(failure, Failure)
    assert (failure.kind, "behind the hooks" in failure.message) == ("SyncAborted", True)
    # Its own abort finds nothing to end.
    assert isinstance(actor.ask(Abort(RunId("group", 2), "the test")), Done)
    actor.go.set()
    ending.join(SECONDS)
    assert isinstance(actor.ask(Begin(RunId("group", 3), 0, version=3)), Began)
    assert actor.calls == ["before_sync 1", "after_abort 1", "after_abort 1 is over", "before_sync 3"]


def test_on_threads_a_begin_waits_for_a_hook_whose_run_was_given_up_and_for_its_end() -> None:
    actor = Threaded("before_sync")
    first = actor.start(Begin(RunId("group", 1), 0, version=1))
    assert actor.entered.wait(SECONDS)
    assert isinstance(actor.ask(Abort(RunId("group", 1), "the test")), Done)
    second = actor.start(Begin(RunId("group", 2), 0, version=2))
    actor.go.set()
    for thread in (first, second):
        thread.join(SECONDS)

    assert actor.calls == ["before_sync 1", "before_sync 1 is over", "after_abort 1", "before_sync 2"]


async def test_an_end_that_is_itself_cancelled_lets_the_next_begin_go_on() -> None:
    """As when the actor's own code cancels what runs on its loop."""
    calls: list[str] = []
    resuming = asyncio.Event()

    async def after_abort(version: int) -> None:
        calls.append(f"after_abort {version}")
        resuming.set()
        await asyncio.Event().wait()

    agent = Agent(list, hooks={"after_abort": after_abort, "before_sync": lambda version: calls.append("before_sync")})
    host = ThreadHost()
    assert isinstance(await agent.serve_async(Begin(RunId("group", 1), 0, version=1), host), Began)
    ending = asyncio.ensure_future(agent.serve_async(Abort(RunId("group", 1), "the test"), host))
    await resuming.wait()
    first = asyncio.ensure_future(agent.serve_async(Begin(RunId("group", 2), 0, version=2), host))
    second = asyncio.ensure_future(agent.serve_async(Begin(RunId("group", 3), 0, version=3), host))
    await asyncio.sleep(0)
    # One of two that wait goes: the other must not hear of it.
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first

    assert not second.done()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending

    assert isinstance(await second, Began)
    assert calls == ["before_sync", "after_abort 1", "before_sync"]


def test_what_is_raised_by_the_end_of_a_run_does_not_hold_up_the_next_one() -> None:
    calls: list[int] = []

    def fail(version: int) -> None:
        calls.append(version)
        raise ValueError("cannot resume")

    agent = Agent(list, hooks={"after_abort": fail})
    for serial in (1, 2):
        run = RunId("group", serial)
        assert isinstance(agent.serve(Begin(run, 0, version=serial), ThreadHost()), Began)
        assert isinstance(agent.serve(Abort(run, "the test"), ThreadHost()), Done)

    assert calls == [1, 2]
