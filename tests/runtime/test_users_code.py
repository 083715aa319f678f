"""The caller's own code, name maps and predicates, that takes its time: it holds up neither the loop nor a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import anyio
import pytest

from tests.runtime.local_actors import Stage, local
from wavecast.runtime import ModelGroup, ParameterSyncGroup, SyncOptions, SyncTimeout
from wavecast.runtime.transfer.messages import Described

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

_DEADLINE_SECONDS = 0.2
_LONG_SECONDS = 20.0


class Held:
    """Is called by the driver on some thread, and stays there until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        self.left = threading.Event()
        self.threads: set[int] = set()

    def wait(self) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.go.wait(_LONG_SECONDS)
        self.left.set()

    def name(self, own: str) -> str:
        self.wait()
        return own

    def picks(self, name: str) -> bool:
        self.wait()
        return name == "matrix"


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    # Whatever became of the test, no thread stays behind.
    made.go.set()


def group_of(stage: Stage, *, names: Held | None = None) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers], names=None if names is None else names.name),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(transport="gloo", chunk_bytes=1 << 8),
    )


async def tick_until_entered(held: Held, ticks: list[float]) -> None:
    """Be one of the trainer's own coroutines: go on while the driver's code is in the caller's hands."""
    await anyio.to_thread.run_sync(held.entered.wait, _LONG_SECONDS)
    ticks.append(time.monotonic())


async def times_out(group: ParameterSyncGroup, held: Held, **asked: object) -> None:
    """Sync while ``held`` holds; it must end in time, and others must go on meanwhile."""
    ticks: list[float] = []
    start = time.monotonic()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick_until_entered, held, ticks)
        with pytest.raises(SyncTimeout, match=r"deadline of 0\.2 seconds passed") as caught:
            await group.sync(1, deadline=_DEADLINE_SECONDS, **asked)  # type: ignore[arg-type]

    assert time.monotonic() - start <= _DEADLINE_SECONDS + 1
    assert caught.value.phase == "plan"
    assert ticks
    assert ticks[0] - start < _DEADLINE_SECONDS
    assert held.threads.isdisjoint({threading.get_ident()})
    assert not held.left.is_set()


async def test_a_name_map_that_does_not_return_ends_in_a_timeout_and_the_group_goes_on(held: Held) -> None:
    stage = Stage()
    async with group_of(stage, names=held) as group:
        await times_out(group, held)
        assert group._lineup.known.naming is None
        held.go.set()
        report = await group.sync(2)
        assert report.version == 2
        assert stage.values(0) == stage.values(1) == {1.0}
        assert group.versions() == {0: 2, 1: 2}


async def test_a_predicate_that_does_not_return_ends_in_a_timeout_and_the_group_goes_on(held: Held) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(0)
        prepared = group._lineup.known.prepared
        stage.fill(2.0)
        await times_out(group, held, only=held.picks)
        # Nothing was written, and what was known is known still.
        assert group.versions() == {0: 0, 1: 0}
        assert stage.values(0) == {1.0}
        assert group._lineup.known.prepared is prepared
        assert not (await group.sync(2)).planned
        assert stage.values(0) == stage.values(1) == {2.0}


async def test_what_an_abandoned_predicate_returns_later_changes_nothing(held: Held) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(0)
        prepared = group._lineup.known.prepared
        await times_out(group, held, only=held.picks)
        held.go.set()
        assert await anyio.to_thread.run_sync(held.left.wait, _LONG_SECONDS)
        assert group._lineup.known.prepared is prepared
        assert group._lineup.known.naming is not None
        report = await group.sync(2, only=held.picks)
        assert (report.planned, report.tensors) == (True, 1)


async def test_layouts_that_are_long_to_read_end_in_a_timeout(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    read = Described.layout

    def slow(self: Described) -> object:
        held.wait()
        return read(self)

    monkeypatch.setattr(Described, "layout", slow)
    async with group_of(stage) as group:
        start = time.monotonic()
        with pytest.raises(SyncTimeout) as caught:
            await group.sync(1, deadline=_DEADLINE_SECONDS)

        assert time.monotonic() - start <= _DEADLINE_SECONDS + 1
        assert caught.value.phase == "describe"
        assert group._lineup.known.layouts == {}
        held.go.set()
        await group.sync(1)
        assert stage.values(0) == {1.0}


async def test_a_sync_of_everything_takes_no_thread_to_select(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of every warm sync."""
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        hops: list[object] = []
        run_sync = anyio.to_thread.run_sync

        async def count(call: object, *args: object, **options: object) -> object:
            hops.append(call)
            return await run_sync(call, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr("wavecast.runtime.known.anyio.to_thread.run_sync", count)
        await group.sync(2)
        assert hops == []
        await group.sync(3, only=["matrix"])
        assert len(hops) == 2
