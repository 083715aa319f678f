"""A run that is cancelled, wherever it stands, aborts once and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from wavecast.scheduler import Task, TaskFailed, plan_waves, run

pytestmark = pytest.mark.anyio


class Actors:
    """Dispatches that count what is running, and an abort that remembers its calls."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.done: list[int] = []
        self.aborts: list[list[int]] = []

    async def dispatch(self, task: Task) -> None:
        self.running.add(task.id)
        try:
            for _ in range(3):
                await checkpoint()

            self.done.append(task.id)
        finally:
            self.running.discard(task.id)

    async def abort(self, tasks: tuple[Task, ...]) -> None:
        self.aborts.append([task.id for task in tasks])
        await checkpoint()
        await checkpoint()


TASKS = [Task(id, (id % 3,), (3 + id % 2,), 1) for id in range(12)]


@pytest.mark.parametrize("steps", range(26))
@pytest.mark.parametrize("lookahead", [None, 0])
async def test_a_run_cancelled_at_any_step_aborts_once_and_leaves_nothing_running(
    steps: int, lookahead: int | None
) -> None:
    actors = Actors()
    finished = False

    async def main() -> None:
        nonlocal finished
        await run(plan_waves(TASKS), actors.dispatch, abort=actors.abort, lookahead=lookahead)
        finished = True

    async with anyio.create_task_group() as group:
        group.start_soon(main)
        for _ in range(steps):
            await checkpoint()

        group.cancel_scope.cancel()

    assert not actors.running
    assert len(actors.aborts) <= 1
    assert not (finished and actors.aborts)
    if actors.aborts:
        assert not set(actors.aborts[0]) & set(actors.done)


async def test_a_cancelled_caller_sees_the_cancellation_not_an_error() -> None:
    aborted: list[int] = []

    async def abort(tasks: tuple[Task, ...]) -> None:
        await checkpoint()  # would raise, were it not shielded
        aborted.append(len(tasks))

    with anyio.move_on_after(0.01) as scope:
        await run(plan_waves(TASKS[:2]), lambda task: anyio.sleep_forever(), abort=abort)

    assert scope.cancelled_caught
    assert aborted == [2]


async def test_a_cancelled_callers_abort_is_bounded() -> None:
    with anyio.fail_after(5), anyio.move_on_after(0.01) as scope:
        await run(
            plan_waves(TASKS[:1]),
            lambda task: anyio.sleep_forever(),
            abort=lambda tasks: anyio.sleep_forever(),
            abort_seconds=0.01,
        )

    assert scope.cancelled_caught


async def test_a_run_in_a_cancelled_scope_dispatches_no_more_than_it_aborts() -> None:
    actors = Actors()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await run(plan_waves(TASKS), actors.dispatch, abort=actors.abort)

    assert scope.cancelled_caught
    assert not actors.running
    assert not actors.done


async def test_coroutines_that_were_made_but_never_awaited_are_closed() -> None:
    # Warnings are errors here: a coroutine that is thrown away unawaited would fail this test.
    async def work() -> None:
        raise AssertionError("must not start")

    def dispatch(task: Task) -> Awaitable[None]:
        if task.id == 5:
            raise ValueError("the sixth call")

        return work()

    with pytest.raises(TaskFailed):
        await run(plan_waves([Task(id, (id,), (id + 9,), 1) for id in range(8)]), dispatch)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_futures_that_were_made_but_never_awaited_are_cancelled() -> None:
    futures: list[asyncio.Future[None]] = []

    def dispatch(task: Task) -> Awaitable[None]:
        if task.id == 5:
            raise ValueError("the sixth call")

        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    with pytest.raises(TaskFailed):
        await run(plan_waves([Task(id, (id,), (id + 9,), 1) for id in range(8)]), dispatch)

    assert len(futures) == 5
    assert all(future.cancelled() for future in futures)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_future_cancelled_by_somebody_else_is_a_failure_not_a_hang() -> None:
    future = asyncio.get_running_loop().create_future()
    failures: list[TaskFailed] = []

    async def main() -> None:
        try:
            await run(plan_waves(TASKS[:1]), lambda task: future)
        except TaskFailed as exc:
            failures.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(main)
        await wait_all_tasks_blocked()
        future.cancel()

    assert isinstance(failures[0].__cause__, asyncio.CancelledError)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("deadline", [None, 60.0])
