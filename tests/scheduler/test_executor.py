from __future__ import annotations

import pickle
import random
import time
from collections.abc import Awaitable

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from wavecast.scheduler import (
    RunReport,
    RunTimeout,
    Schedule,
    Task,
    TaskFailed,
    TaskReceipt,
    TaskTimeout,
    Wave,
    plan_waves,
    run,
)

pytestmark = pytest.mark.anyio


class Board:
    """A dispatch whose tasks end when the test says so."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.events: dict[int, anyio.Event] = {}

    async def dispatch(self, task: Task) -> str:
        self.calls.append(task.id)
        self.events[task.id] = anyio.Event()
        await self.events[task.id].wait()
        return f"done {task.id}"

    async def end(self, *ids: int) -> list[int]:
        """End these tasks, and return those that were dispatched thereupon."""
        before = len(self.calls)
        for id in ids:
            self.events[id].set()

        await wait_all_tasks_blocked()
        return sorted(self.calls[before:])


def skewed() -> Schedule:
    tasks = [Task(0, (0,), (2,), 9), Task(1, (1,), (3,), 1), Task(2, (1,), (4,), 2), Task(3, (0,), (3,), 3)]
    return Schedule((Wave((tasks[0], tasks[1])), Wave((tasks[2], tasks[3]))))


async def run_into(found: list[RunReport], schedule: Schedule, board: Board, lookahead: int | None) -> None:
    found.append(await run(schedule, board.dispatch, lookahead=lookahead))


async def test_a_strict_barrier_waits_for_the_whole_wave() -> None:
    board = Board()
    found: list[RunReport] = []
    async with anyio.create_task_group() as group:
        group.start_soon(run_into, found, skewed(), board, 0)
        await wait_all_tasks_blocked()
        assert sorted(board.calls) == [0, 1]
        assert await board.end(1) == []
        assert await board.end(0) == [2, 3]
        await board.end(3, 2)

    assert [receipt.task for receipt in found[0].receipts] == [0, 1, 2, 3]


async def test_lookahead_dispatches_as_soon_as_the_members_are_free() -> None:
    board = Board()
    found: list[RunReport] = []
    async with anyio.create_task_group() as group:
        group.start_soon(run_into, found, skewed(), board, None)
        await wait_all_tasks_blocked()
        assert sorted(board.calls) == [0, 1]
        assert await board.end(1) == [2]
        assert await board.end(0) == [3]
        await board.end(3, 2)

    assert [receipt.value for receipt in found[0].receipts] == ["done 0", "done 1", "done 2", "done 3"]


async def test_a_task_waits_for_those_it_comes_after() -> None:
    tasks = [Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1, after=(0,))]
    board = Board()
    found: list[RunReport] = []
    async with anyio.create_task_group() as group:
        group.start_soon(run_into, found, plan_waves(tasks), board, None)
        await wait_all_tasks_blocked()
        assert board.calls == [0]
        assert await board.end(0) == [1]
        await board.end(1)

    assert len(found) == 1


async def test_receipts_are_in_task_order_and_tell_when() -> None:
    async def dispatch(task: Task) -> int:
        for _ in range(10 - task.id):
            await checkpoint()

        return task.id * 10

    tasks = [Task(id, (id,), (id + 10,), id) for id in range(4)] + [Task(4, (0,), (11,), 100)]
    seen: list[TaskReceipt] = []

    report = await run(plan_waves(tasks, strategy="first_fit"), dispatch, on_receipt=seen.append)

    assert [receipt.task for receipt in report.receipts] == [0, 1, 2, 3, 4]
    assert [receipt.value for receipt in report.receipts] == [0, 10, 20, 30, 40]
    assert [(wave.wave, wave.nbytes) for wave in report.waves] == [(0, 6), (1, 100)]
    assert report.nbytes == 106
    assert sorted(receipt.task for receipt in seen) == [0, 1, 2, 3, 4]
    for receipt in report.receipts:
        assert 0 <= receipt.started <= receipt.finished <= report.seconds
        assert receipt.seconds == receipt.finished - receipt.started

    last = report.receipts[-1]
    assert last.started >= max(report.receipts[0].finished, report.receipts[1].finished)
    assert report.waves[1].seconds == last.seconds
    assert report.seconds == max(report.waves[0].finished, report.waves[1].finished)


async def test_nothing_to_do_returns_at_once() -> None:
    async def dispatch(task: Task) -> None:
        raise AssertionError(task)

    assert await run(plan_waves([]), dispatch) == RunReport(0.0, ())


async def test_several_in_flight_keep_each_actors_wave_order() -> None:
    rng = random.Random(4)
    tasks = [Task(id, (rng.randrange(4),), (4 + rng.randrange(3),), 1) for id in range(60)]
    schedule = plan_waves(tasks)
    running: dict[int, int] = {}
    peak = 0
    order: dict[int, list[int]] = {}

    def dispatch(task: Task) -> Awaitable[None]:
        nonlocal peak
        for actor in task.members:
            running[actor] = running.get(actor, 0) + 1
            peak = max(peak, running[actor])
            order.setdefault(actor, []).append(task.id)

        async def work() -> None:
            for _ in range(rng.randrange(4)):
                await checkpoint()

            for actor in task.members:
                running[actor] -= 1

        return work()

    await run(schedule, dispatch, in_flight=3)

    assert peak == 3
    for actor, ids in order.items():
        assert ids == [task.id for task in schedule.tasks if actor in task.members]


async def test_dispatches_that_never_suspend_leave_room_for_others() -> None:
    async def dispatch(task: Task) -> None:
        return None

    rounds = 0

    async def bystander() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await checkpoint()

    schedule = plan_waves([Task(id, (0,), (1,), 1) for id in range(400)])
    async with anyio.create_task_group() as group:
        group.start_soon(bystander)
        await run(schedule, dispatch)
        group.cancel_scope.cancel()

    assert rounds > 20


async def test_dispatches_that_take_the_loop_long_are_paused_between() -> None:
    since = longest = 0

    def dispatch(task: Task) -> Awaitable[None]:
        nonlocal since, longest
        since += 1
        longest = max(longest, since)
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass

        return checkpoint()

    async def bystander() -> None:
        nonlocal since
        while True:
            since = 0
            await checkpoint()

    # Two waves of 40 tasks: the second is set free by completions that all come in one turn of the loop.
    schedule = plan_waves([Task(id, (id % 40,), (40 + id % 40,), 1) for id in range(80)])
    async with anyio.create_task_group() as group:
        group.start_soon(bystander)
        await checkpoint()
        await run(schedule, dispatch)
        group.cancel_scope.cancel()

    assert longest <= 10


async def test_waves_without_tasks_have_nothing_to_wait_for() -> None:
    async def dispatch(task: Task) -> None:
        raise AssertionError(task)

    report = await run(Schedule((Wave(()), Wave(()))), dispatch)

    assert [wave.receipts for wave in report.waves] == [(), ()]


async def test_what_fails_while_winding_down_does_not_hide_the_deadline() -> None:
    async def dispatch(task: Task) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("the connection was reset")

    with pytest.raises(RunTimeout) as caught:
        await run(plan_waves([Task(0, (0,), (1,), 1)]), dispatch, deadline=0.01)

    assert [str(exc) for exc in caught.value.others] == ["the connection was reset"]


async def test_the_first_failure_names_its_task_and_keeps_the_rest() -> None:
    board = Board()
    aborted: list[list[int]] = []

    async def abort(tasks: tuple[Task, ...]) -> None:
        aborted.append([task.id for task in tasks])

    async def dispatch(task: Task) -> str:
        value = await board.dispatch(task)
        if task.id == 2:
            raise LookupError("no such tensor")

        return value

    tasks = [Task(0, (0,), (10,), 1), Task(1, (1,), (11,), 1), Task(2, (2,), (12,), 5), Task(3, (2,), (10,), 1)]
    caught: list[TaskFailed] = []

    async def main() -> None:
        try:
            await run(plan_waves(tasks, strategy="first_fit"), dispatch, abort=abort)
        except TaskFailed as exc:
            caught.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(main)
        await wait_all_tasks_blocked()
        await board.end(0)
        await board.end(2)

    error = caught[0]
    assert str(error) == ("task 2 of wave 0 ((2,) -> (12,), 5 bytes) failed: LookupError('no such tensor')")
    assert isinstance(error.__cause__, LookupError)
    assert error.task is tasks[2]
    assert [receipt.task for receipt in error.receipts] == [0]
    assert (error.others, error.abort_error) == ((), None)
    assert aborted == [[2, 1]]
    assert sorted(board.calls) == [0, 1, 2]


async def test_failures_at_the_same_moment_are_kept_beside_the_first() -> None:
    gate = anyio.Event()

    async def dispatch(task: Task) -> None:
        await gate.wait()
        raise ValueError(task.id)

    caught: list[TaskFailed] = []

    async def main() -> None:
        try:
            await run(plan_waves([Task(id, (id,), (id + 9,), 1) for id in range(3)]), dispatch)
        except TaskFailed as exc:
            caught.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(main)
        await wait_all_tasks_blocked()
        gate.set()

    error = caught[0]
    assert isinstance(error.__cause__, ValueError)
    assert sorted([error.__cause__.args[0], *(exc.args[0] for exc in error.others)]) == [0, 1, 2]


async def test_a_dispatch_that_raises_before_it_returns_is_a_failure_too() -> None:
    aborted: list[tuple[Task, ...]] = []

    def dispatch(task: Task) -> Awaitable[None]:
        if task.id == 1:
            raise ConnectionError("actor is dead")

        return anyio.sleep_forever()

    async def abort(tasks: tuple[Task, ...]) -> None:
        aborted.append(tasks)

    tasks = [Task(id, (id,), (id + 9,), 1) for id in range(3)]
    with pytest.raises(TaskFailed, match=r"task 1 of wave 0 .* failed: ConnectionError") as caught:
        await run(plan_waves(tasks), dispatch, abort=abort)

    assert isinstance(caught.value.__cause__, ConnectionError)
    assert aborted == [(tasks[1], tasks[0])]


async def test_what_cannot_be_awaited_is_a_failure_too() -> None:
    with pytest.raises(TaskFailed, match="failed: TypeError"):
        await run(plan_waves([Task(0, (0,), (1,), 1)]), lambda task: None)  # type: ignore[arg-type, return-value]


async def test_a_receipt_callback_that_raises_fails_the_task() -> None:
    async def dispatch(task: Task) -> None:
        await checkpoint()

    def on_receipt(receipt: TaskReceipt) -> None:
        raise RuntimeError("the progress bar broke")

    with pytest.raises(TaskFailed, match="the progress bar broke"):
        await run(plan_waves([Task(0, (0,), (1,), 1)]), dispatch, on_receipt=on_receipt)


async def test_the_deadline_names_what_is_unfinished() -> None:
    aborted: list[list[int]] = []

    async def dispatch(task: Task) -> None:
        if task.id:
            await anyio.sleep_forever()

    async def abort(tasks: tuple[Task, ...]) -> None:
        aborted.append([task.id for task in tasks])

    tasks = [Task(0, (0,), (1,), 1), Task(1, (0,), (1,), 1), Task(2, (0,), (1,), 1)]
    with pytest.raises(RunTimeout, match=r"2 of 3 tasks were not finished after 0.01 s") as caught:
        await run(plan_waves(tasks), dispatch, deadline=0.01, abort=abort)

    assert caught.value.deadline == 0.01
    assert [task.id for task in caught.value.unfinished] == [1, 2]
    assert [receipt.task for receipt in caught.value.receipts] == [0]
    assert aborted == [[1]]


async def test_a_deadline_holds_against_dispatches_that_never_suspend() -> None:
    async def dispatch(task: Task) -> None:
        return None

    with pytest.raises(RunTimeout):
        await run(plan_waves([Task(id, (0,), (1,), 1) for id in range(200)]), dispatch, deadline=0.0)


async def test_one_task_may_have_a_deadline_of_its_own() -> None:
    async def dispatch(task: Task) -> None:
        if task.id == 1:
            await anyio.sleep_forever()

    tasks = [Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1)]
    with pytest.raises(TaskTimeout, match=r"task 1 of wave 0 .* was not finished after 0.02 s") as caught:
        await run(plan_waves(tasks), dispatch, task_seconds=lambda task: 0.01 * (task.id + 1))

    assert caught.value.task is tasks[1]
    assert isinstance(caught.value.__cause__, TimeoutError)


async def test_a_failed_abort_is_told_beside_the_failure() -> None:
    async def dispatch(task: Task) -> None:
        raise ValueError("first")

    async def abort(tasks: tuple[Task, ...]) -> None:
        raise OSError("second")

    with pytest.raises(TaskFailed, match=r"ValueError\('first'\); the abort failed too: OSError\('second'\)") as caught:
        await run(plan_waves([Task(0, (0,), (1,), 1)]), dispatch, abort=abort)

    assert isinstance(caught.value.__cause__, ValueError)
    assert isinstance(caught.value.abort_error, OSError)


async def test_an_abort_that_overruns_is_cut_off() -> None:
    async def dispatch(task: Task) -> None:
        raise ValueError("first")

    async def abort(tasks: tuple[Task, ...]) -> None:
        await anyio.sleep_forever()

    with pytest.raises(TaskFailed, match=r"the abort did not return within 0.01 s") as caught:
        await run(plan_waves([Task(0, (0,), (1,), 1)]), dispatch, abort=abort, abort_seconds=0.01)

    assert isinstance(caught.value.abort_error, TimeoutError)


async def test_the_abort_runs_while_the_cancelled_dispatches_wind_down() -> None:
    released = anyio.Event()

    async def dispatch(task: Task) -> None:
        if task.id:
            raise ValueError("first")

        try:
            await anyio.sleep_forever()
        finally:
            # What holds this dispatch is only let go by the abort.
            with anyio.CancelScope(shield=True):
                await released.wait()

    async def abort(tasks: tuple[Task, ...]) -> None:
        released.set()

    with pytest.raises(TaskFailed), anyio.fail_after(5):
        await run(plan_waves([Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1)]), dispatch, abort=abort)


@pytest.mark.parametrize(("lookahead", "in_flight"), [(-1, 1), (None, 0)])
async def test_impossible_options_are_refused(lookahead: int | None, in_flight: int) -> None:
    async def dispatch(task: Task) -> None:
        raise AssertionError(task)

    with pytest.raises(ValueError, match="it must be"):
        await run(plan_waves([]), dispatch, lookahead=lookahead, in_flight=in_flight)


async def test_errors_travel_by_pickle() -> None:
    async def dispatch(task: Task) -> None:
        raise ValueError("first")

    with pytest.raises(TaskFailed) as caught:
        await run(plan_waves([Task(0, (0,), (1,), 1)]), dispatch)

    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is TaskFailed
    assert str(copy) == str(caught.value)
    assert copy.task == Task(0, (0,), (1,), 1)
