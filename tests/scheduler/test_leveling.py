"""Rounds of what is left, and the linear programme they are measured against."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import Task, plan_divisible, plan_preemptive, verify
from wavecast.scheduler.bounds import divisible_nbytes
from wavecast.scheduler.leveling import level_rounds
from wavecast.scheduler.ports import TaskGraph, build_graph
from wavecast.scheduler.relaxation import Relaxation, relax


def broadcasts(seed: int, *, senders: int, receivers: int, count: int, most: int = 4) -> list[Task]:
    rng = random.Random(seed)
    return [
        Task(
            id,
            (rng.randrange(senders),),
            tuple(senders + actor for actor in rng.sample(range(receivers), rng.randint(1, min(most, receivers)))),
            rng.randint(1, 100),
        )
        for id in range(count)
    ]


def check_rounds(graph: TaskGraph, rounds: Sequence[tuple[int, tuple[int, ...]]]) -> int:
    """Check that rounds share no port and hold every task whole, and return the sum of their lengths."""
    held = [0] * len(graph.ports)
    for length, members in rounds:
        assert length > 0
        ports = [port for task in members for port in graph.ports[task]]
        assert len(set(ports)) == len(ports)
        for task in members:
            held[task] += length

    assert all(got >= wanted for got, wanted in zip(held, graph.nbytes, strict=True))
    return sum(length for length, _ in rounds)


@given(seed=st.integers(0, 10**6), parts=st.sampled_from((1, 4, 64)), ports=st.sampled_from(("half", "full")))
def test_rounds_hold_every_task_whole_whatever_the_parts(seed: int, parts: int, ports: str) -> None:
    graph = build_graph(broadcasts(seed, senders=3, receivers=5, count=12), ports)  # type: ignore[arg-type]

    rounds = level_rounds(graph, graph.nbytes, parts=parts)

    assert check_rounds(graph, rounds) >= divisible_nbytes(graph)
    assert len({members for _, members in rounds}) == len(rounds)


def test_tasks_of_no_length_are_left_out() -> None:
    graph = build_graph([Task(0, (0,), (1,), 5), Task(1, (0,), (2,), 0)], "half")

    assert level_rounds(graph, graph.nbytes, parts=1) == [(5, (0,))]
    assert level_rounds(graph, [0, 0], parts=1) == []


def test_three_exchanges_need_half_as_much_again_as_any_port_has() -> None:
    """A triangle in the half model: no two of its tasks fit beside each other."""
    graph = build_graph([Task(0, (0,), (1,), 40), Task(1, (1,), (2,), 40), Task(2, (2,), (0,), 40)], "half")

    relaxed = relax(graph)

    assert max(graph.loads()) == 80
    assert relaxed.bound == 120
    assert check_rounds(graph, relaxed.rounds) == 120


def test_five_exchanges_in_a_ring_fit_two_at_a_time() -> None:
    """All bytes over the most that fit beside each other: 5 * 40 / 2."""
    graph = build_graph([Task(id, (id,), ((id + 1) % 5,), 40) for id in range(5)], "half")

    relaxed = relax(graph)

    assert relaxed.bound == 100
    assert check_rounds(graph, relaxed.rounds) == 100


def test_broadcasts_that_all_meet_go_one_after_the_other() -> None:
    """Each pair of them shares one receiver, and no receiver is in more than two."""
    tasks = [Task(0, (0,), (3, 4), 7), Task(1, (1,), (4, 5), 8), Task(2, (2,), (5, 3), 9)]
    graph = build_graph(tasks, "half")

    assert max(graph.loads()) == 17
    assert relax(graph).bound == 24
    assert plan_divisible(tasks, min_chunk_bytes=1).schedule.makespan_bytes == 24


@given(seed=st.integers(0, 10**6), count=st.integers(1, 14))
def test_the_bound_is_met_where_open_shop_is_exact(seed: int, count: int) -> None:
    rng = random.Random(seed)
    tasks = [Task(id, (rng.randrange(4),), (4 + rng.randrange(4),), rng.randint(1, 99)) for id in range(count)]
    graph = build_graph(tasks, "half")

    relaxed = relax(graph)

    exact = plan_preemptive(tasks).schedule.makespan_bytes
    assert 0.99 * exact <= relaxed.bound <= exact
    assert exact <= check_rounds(graph, relaxed.rounds)


@given(seed=st.integers(0, 10**6), unit=st.sampled_from((1, 7)))
def test_no_schedule_is_below_the_bound_and_its_own_rounds_are_near_it(seed: int, unit: int) -> None:
    tasks = broadcasts(seed, senders=4, receivers=6, count=16)
    graph = build_graph(tasks, "half")

    relaxed = relax(graph, unit=unit)

    leveled = check_rounds(graph, level_rounds(graph, graph.nbytes, parts=64))
    assert divisible_nbytes(graph) * 0.99 <= relaxed.bound <= leveled
    units = [-(-nbytes // unit) for nbytes in graph.nbytes]
    whole = TaskGraph(graph.ports, tuple(units), (), graph.order, graph.port_names)
    # Rounding may add a unit a round.
    assert check_rounds(whole, relaxed.rounds) * unit <= relaxed.bound * 1.006 + unit * (len(relaxed.rounds) + 1)


def test_it_stops_at_what_is_enough() -> None:
    graph = build_graph(broadcasts(3, senders=6, receivers=8, count=60), "half")

    exact = relax(graph)
    shown = relax(graph, bound_enough=exact.bound / 2)
    found = relax(graph, sum_enough=2 * exact.bound)

    assert exact.bound / 2 <= shown.bound <= exact.bound
    assert found.bound <= exact.bound
    assert check_rounds(graph, found.rounds) <= 2.1 * exact.bound


def test_the_same_plan_is_relaxed_the_same_and_a_large_one_is_left() -> None:
    graph = build_graph(broadcasts(5, senders=5, receivers=5, count=40), "half")

    assert relax(graph) == relax(graph)
    assert relax(build_graph([], "half")) == Relaxation(0, ())
    large = build_graph([Task(id, (id % 30,), (30 + id // 30,), 1) for id in range(401)], "half")
    assert relax(large) == Relaxation(0, ())


@pytest.mark.parametrize("seed", range(12))
def test_random_broadcasts_that_may_be_cut_come_within_five_percent_of_what_is_possible(seed: int) -> None:
    tasks = [
        Task(task.id, task.senders, task.receivers, task.nbytes << 20)
        for task in broadcasts(seed, senders=3 + seed, receivers=3 + seed, count=8 * (3 + seed))
    ]
    graph = build_graph(tasks, "half")

    division = plan_divisible(tasks)

    verify(division.schedule, division.schedule.tasks)
    possible = max(divisible_nbytes(graph), relax(graph).bound)
    assert division.schedule.makespan_bytes <= 1.05 * possible
    moved = dict.fromkeys(range(len(tasks)), 0)
    for cut in division.cuts:
        assert cut.offset == moved[cut.task]
        moved[cut.task] += cut.nbytes

    assert moved == {task.id: task.nbytes for task in tasks}
    short = [cut for cut in division.cuts if cut.nbytes < 1 << 20]
    assert all(cut.offset + cut.nbytes == tasks[cut.task].nbytes for cut in short)
