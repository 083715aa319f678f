from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import STRATEGIES, Bound, PortModel, Schedule, ScheduleError, Task, Wave, plan_waves, verify

PORTS: tuple[PortModel, ...] = ("half", "full")


def pair(id: int, sender: int, receiver: int, nbytes: int = 1, after: tuple[int, ...] = ()) -> Task:
    return Task(id, (sender,), (receiver,), nbytes, after)


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    actors = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)
    count = draw(st.integers(0, 14))
    ids = draw(st.lists(st.integers(-5, 99), min_size=count, max_size=count, unique=True))
    tasks = []
    for index, id in enumerate(ids):
        after = draw(st.lists(st.sampled_from(ids[:index]), max_size=2).map(tuple)) if index else ()
        tasks.append(Task(id, draw(actors), draw(actors), draw(st.integers(0, 9)), after))

    return draw(st.permutations(tasks))


@given(tasks=task_lists(), ports=st.sampled_from(PORTS), strategy=st.sampled_from(sorted(STRATEGIES)))
def test_every_strategy_makes_a_schedule_that_verifies(tasks: list[Task], ports: PortModel, strategy: str) -> None:
    schedule = plan_waves(tasks, strategy=strategy, ports=ports)

    verify(schedule, tasks)
    assert schedule.bound.waves <= len(schedule.waves)
    assert schedule.bound.nbytes <= schedule.makespan_bytes
    assert schedule.nbytes == sum(task.nbytes for task in tasks)
    assert plan_waves(tasks, strategy=strategy, ports=ports) == schedule


def test_first_fit_takes_tasks_in_the_order_given() -> None:
    # A path of four edges, both ends first: the middle ones find both waves taken. Two waves would do.
    tasks = [pair(0, 0, 1), pair(1, 3, 4), pair(2, 1, 2), pair(3, 2, 3)]

    schedule = plan_waves(tasks, strategy="first_fit")

    assert [[task.id for task in wave.tasks] for wave in schedule.waves] == [[0, 1], [2], [3]]
    assert schedule.bound.waves == 2


def test_figures_of_a_schedule_are_sums_over_its_waves() -> None:
    tasks = [pair(0, 0, 2, 5), pair(1, 1, 3, 3), pair(2, 0, 3, 4)]

    schedule = plan_waves(tasks, strategy="first_fit")

    assert [(wave.nbytes, wave.longest_nbytes) for wave in schedule.waves] == [(8, 5), (4, 4)]
    assert (schedule.makespan_bytes, schedule.bound.nbytes, schedule.gap) == (9, 9, 1.0)
    assert [task.id for task in schedule.tasks] == [0, 1, 2]


def test_full_ports_let_an_actor_send_and_receive_at_once() -> None:
    ring = [pair(0, 0, 1), pair(1, 1, 2), pair(2, 2, 0)]

    assert len(plan_waves(ring, ports="full").waves) == 1
    assert len(plan_waves(ring, ports="half").waves) == 3


def test_a_copy_inside_an_actor_takes_it_once_or_both_its_ports() -> None:
    tasks = [pair(0, 0, 0), pair(1, 0, 1), pair(2, 2, 0)]

    assert len(plan_waves(tasks, ports="half").waves) == 3
    assert len(plan_waves(tasks, ports="full").waves) == 2


def test_no_tasks_make_an_empty_schedule() -> None:
    schedule = plan_waves([])

    assert schedule.waves == ()
    assert (schedule.gap, schedule.makespan_bytes, schedule.bound.waves) == (1.0, 0, 0)
    verify(schedule, [])


def test_tasks_without_bytes_have_no_gap() -> None:
    schedule = plan_waves([pair(0, 0, 1, 0), pair(1, 0, 2, 0)])

    assert (len(schedule.waves), schedule.gap) == (2, 1.0)


def test_dependencies_go_to_later_waves_whatever_the_order_given() -> None:
    tasks = [pair(2, 5, 6, after=(1,)), pair(1, 3, 4, after=(0,)), pair(0, 1, 2)]

    schedule = plan_waves(tasks)

    assert [[task.id for task in wave.tasks] for wave in schedule.waves] == [[0], [1], [2]]
    assert schedule.bound.waves == 3


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a payload was compared")


def test_payloads_are_never_hashed_nor_compared() -> None:
    payload = Unhashable()
    tasks = [Task(id, (id % 3,), (3 + id % 2,), 7, payload=payload) for id in range(6)]  # type: ignore[arg-type]

    for strategy in STRATEGIES:
        schedule = plan_waves(tasks, strategy=strategy)
        verify(schedule, tasks)
        assert schedule.digest


def test_the_digest_sees_everything_but_payloads() -> None:
    base = [pair(0, 0, 2, 5), pair(1, 1, 2, 3)]
    digest = plan_waves(base).digest

    assert digest == plan_waves([Task(0, (0,), (2,), 5, payload="x"), base[1]]).digest
    assert digest != plan_waves([pair(0, 0, 2, 6), base[1]]).digest
    assert digest != plan_waves([pair(0, 1, 2, 5), base[1]]).digest
    assert digest != plan_waves([pair(7, 0, 2, 5), base[1]]).digest
    assert digest != plan_waves(base, ports="full").digest
    assert digest != plan_waves([base[0], pair(1, 1, 2, 3, after=(0,))]).digest
    assert len(digest) == 64