@pytest.mark.parametrize("which", [0, 2])
async def test_a_dispatch_that_looks_into_a_cancelled_future_has_failed(which: int, deadline: float | None) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    chain = [Task(id, (0,), (1,), 1) for id in range(5)]

    async def nothing() -> None:
        pass

    def dispatch(task: Task) -> Awaitable[None]:
        if task.id == which:
            future.result()

        return nothing()

    with pytest.raises(TaskFailed) as caught:
        await run(plan_waves(chain), dispatch, deadline=deadline)

    assert caught.value.task.id == which
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_plain_asyncio_cancel_aborts_too() -> None:
    actors = Actors()
    task = asyncio.create_task(run(plan_waves(TASKS), actors.dispatch, abort=actors.abort))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert len(actors.aborts) == 1
    assert not actors.running


@pytest.mark.parametrize("deadline", [None, 60.0])
@pytest.mark.parametrize("failing", [0, 2])
async def test_a_dispatch_that_raises_a_cancellation_of_its_own_fails_its_task(
    anyio_backend_name: str, deadline: float | None, failing: int
) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("trio's cancellations cannot be raised by hand")

    actors = Actors()

    def dispatch(task: Task) -> Awaitable[None]:
        if task.id == failing:
            raise asyncio.CancelledError("somebody else's future")

        return actors.dispatch(task)

    with pytest.raises(TaskFailed, match=f"task {failing} of wave .* failed: CancelledError") as caught:
        await run(plan_waves(TASKS), dispatch, abort=actors.abort, deadline=deadline)

    assert caught.value.task.id == failing
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert not actors.running
    assert [ids[0] for ids in actors.aborts] == [failing]


WIDE = [Task(0, tuple(range(9)), (50,), 1), *(Task(id, (id - 1,), (100 + id,), 1) for id in range(1, 10))]


class Log:
    """What began and what was aborted, in the order of the calls. A dispatch begins when its body does."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    async def dispatch(self, task: Task) -> None:
        self.entries.append(f"begin {task.id}")
        for _ in range(2):
            await checkpoint()

    async def abort(self, tasks: tuple[Task, ...]) -> None:
        self.entries.append("abort")
        for _ in range(3):
            await checkpoint()

    @property
    def after_the_abort(self) -> list[str]:
        return self.entries[self.entries.index("abort") + 1 :] if "abort" in self.entries else []


@pytest.mark.parametrize("steps", range(16))
@pytest.mark.parametrize("tasks", [TASKS, WIDE], ids=["narrow", "wide"])
async def test_no_coroutine_of_a_cancelled_run_begins_after_its_abort(tasks: list[Task], steps: int) -> None:
    log = Log()
    schedule = plan_waves(tasks)

    async def main() -> None:
        await run(schedule, log.dispatch, abort=log.abort)

    async with anyio.create_task_group() as group:
        group.start_soon(main)
        for _ in range(steps):
            await checkpoint()

        group.cancel_scope.cancel()

    assert log.after_the_abort == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("steps", range(16))
@pytest.mark.parametrize("tasks", [TASKS, WIDE], ids=["narrow", "wide"])
async def test_no_coroutine_begins_after_the_abort_of_a_plain_asyncio_cancel(tasks: list[Task], steps: int) -> None:
    log = Log()
    task = asyncio.create_task(run(plan_waves(tasks), log.dispatch, abort=log.abort))
    for _ in range(steps):
        await asyncio.sleep(0)

    task.cancel()
    await asyncio.wait([task])
    assert log.after_the_abort == []
