from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import LinkCost, PortModel, Schedule, Task, Wave, plan_waves, simulate


def byte_seconds(task: Task) -> float:
    return float(task.nbytes)


def skewed() -> Schedule:
    tasks = [Task(0, (0,), (2,), 9), Task(1, (1,), (3,), 1), Task(2, (1,), (4,), 8), Task(3, (0,), (3,), 1)]
    return Schedule((Wave((tasks[0], tasks[1])), Wave((tasks[2], tasks[3]))))


def test_a_barrier_adds_up_the_longest_tasks() -> None:
    replay = simulate(skewed(), byte_seconds, barrier=True)

    assert replay.seconds == 17.0 == skewed().makespan_bytes
    assert replay.started == (0.0, 0.0, 9.0, 9.0)
    assert replay.critical_path == (0, 2)


def test_without_a_barrier_tasks_start_when_their_members_are_free() -> None:
    replay = simulate(skewed(), byte_seconds)

    assert replay.seconds == 10.0
    assert replay.started == (0.0, 0.0, 1.0, 9.0)
    assert replay.finished == (9.0, 1.0, 9.0, 10.0)
    assert replay.busy == ((0, 10.0), (1, 9.0), (2, 9.0), (3, 2.0), (4, 8.0))
    assert replay.critical_path == (0, 3)


def chained(strategy: str) -> Schedule:
    """Whole tasks of very different sizes, most of which come after an earlier one."""
    rng = random.Random(5)
    tasks = [
        Task(
            id,
            (rng.randrange(4),),
            (4 + rng.randrange(4),),
            rng.choice((2, 2, 2, 4, 8, 40)),
            after=(rng.randrange(max(0, id - 16), id),) if id and rng.random() < 0.7 else (),
        )
        for id in range(60)
    ]
    return plan_waves(tasks, strategy=strategy)


@pytest.mark.parametrize(("strategy", "barrier", "ahead"), [("first_fit", 458.0, 344.0), ("auto", 376.0, 268.0)])
def test_lookahead_saves_a_fifth_where_waves_cannot_be_level(strategy: str, barrier: float, ahead: float) -> None:
    schedule = chained(strategy)

    waited = simulate(schedule, byte_seconds, barrier=True).seconds
    gone = simulate(schedule, byte_seconds).seconds

    assert (waited, gone) == (barrier, ahead)
    assert gone <= 0.8 * waited


@given(seed=st.integers(0, 10**6), strategy=st.sampled_from(("first_fit", "largest_first", "auto")))
def test_no_task_starts_later_for_more_lookahead(seed: int, strategy: str) -> None:
    rng = random.Random(seed)
    tasks = [
        Task(
            id,
            (rng.randrange(6),),
            tuple(rng.sample(range(6, 12), rng.choice((1, 1, 3)))),
            rng.randrange(1, 50),
            tuple(rng.sample(range(id), min(id, rng.choice((0, 0, 1, 2))))),
        )
        for id in range(rng.randrange(1, 40))
    ]
    schedule = plan_waves(tasks, strategy=strategy)
    delays = {task.id: task.nbytes * rng.uniform(0.5, 2) for task in tasks}

    starts = [
        simulate(schedule, lambda task: delays[task.id], lookahead=lookahead).started
        for lookahead in (0, 1, 2, 5, None)
    ]

    for less, more in itertools.pairwise(starts):
        assert all(later <= sooner + 1e-9 for sooner, later in zip(less, more, strict=True))


def test_an_actor_that_sends_and_receives_at_once_is_busy_once() -> None:
    ring = [Task(0, (0,), (1,), 4), Task(1, (1,), (0,), 6)]

    replay = simulate(plan_waves(ring, ports="full"), byte_seconds)

    assert (replay.seconds, replay.busy) == (6.0, ((0, 6.0), (1, 6.0)))


def test_link_cost_is_a_start_up_and_a_rate() -> None:
    cost = LinkCost(alpha_seconds=0.5, nbytes_per_second=4.0)

    assert (cost.seconds(8), cost(Task(0, (0,), (1, 2), 8))) == (2.5, 2.5)
    assert simulate(skewed(), cost).seconds == 0.5 + 9 / 4 + 0.5 + 1 / 4


def test_receivers_beyond_the_first_cost_a_share() -> None:
    cost = LinkCost(alpha_seconds=0.5, nbytes_per_second=4.0, branching=0.25)

    assert cost(Task(0, (0,), (1, 2, 3), 8)) == 0.5 + 2.0 * 1.5
    assert cost.seconds(8, receivers=5) == 0.5 + 2.0 * 2


def test_a_deadline_for_a_task_is_a_multiple_of_its_cost_and_not_too_short() -> None:
    allowed = LinkCost(alpha_seconds=0.5, nbytes_per_second=4.0).allow(factor=4, least_seconds=5)

    assert (allowed(Task(0, (0,), (1,), 8)), allowed(Task(0, (0,), (1,), 0))) == (10.0, 5)


@pytest.mark.parametrize("options", [{"alpha_seconds": -1.0}, {"nbytes_per_second": 0.0}, {"branching": -0.1}])
def test_impossible_links_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        LinkCost(**options)


def test_nothing_takes_no_time() -> None:
    replay = simulate(plan_waves([]), LinkCost())

    assert (replay.seconds, replay.busy, replay.critical_path) == (0.0, (), ())


@given(
    seed=st.integers(0, 10**6),
    ports=st.sampled_from(("half", "full")),
    in_flight=st.integers(1, 3),
    lookahead=st.sampled_from((None, 0, 1, 4)),
)
def test_a_replay_with_random_delays_ends_and_no_port_is_used_twice(
    seed: int, ports: PortModel, in_flight: int, lookahead: int | None
) -> None:
    rng = random.Random(seed)
    tasks = [
        Task(
            id,
            tuple(rng.sample(range(8), rng.choice((1, 1, 2)))),
            tuple(rng.sample(range(8), rng.choice((1, 2, 4)))),
            rng.randrange(20),
            tuple(rng.sample(range(id), min(id, rng.choice((0, 0, 0, 1, 2))))),
        )
        for id in range(rng.randrange(1, 40))
    ]
    schedule = plan_waves(tasks, ports=ports)
    delays = {task.id: rng.random() for task in tasks}

    replay = simulate(schedule, lambda task: delays[task.id], lookahead=lookahead, in_flight=in_flight)
    barrier = simulate(schedule, lambda task: delays[task.id], barrier=True)

    times = {task.id: span for task, *span in zip(schedule.tasks, replay.started, replay.finished, strict=True)}
    for task in tasks:
        start, stop = times[task.id]
        assert stop == start + delays[task.id]
        assert all(times[before][1] <= start for before in task.after)
        for other in tasks:
            if ports == "half":
                share = set(task.members) & set(other.members)
            else:
                share = (set(task.senders) & set(other.senders)) | (set(task.receivers) & set(other.receivers))

            if share and other.id < task.id:
                assert times[other.id][1] <= start or stop <= times[other.id][0]

    assert replay.seconds <= barrier.seconds + 1e-9
    # Each step of the critical path begins when the one before it ends.
    spans = [times[id] for id in replay.critical_path]
    assert spans[0][0] == 0.0
    assert spans[-1][1] == replay.seconds
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
