from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import (
    Division,
    LinkCost,
    PortModel,
    Schedule,
    ScheduleError,
    Task,
    chunk_sizes,
    divide,
    plan_divisible,
    plan_preemptive,
    plan_waves,
    verify,
)
from wavecast.scheduler.bounds import divisible_nbytes
from wavecast.scheduler.leveling import StepBudget, level_rounds
from wavecast.scheduler.ports import build_graph


@pytest.mark.parametrize(
    ("nbytes", "chunk_bytes", "min_chunk_bytes", "expected"),
    [
        (10, 4, 1, (4, 3, 3)),
        (12, 4, 1, (4, 4, 4)),
        (13, 4, 1, (4, 3, 3, 3)),
        (3, 4, 1, (3,)),
        (0, 4, 1, (0,)),
        (10, 4, 4, (5, 5)),
        (7, 4, 4, (7,)),
        (2, 1, 4, (2,)),
    ],
)
def test_chunks_are_equal_to_within_a_byte(
    nbytes: int, chunk_bytes: int, min_chunk_bytes: int, expected: tuple[int, ...]
) -> None:
    assert chunk_sizes(nbytes, chunk_bytes=chunk_bytes, min_chunk_bytes=min_chunk_bytes) == expected


@given(nbytes=st.integers(0, 5000), chunk_bytes=st.integers(1, 900), min_chunk_bytes=st.integers(1, 900))
def test_chunks_add_up_and_keep_their_limits(nbytes: int, chunk_bytes: int, min_chunk_bytes: int) -> None:
    sizes = chunk_sizes(nbytes, chunk_bytes=chunk_bytes, min_chunk_bytes=min_chunk_bytes)

    assert sum(sizes) == nbytes
    assert max(sizes) - min(sizes) <= 1
    assert sorted(sizes, reverse=True) == list(sizes)
    assert min(sizes) >= min(min_chunk_bytes, nbytes)
    if 2 * min_chunk_bytes <= chunk_bytes:
        assert max(sizes) <= chunk_bytes


@pytest.mark.parametrize("options", [(-1, 4, 1), (1, 0, 1), (1, 4, 0)])
def test_impossible_chunks_are_refused(options: tuple[int, int, int]) -> None:
    nbytes, chunk_bytes, min_chunk_bytes = options

    with pytest.raises(ValueError, match="cannot cut"):
        chunk_sizes(nbytes, chunk_bytes=chunk_bytes, min_chunk_bytes=min_chunk_bytes)


def check_division(division: Division, tasks: list[Task]) -> None:
    pieces = {piece.id: piece for piece in division.schedule.tasks}
    verify(division.schedule, list(pieces.values()))
    assert sorted(pieces) == list(range(len(division.cuts)))
    carried: dict[int, list[tuple[int, int]]] = {task.id: [] for task in tasks}
    parts: dict[int, list[int]] = {task.id: [] for task in tasks}
    for id, cut in enumerate(division.cuts):
        carried[cut.task].append((cut.offset, cut.nbytes))
        parts[cut.task].append(id)
        assert pieces[id].nbytes == cut.nbytes

    for task in tasks:
        end = 0
        for offset, nbytes in sorted(carried[task.id]):
            assert offset == end
            end += nbytes

        assert end == task.nbytes
        for id in parts[task.id]:
            assert pieces[id].senders == task.senders
            assert pieces[id].receivers == task.receivers
            assert pieces[id].payload is task.payload
            assert set(pieces[id].after) == {part for before in task.after for part in parts[before]}


@st.composite
def pairs(draw: st.DrawFn, *, full: bool) -> list[Task]:
    actors = st.integers(0, 4)
    count = draw(st.integers(1, 16))
    return [
        Task(id, (draw(actors),), (draw(actors) + (0 if full else 5),), draw(st.integers(0, 40)), (), f"payload {id}")
        for id in range(count)
    ]


