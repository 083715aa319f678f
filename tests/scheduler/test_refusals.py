"""What cannot be is refused at once, by name and value, and nothing goes on without an end."""

from __future__ import annotations

import math

import pytest

from wavecast.scheduler import (
    LinkCost,
    Schedule,
    ScheduleError,
    Task,
    Wave,
    plan_divisible,
    plan_preemptive,
    plan_waves,
    simulate,
    verify,
)

TASKS = [Task(0, (0,), (1,), 100), Task(1, (0,), (2,), 50)]
COST = LinkCost(alpha_seconds=0.0, nbytes_per_second=1.0)


@pytest.mark.parametrize("nbytes", [0, -3])
def test_a_least_chunk_of_nothing_is_refused(nbytes: int) -> None:
    for plan in (plan_divisible, plan_preemptive):
        for tasks in ((), TASKS):
            with pytest.raises(ValueError, match=f"min_chunk_bytes is {nbytes}: it must be 1 or more"):
                plan(tasks, min_chunk_bytes=nbytes)


@pytest.mark.parametrize("gap", [0.0, 0.5, math.nan])
def test_a_gap_below_one_is_refused(gap: float) -> None:
    with pytest.raises(ValueError, match="max_gap is"):
        plan_divisible(TASKS, max_gap=gap)


def test_an_unknown_strategy_is_refused_even_where_it_would_not_be_needed() -> None:
    with pytest.raises(ScheduleError, match="strategy is 'nope': it must be one of"):
        plan_divisible(TASKS, strategy="nope")


@pytest.mark.parametrize(
    ("option", "value"), [("lookahead", -1), ("lookahead", 1.5), ("in_flight", 0), ("in_flight", 1.5)]
)
def test_a_simulation_refuses_what_a_run_refuses(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        simulate(plan_waves(TASKS), COST, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("task", [Task(0, (), (), 1), Task(0, (), (1,), 1), Task(0, (1,), (), 1)])
def test_a_task_that_nobody_sends_or_receives_is_not_verified(task: Task) -> None:
    """Without a port nothing ever sets it free."""
    bound = plan_waves(TASKS).bound
    with pytest.raises(ScheduleError, match="task 0 has senders"):
        verify(Schedule((Wave((task,)),), bound, "half", "by hand"), [task])


def test_a_simulation_that_leaves_tasks_says_so() -> None:
    schedule = Schedule((Wave((Task(0, (), (), 1),)),), plan_waves(TASKS).bound, "half", "by hand")
    with pytest.raises(ScheduleError, match="1 of 1 tasks are never set free"):
        simulate(schedule, COST)