def test_a_schedule_travels_by_pickle() -> None:
    schedule = plan_waves([pair(0, 0, 2, 5), pair(1, 1, 2, 3)])

    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("tasks", "message", "concerned"),
    [
        ([pair(4, 0, 1), pair(4, 2, 3)], "task id 4 is used twice: by the tasks at 0 and 1", (4,)),
        ([Task(4, (), (1,), 1)], r"task 4 has no sender \(its receivers: \(1,\)\)", (4,)),
        ([Task(4, (1,), (), 1)], r"task 4 has no receiver \(its senders: \(1,\)\)", (4,)),
        ([pair(4, 0, 1, after=(9,))], "task 4 comes after task 9, which does not exist", (4, 9)),
        ([pair(4, 0, 1, after=(4,))], "in a circle: 4 after 4", (4,)),
        (
            [pair(1, 0, 1), pair(2, 0, 1, after=(4, 1)), pair(3, 0, 1, after=(2,)), pair(4, 0, 1, after=(3,))],
            "in a circle: 2 after 4 after 3 after 2",
            (2, 4, 3),
        ),
    ],
)
def test_impossible_tasks_are_named(tasks: list[Task], message: str, concerned: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        plan_waves(tasks)

    assert caught.value.tasks == concerned


def test_a_task_cannot_have_negative_bytes_or_one_actor_for_a_tuple() -> None:
    with pytest.raises(ScheduleError, match="task 4 has -3 bytes: it must have 0 or more") as caught:
        Task(4, (0,), (1,), -3)

    assert caught.value.tasks == (4,)
    with pytest.raises(ScheduleError, match="task 4 has receivers 1: give a tuple of integers"):
        Task(4, (0,), 1, 3)  # type: ignore[arg-type]


def test_lists_of_actors_are_taken_as_tuples() -> None:
    task = Task(4, [0], [1, 2], 3, after=range(2))  # type: ignore[arg-type]

    assert task == Task(4, (0,), (1, 2), 3, after=(0, 1))
    assert hash(task) == hash(Task(4, (0,), (1, 2), 3, after=(0, 1)))


def test_unknown_names_are_told_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="strategy is 'fastest': it must be one of auto, "):
        plan_waves([], strategy="fastest")

    with pytest.raises(ScheduleError, match="ports is 'triple': it must be one of half, full"):
        plan_waves([], ports="triple")  # type: ignore[arg-type]


class TestVerify:
    tasks = (pair(0, 0, 2), pair(1, 1, 3), pair(2, 0, 3, after=(1,)))

    def schedule(self, *waves: tuple[Task, ...], ports: PortModel = "half") -> Schedule:
        return Schedule(tuple(map(Wave, waves)), ports=ports)

    def test_a_sound_schedule_passes(self) -> None:
        verify(self.schedule(self.tasks[:2], self.tasks[2:]), self.tasks)

    @pytest.mark.parametrize(
        ("waves", "message"),
        [
            (((tasks[0],), (tasks[2],)), "task 2 comes after task 1, which no wave has|task 1 is lost: no wave has it"),
            (((tasks[0], tasks[1]), (tasks[2],), (tasks[0],)), "task 0 is scheduled twice: in wave 0 and in wave 2"),
            (((tasks[0], tasks[1]), (tasks[2], pair(9, 7, 8))), "task 9 in wave 1 was never asked for"),
            (((tasks[0], pair(1, 1, 3, 2)), (tasks[2],)), "task 1 was altered"),
            (((tasks[0],), (tasks[1], tasks[2])), "wave 1 clashes: actor 3 takes part in both task 1 and task 2"),
            (((tasks[2],), (tasks[0], tasks[1])), "tasks wait for each other in a circle: 2 for 1 for 2"),
        ],
    )
    def test_unsound_schedules_are_named(self, waves: tuple[tuple[Task, ...], ...], message: str) -> None:
        with pytest.raises(ScheduleError, match=message):
            verify(self.schedule(*waves), self.tasks)

    def test_a_dependency_in_the_same_wave_is_named(self) -> None:
        tasks = [pair(0, 0, 1), pair(1, 2, 3, after=(0,))]

        with pytest.raises(ScheduleError, match="task 1 in wave 0 comes after task 0, which is in wave 0"):
            verify(self.schedule(tuple(tasks)), tasks)

    def test_full_ports_clash_by_side(self) -> None:
        relay = (pair(0, 0, 1), pair(1, 1, 2))
        verify(self.schedule(relay, ports="full"), relay)
        both = (pair(0, 0, 1), pair(1, 2, 1))

        with pytest.raises(ScheduleError, match="actor 1 receives in both task 0 and task 1"):
            verify(self.schedule(both, ports="full"), both)

    def test_tasks_asked_for_twice_are_named(self) -> None:
        with pytest.raises(ScheduleError, match="task id 0 was asked for twice"):
            verify(self.schedule((self.tasks[0],)), [self.tasks[0], self.tasks[0]])


def test_a_schedule_made_by_hand_claims_no_gap() -> None:
    serial = Schedule((Wave((Task(0, (0,), (1,), 1 << 20),)), Wave((Task(1, (2,), (3,), 1 << 20),))))

    assert math.isnan(serial.gap)
    assert Schedule((Wave((Task(0, (0,), (1,), 0),)),)).gap == 1.0
    assert Schedule(serial.waves, Bound(waves=1, nbytes=1 << 20)).gap == 2.0