@given(data=st.data(), ports=st.sampled_from(("half", "full")), unit=st.integers(1, 7))
def test_preemption_reaches_the_bytes_of_the_busiest_port(data: st.DataObject, ports: PortModel, unit: int) -> None:
    tasks = data.draw(pairs(full=ports == "full"))

    division = plan_preemptive(tasks, ports=ports, min_chunk_bytes=unit)

    check_division(division, tasks)
    exact = plan_waves([Task(t.id, t.senders, t.receivers, -(-t.nbytes // unit) * unit) for t in tasks], ports=ports)
    busiest = exact.bound.nbytes
    assert division.schedule.makespan_bytes <= busiest
    if unit == 1:
        assert division.schedule.makespan_bytes == busiest
        assert division.schedule.gap == 1.0

    ends: dict[int, int] = {}
    for cut in division.cuts:
        ends[cut.task] = max(ends.get(cut.task, 0), cut.offset + cut.nbytes)

    for cut in division.cuts:
        assert cut.nbytes % unit == 0 or cut.offset + cut.nbytes == ends[cut.task]


def test_preemption_on_a_small_plan_by_hand() -> None:
    # Loads: senders 5 and 4, receivers 6 and 3. Whole tasks take 4 + 3 at best; cut, 6 is reached.
    tasks = [Task(0, (0,), (2,), 3), Task(1, (0,), (3,), 2), Task(2, (1,), (2,), 3), Task(3, (1,), (3,), 1)]

    division = plan_preemptive(tasks)

    check_division(division, tasks)
    assert (division.schedule.makespan_bytes, division.schedule.bound.nbytes) == (6, 6)


def test_preemption_needs_one_to_one_tasks_over_two_sides() -> None:
    triangle = [Task(0, (0,), (1,), 1), Task(1, (1,), (2,), 1), Task(2, (2,), (0,), 1)]
    broadcast = [Task(0, (0,), (1, 2), 1)]

    for tasks in (triangle, broadcast):
        with pytest.raises(ScheduleError, match="one-to-one tasks over a bipartite graph"):
            plan_preemptive(tasks)


@given(data=st.data(), ports=st.sampled_from(("half", "full")))
def test_cutting_evenly_carries_every_byte_once(data: st.DataObject, ports: PortModel) -> None:
    tasks = data.draw(pairs(full=True))
    tasks += [Task(90, (0, 1), (2, 3), 11, (tasks[0].id,), "a broadcast"), Task(91, (3,), (1,), 30, (90,), "a relay")]

    division = plan_divisible(tasks, ports=ports, min_chunk_bytes=4)

    check_division(division, tasks)
    possible = divisible_nbytes(build_graph(tasks, ports))
    whole = plan_waves(tasks, ports=ports).makespan_bytes
    assert possible <= division.schedule.makespan_bytes <= max(whole, 1.05 * possible)


def test_start_ups_weigh_against_shorter_waves() -> None:
    # Whole: 9 + 4 + 1 bytes in 3 waves. Cut, fewer bytes in more waves: worth it only if starting is cheap.
    tasks = [Task(0, (0,), (2,), 9), Task(1, (1,), (3,), 5), Task(2, (1,), (4,), 4), Task(3, (1,), (2,), 1)]

    cheap = plan_divisible(tasks, min_chunk_bytes=1, cost=LinkCost(alpha_seconds=0.1, nbytes_per_second=1.0))
    dear = plan_divisible(tasks, min_chunk_bytes=1, cost=LinkCost(alpha_seconds=10.0, nbytes_per_second=1.0))

    check_division(cheap, tasks)
    check_division(dear, tasks)
    assert cheap.schedule.makespan_bytes < 14
    assert (dear.schedule.makespan_bytes, len(dear.cuts)) == (14, 4)


def test_whole_tasks_stay_whole_where_they_are_good_enough() -> None:
    tasks = [Task(id, (id % 3,), (3 + id % 2,), 1 << 20) for id in range(12)]

    division = plan_divisible(tasks)

    assert len(division.cuts) == 12
    assert division.schedule.gap == 1.0


@pytest.mark.parametrize("seed", range(12))
def test_one_to_one_plans_of_random_sizes_come_within_five_percent(seed: int) -> None:
    rng = random.Random(seed)
    actors = rng.choice((3, 6, 12, 24, 48))
    tasks = [
        Task(id, (rng.randrange(actors),), (actors + rng.randrange(actors),), int(rng.paretovariate(1.2) * 1e7))
        for id in range(actors * rng.choice((3, 8)))
    ]

    division = plan_divisible(tasks)

    assert division.schedule.gap <= 1.05
    assert min(cut.nbytes for cut in division.cuts) >= 1 << 20


def test_nothing_divides_into_nothing() -> None:
    assert plan_divisible([]).cuts == plan_preemptive([]).cuts == ()


@pytest.mark.parametrize("same", [False, True])
def test_a_chain_is_not_cut_as_cutting_makes_it_no_shorter(same: bool) -> None:
    tasks = [
        Task(id, (0 if same else 2 * id,), (1 if same else 2 * id + 1,), 1 << 30, (id - 1,) if id else ())
        for id in range(12)
    ]

    division = plan_divisible(tasks)

    assert [cut.nbytes for cut in division.cuts] == [1 << 30] * 12
    assert division.schedule.makespan_bytes == divisible_nbytes(build_graph(tasks, "half")) == 12 << 30


def test_what_is_tried_stays_below_a_count_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of a byte would be needed for a gap of exactly 1: a thousand million of them.
    rng = random.Random(1)
    tasks = [Task(id, (rng.randrange(4),), (4 + rng.randrange(4),), rng.randrange(1 << 30)) for id in range(30)]
    colored: list[int] = []
    plan = divide.plan_waves

    def count(pieces: tuple[Task, ...], *, ports: PortModel, strategy: str = "auto") -> Schedule:
        if strategy == "largest_first":
            colored.append(sum(len(piece.members) + len(piece.after) for piece in pieces))

        return plan(pieces, strategy=strategy, ports=ports)

    monkeypatch.setattr(divide, "plan_waves", count)

    division = plan_divisible(tasks, min_chunk_bytes=1, max_gap=1.0)

    assert sum(colored) <= divide._CHUNK_STEPS
    check_division(division, tasks)


def test_chunks_of_tasks_that_depend_on_each_other_count_their_links(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [Task(0, (0,), (2,), 100), Task(1, (1,), (3,), 90), Task(2, (0,), (3,), 50, (0, 1)), Task(3, (2,), (1,), 9)]
    monkeypatch.setattr(divide, "_CHUNK_STEPS", 10)  # the whole tasks: 8 memberships, 2 links

    division = plan_divisible(tasks, min_chunk_bytes=1, max_gap=1.0)

    assert len(division.cuts) == 4


def test_rounds_are_given_up_when_their_budget_is_spent() -> None:
    tasks = [Task(id, (id % 3,), (3 + id % 4,), 50 + id) for id in range(12)]
    graph = build_graph(tasks, "half")
    budget = StepBudget(10**6)

    rounds = level_rounds(graph, graph.nbytes, parts=8, budget=budget)
    used = 10**6 - budget.left

    assert rounds == level_rounds(graph, graph.nbytes, parts=8)
    assert rounds == level_rounds(graph, graph.nbytes, parts=8, budget=StepBudget(used))
    assert level_rounds(graph, graph.nbytes, parts=8, budget=StepBudget(used - 1)) == []
