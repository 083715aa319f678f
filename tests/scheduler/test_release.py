from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import Schedule, ScheduleError, Task, Wave, plan_waves
from wavecast.scheduler.ports import PortModel
from wavecast.scheduler.release import ReleaseState


def random_tasks(rng: random.Random, *, count: int, actors: int) -> list[Task]:
    tasks: list[Task] = []
    for id in range(count):
        senders = tuple(rng.sample(range(actors), rng.choice((1, 1, 2))))
        receivers = tuple(rng.sample(range(actors), rng.choice((1, 1, 3))))
        after = tuple(rng.sample(range(id), min(id, rng.choice((0, 0, 1, 2)))))
        tasks.append(Task(id, senders, receivers, rng.randrange(5), after))

    return tasks


def task_ports(task: Task, ports: PortModel) -> list[tuple[str, int]]:
    if ports == "half":
        return [("", actor) for actor in task.members]

    return [("out", actor) for actor in task.senders] + [("in", actor) for actor in task.receivers]


def allowed(
    schedule: Schedule, released: set[int], finished: set[int], lookahead: int | None, in_flight: int
) -> set[int]:
    """The rule, said naively: which one more task may be released now."""
    tasks = schedule.tasks
    wave = [index for index, wave in enumerate(schedule.waves) for _ in wave.tasks]
    oldest = min((wave[p] for p in range(len(tasks)) if p not in finished), default=0)
    found = set()
    for p, task in enumerate(tasks):
        ports = set(task_ports(task, schedule.ports))
        sharing = [q for q, other in enumerate(tasks) if q != p and ports & set(task_ports(other, schedule.ports))]
        if (
            p not in released
            and all(q in released for q in sharing if wave[q] < wave[p])
            and all(
                sum(
                    q in released and q not in finished for q in sharing if port in task_ports(tasks[q], schedule.ports)
                )
                < in_flight
                for port in ports
            )
            and all(q in finished for q, other in enumerate(tasks) if other.id in task.after)
            and (lookahead is None or wave[p] <= oldest + lookahead)
        ):
            found.add(p)

    return found


@given(
    seed=st.integers(0, 10**6),
    ports=st.sampled_from(("half", "full")),
    lookahead=st.sampled_from((None, 0, 1, 3)),
    in_flight=st.integers(1, 3),
)
def test_releases_all_that_the_rule_allows_and_nothing_else(
    seed: int, ports: PortModel, lookahead: int | None, in_flight: int
) -> None:
    rng = random.Random(seed)
    schedule = plan_waves(random_tasks(rng, count=rng.randrange(1, 12), actors=6), ports=ports)
    state = ReleaseState(schedule.order, lookahead=lookahead, in_flight=in_flight)
    released: set[int] = set()
    finished: set[int] = set()

    batch = state.start()
    while True:
        for position in batch:
            assert position in allowed(schedule, released, finished, lookahead, in_flight)
            released.add(position)

        assert not allowed(schedule, released, finished, lookahead, in_flight)
        running = sorted(released - finished)
        if not running:
            break

        done = rng.choice(running)
        finished.add(done)
        batch = state.finish(done)

    assert len(finished) == len(schedule.tasks)
    assert state.unfinished == 0


def test_a_strict_barrier_releases_wave_by_wave() -> None:
    tasks = [Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1), Task(2, (0,), (2,), 1), Task(3, (4,), (5,), 1)]
    schedule = Schedule((Wave((tasks[0], tasks[1])), Wave((tasks[2], tasks[3]))))

    state = ReleaseState(schedule.order, lookahead=0)

    assert state.start() == [0, 1]
    assert state.finish(1) == []
    assert state.finish(0) == [2, 3]


def test_without_a_limit_free_members_go_at_once() -> None:
    tasks = [Task(0, (0,), (1,), 1), Task(1, (2,), (3,), 1), Task(2, (0,), (2,), 1), Task(3, (4,), (5,), 1)]
    schedule = Schedule((Wave((tasks[0], tasks[1])), Wave((tasks[2], tasks[3]))))

    state = ReleaseState(schedule.order)

    assert state.start() == [0, 1, 3]
    assert state.finish(1) == []
    assert state.finish(0) == [2]


def test_a_dependency_outside_the_earlier_waves_is_refused() -> None:
    late = Schedule((Wave((Task(0, (0,), (1,), 1, after=(1,)),)), Wave((Task(1, (2,), (3,), 1),))))
    unknown = Schedule((Wave((Task(0, (0,), (1,), 1, after=(9,)),)),))

    for schedule in (late, unknown):
        with pytest.raises(ScheduleError, match="which is in no earlier wave"):
            ReleaseState(schedule.order)
