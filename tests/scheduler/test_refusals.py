"""What cannot be is refused before anything is worked out, and says which value it was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import anyio
import pytest

from wavecast.scheduler import (
    LinkCost,
    Schedule,
    ScheduleError,
    Task,
    Wave,
    chunk_sizes,
    explain,
    fan_out,
    plan_divisible,
    plan_preemptive,
    plan_waves,
    run,
    simulate,
    verify,
)
from wavecast.scheduler.task import check_integers

TASKS = [Task(0, (0,), (2,), 100), Task(1, (0,), (3,), 100), Task(2, (1,), (2,), 50)]


async def nothing(task: Task) -> None:
    pass


@pytest.mark.parametrize("plan", [plan_divisible, plan_preemptive])
@pytest.mark.parametrize("tasks", [(), TASKS])
@pytest.mark.parametrize("nbytes", [0, -3, 1.5])
def test_a_smallest_chunk_below_a_byte_is_refused(
    plan: Callable[..., object], tasks: tuple[Task, ...], nbytes: float
) -> None:
    with pytest.raises(ValueError, match=f"min_chunk_bytes is {nbytes}: it must be a whole number of bytes from 1"):
        plan(tasks, min_chunk_bytes=nbytes)


@pytest.mark.parametrize("gap", [0, 0.99, math.nan, "x", None])
def test_a_gap_that_nobody_can_reach_is_refused(gap: float) -> None:
    with pytest.raises(ValueError, match=f"max_gap is {gap!r}: it must be 1 or more"):
        plan_divisible(TASKS, max_gap=gap)


@pytest.mark.parametrize("tasks", [(), TASKS])
def test_an_unknown_strategy_is_refused_even_where_it_would_not_be_needed(tasks: tuple[Task, ...]) -> None:
    with pytest.raises(ScheduleError, match="strategy is 'nope': it must be one of auto, first_fit"):
        plan_divisible(tasks, strategy="nope")


@pytest.mark.parametrize(
    ("option", "value"), [("lookahead", -1), ("lookahead", 0.5), ("in_flight", 0), ("in_flight", -1)]
)
def test_a_replay_and_a_run_refuse_the_same_options(option: str, value: float) -> None:
    for schedule in (plan_waves(TASKS), plan_waves(())):
        with pytest.raises(ValueError, match=f"{option} is {value}: it must be"):
            simulate(schedule, LinkCost(), **{option: value})  # type: ignore[arg-type]

        with pytest.raises(ValueError, match=f"{option} is {value}: it must be"):
            anyio.run(lambda schedule=schedule: run(schedule, nothing, **{option: value}))


@pytest.mark.parametrize("seconds", [-1.0, math.nan, "x", None])
def test_a_replay_refuses_a_cost_that_is_no_duration(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"task 0 costs {seconds!r} seconds: it must be 0 or more"):
        simulate(plan_waves(TASKS), lambda task: seconds)


@pytest.mark.parametrize("option", ["deadline", "abort_seconds"])
def test_a_run_refuses_seconds_that_are_no_number(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is nan: it must be a number of seconds"):
        anyio.run(lambda: run(plan_waves(TASKS), nothing, **{option: math.nan}))


@pytest.mark.parametrize(
    ("senders", "receivers", "side"), [((), (1,), "sender"), ((1,), (), "receiver"), ((), (), "sender")]
)
def test_a_task_that_no_port_sets_free_is_refused_by_whoever_meets_it(
    senders: tuple[int, ...], receivers: tuple[int, ...], side: str
) -> None:
    task = Task(7, senders, receivers, 1)
    schedule = Schedule((Wave((task,)),))

    with pytest.raises(ScheduleError, match=f"task 7 in wave 0 has no {side}"):
        verify(schedule, [task])

    with pytest.raises(ScheduleError, match=f"task 7 has no {side}"):
        simulate(schedule, LinkCost())

    with pytest.raises(ScheduleError, match=f"task 7 has no {side}"):
        anyio.run(lambda: run(schedule, nothing))


@pytest.mark.parametrize("nbytes", [math.nan, 1.5, "x", None])
def test_a_task_has_a_whole_number_of_bytes(nbytes: object) -> None:
    with pytest.raises(ScheduleError, match=f"task 0 has {nbytes!r} bytes: it must have a whole number"):
        Task(0, (0,), (1,), nbytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("actor", ["a", 0.25, 0.0, None, (0, 1), [0]])
@pytest.mark.parametrize("ports", ["half", "full"])
def test_an_actor_is_a_whole_number(actor: object, ports: str) -> None:
    with pytest.raises(
        ScheduleError, match=re.escape(f"task 0 has {actor!r} among its senders: it must be an integer")
    ):
        plan_waves([Task(0, (actor,), (1,), 1)], ports=ports)  # type: ignore[arg-type]


@pytest.mark.parametrize("ask", [plan_waves, fan_out, plan_divisible])
@pytest.mark.parametrize("id", ["x", 1.0, None])
def test_an_id_is_a_whole_number(ask: Callable[..., object], id: object) -> None:
    task = Task(id, (0,), (1, 2), 1)  # type: ignore[arg-type]

    with pytest.raises(ScheduleError, match=f"number 1 of the tasks has id {id!r}: it must be an integer"):
        ask([TASKS[1], task])


@pytest.mark.parametrize("ask", [plan_waves, fan_out, plan_divisible])
def test_a_dependency_is_a_whole_number_and_a_task_is_a_task(ask: Callable[..., object]) -> None:
    with pytest.raises(ScheduleError, match="task 0 has \\[\\] among its after: it must be an integer"):
        ask([Task(0, (0,), (1,), 1, ([],))])  # type: ignore[arg-type]

    with pytest.raises(ScheduleError, match="number 1 of the tasks is 'task': it must be a Task"):
        ask([TASKS[0], "task"])


def test_the_check_of_a_schedule_refuses_what_planning_does() -> None:
    task = Task(0, ("a",), (1,), 1)  # type: ignore[arg-type]

    with pytest.raises(ScheduleError, match="task 0 has 'a' among its senders: it must be an integer"):
        verify(Schedule((Wave((task,)),)), [task])

    with pytest.raises(ScheduleError, match="number 3 of the tasks is 'x': it must be a Task"):
        verify(plan_waves(TASKS), [*TASKS, "x"])  # type: ignore[list-item]


def test_a_port_model_that_there_is_not_is_refused_by_whoever_meets_it() -> None:
    schedule = Schedule(tuple(Wave((task,)) for task in TASKS), ports="FULL")  # type: ignore[arg-type]

    with pytest.raises(ScheduleError, match="ports are 'FULL': they must be half or full"):
        verify(schedule, TASKS)

    with pytest.raises(ScheduleError, match="ports is 'FULL': it must be one of half, full"):
        simulate(schedule, LinkCost())

    with pytest.raises(ScheduleError, match="ports is 'FULL': it must be one of half, full"):
        anyio.run(lambda: run(schedule, nothing))


def test_whole_numbers_of_another_make_are_taken() -> None:
    class Number:
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    check_integers([Task(Number(0), (Number(1),), (True,), 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [-1, 1.5, "x"])
def test_a_table_shows_no_part_of_a_wave(limit: object) -> None:
    with pytest.raises(ValueError, match=f"limit is {limit!r}: it must be None, or 0 or more waves"):
        explain(plan_waves(TASKS)).lines(limit=limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nbytes", "chunk_bytes", "min_chunk_bytes"])
@pytest.mark.parametrize("value", [2.5, "x", None])
def test_a_chunk_has_whole_bytes(name: str, value: object) -> None:
    options = {"nbytes": 10, "chunk_bytes": 4, "min_chunk_bytes": 1} | {name: value}

    with pytest.raises(ValueError, match=f"{name} is {value!r}: it must be a whole number of bytes"):
        chunk_sizes(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["alpha_seconds", "nbytes_per_second", "branching"])
@pytest.mark.parametrize("value", [math.nan, -1.0, "x", None])
def test_a_link_has_no_figure_that_is_no_number(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value!r}"):
        LinkCost(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["alpha_seconds", "branching"])
def test_a_link_starts_at_some_time(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is inf: it must be finite and 0 or more"):
        LinkCost(**{option: math.inf})


@pytest.mark.parametrize(("option", "value"), [("factor", -1.0), ("least_seconds", math.nan)])
def test_a_task_is_not_allowed_less_than_no_time(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}: it must be 0 or more"):
        LinkCost().allow(**{option: value})
