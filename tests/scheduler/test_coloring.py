from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations, count

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import STRATEGIES, PortModel, Task, coloring, plan_waves, verify
from wavecast.scheduler.bounds import divisible_nbytes, least_span, lower_bound, uncut_nbytes
from wavecast.scheduler.greedy import greedy
from wavecast.scheduler.konig import is_bipartite
from wavecast.scheduler.ports import TaskGraph, build_graph
from wavecast.scheduler.taken import ROW_WAVES

OPTIMAL = ("edge_coloring", "balanced", "auto")


def one_to_one(edges: list[tuple[int, int]], nbytes: int = 1) -> list[Task]:
    return [Task(id, (sender,), (receiver,), nbytes) for id, (sender, receiver) in enumerate(edges)]


def waves_of(tasks: list[Task], strategy: str, ports: PortModel = "half") -> int:
    schedule = plan_waves(tasks, strategy=strategy, ports=ports)
    verify(schedule, tasks)
    return len(schedule.waves)


def fewest_by_trying(graph: TaskGraph) -> int:
    """Colour in every way, by backtracking: only for a handful of tasks."""
    ports = [set(edge) for edge in graph.ports]

    def place(task: int, waves: list[set[int]], limit: int) -> bool:
        if task == len(ports):
            return True

        for wave in waves:
            if not wave & ports[task]:
                wave |= ports[task]
                if place(task + 1, waves, limit):
                    return True

                wave -= ports[task]

        return len(waves) < limit and place(task + 1, [*waves, set(ports[task])], limit)

    return next(limit for limit in count() if place(0, [], limit))


def least_span_by_trying(graph: TaskGraph) -> int:
    """The smallest sum over waves of the largest task, over every colouring. Larger tasks open the waves."""
    order = sorted(range(len(graph.ports)), key=lambda task: -graph.nbytes[task])
    best = sum(graph.nbytes)

    def place(index: int, waves: list[set[int]], total: int) -> None:
        nonlocal best
        if total >= best:
            return

        if index == len(order):
            best = total
            return

        ports = set(graph.ports[order[index]])
        for wave in waves:
            if not wave & ports:
                wave |= ports
                place(index + 1, waves, total)
                wave -= ports

        place(index + 1, [*waves, ports], total + graph.nbytes[order[index]])

    place(0, [], 0)
    return best


@given(edges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60), strategy=st.sampled_from(OPTIMAL))
def test_one_to_one_plans_in_the_full_model_take_as_many_waves_as_the_busiest_port_has_tasks(
    edges: list[tuple[int, int]], strategy: str
) -> None:
    tasks = one_to_one(edges)
    busiest = max([sum(edge[side] == actor for edge in edges) for side in (0, 1) for actor in range(10)], default=0)

    assert waves_of(tasks, strategy, "full") == busiest


@given(
    edges=st.lists(st.tuples(st.integers(0, 9), st.integers(10, 19)), max_size=60),
    sizes=st.lists(st.integers(0, 5), min_size=60, max_size=60),
    strategy=st.sampled_from(OPTIMAL),
)
def test_disjoint_plans_in_the_half_model_do_so_too(
    edges: list[tuple[int, int]], sizes: list[int], strategy: str
) -> None:
    tasks = [Task(id, (a,), (b,), sizes[id]) for id, (a, b) in enumerate(edges)]
    busiest = max([sum(actor in edge for edge in edges) for actor in range(20)], default=0)

    assert waves_of(tasks, strategy, "half") == busiest


@pytest.mark.parametrize("strategy", OPTIMAL)
@pytest.mark.parametrize(
    ("rows", "columns", "times"), [(3, 2, 1), (4, 3, 2), (6, 4, 1), (7, 7, 3), (23, 17, 1), (40, 40, 1), (5, 61, 2)]
)
def test_all_to_all_in_shuffled_order_is_optimal(rows: int, columns: int, times: int, strategy: str) -> None:
    edges = [(row, rows + column) for row in range(rows) for column in range(columns)] * times
    random.Random(rows * columns).shuffle(edges)

    assert waves_of(one_to_one(edges), strategy) == max(rows, columns) * times


@pytest.mark.parametrize("seed", range(4))
def test_regular_plans_without_any_slack_are_optimal(seed: int) -> None:
    rng = random.Random(seed)
    actors, degree = rng.choice((31, 64, 97)), rng.choice((5, 12, 30))
    edges = []
    for _ in range(degree):
        targets = list(range(actors))
        rng.shuffle(targets)
        edges += [(actor, actors + target) for actor, target in enumerate(targets)]

    rng.shuffle(edges)

    assert waves_of(one_to_one(edges), "edge_coloring") == degree
    assert waves_of(one_to_one(edges), "first_fit") > degree


GRAPHS: list[tuple[str, Callable[[], nx.Graph], int]] = [
    ("an even complete graph", lambda: nx.complete_graph(8), 7),
    ("an odd complete graph", lambda: nx.complete_graph(7), 7),
    ("an even cycle", lambda: nx.cycle_graph(8), 2),
    ("an odd cycle", lambda: nx.cycle_graph(9), 3),
    ("the Petersen graph", nx.petersen_graph, 4),
    ("a star", lambda: nx.star_graph(9), 9),
    ("a grid", lambda: nx.convert_node_labels_to_integers(nx.grid_2d_graph(5, 6)), 4),
    ("a hypercube", lambda: nx.convert_node_labels_to_integers(nx.hypercube_graph(4)), 4),
    ("a dodecahedron", nx.dodecahedral_graph, 3),
]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize(("name", "build", "fewest"), GRAPHS, ids=[name for name, _, _ in GRAPHS])
def test_known_graphs_are_never_below_their_optimum_and_met_by_the_best(
    name: str, build: Callable[[], nx.Graph], fewest: int, strategy: str
) -> None:
    tasks = one_to_one(list(build().edges))

    waves = waves_of(tasks, strategy)

    assert fewest <= waves <= 2 * max(degree for _, degree in build().degree) - 1
    if strategy in ("edge_coloring", "auto"):
        assert waves == fewest


@given(data=st.data(), ports=st.sampled_from(("half", "full")))
def test_bounds_hold_and_small_plans_are_met(data: st.DataObject, ports: PortModel) -> None:
    actors = st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True).map(tuple)
    tasks = [
        Task(id, data.draw(actors), data.draw(actors), data.draw(st.integers(0, 4)))
        for id in range(data.draw(st.integers(0, 8)))
    ]
    graph = build_graph(tasks, ports)

    fewest = fewest_by_trying(graph)
    least = least_span_by_trying(graph)

    assert lower_bound(graph).waves <= fewest
    assert max(graph.loads(), default=0) <= uncut_nbytes(graph) <= least_span(graph, waves=fewest) <= least
    assert divisible_nbytes(graph) <= least
    for strategy in STRATEGIES:
        schedule = plan_waves(tasks, strategy=strategy, ports=ports)
        assert len(schedule.waves) >= fewest
        assert schedule.makespan_bytes >= least

    assert waves_of(tasks, "edge_coloring", ports) == fewest


def test_bounds_by_hand() -> None:
    triangle = build_graph([*one_to_one([(0, 1), (1, 2), (2, 0)], 5), Task(3, (3,), (4,), 8)], "half")
    assert (lower_bound(triangle).waves, lower_bound(triangle).nbytes) == (3, 10)
    assert (divisible_nbytes(triangle), uncut_nbytes(triangle), least_span(triangle, waves=3)) == (15, 13, 18)

    five = build_graph(one_to_one([(a, b) for a in range(5) for b in range(a)], 2), "half")
    assert (lower_bound(five).waves, divisible_nbytes(five), uncut_nbytes(five)) == (5, 10, 8)

    wide = build_graph([Task(id, (id,), (5, 6, 7, 8), 3) for id in range(3)], "half")
    assert (lower_bound(wide).waves, divisible_nbytes(wide)) == (3, 9)

    chain = build_graph([Task(id, (2 * id,), (2 * id + 1,), 1, (id - 1,) if id else ()) for id in range(4)], "half")
    assert lower_bound(chain).waves == 4

    # Largest of any port: 9, then 4 of the second sender, then 1.
    uneven = build_graph(
        [Task(0, (0,), (2,), 9), Task(1, (1,), (3,), 5), Task(2, (1,), (4,), 4), Task(3, (1,), (2,), 1)], "half"
    )
    assert uncut_nbytes(uneven) == 14
    assert uncut_nbytes(uneven, chunk_bytes=5) == 5 + 5 + 1


@pytest.mark.parametrize("seed", range(6))
def test_one_to_many_plans_are_no_worse_than_saturation_on_the_whole_conflict_graph(seed: int) -> None:
    rng = random.Random(seed)
    tasks = [
        Task(id, (rng.randrange(8),), tuple(8 + actor for actor in rng.sample(range(12), rng.randint(1, 4))), 1)
        for id in range(80)
    ]
    conflicts = nx.Graph()
    conflicts.add_nodes_from(range(len(tasks)))
    conflicts.add_edges_from((a.id, b.id) for a, b in combinations(tasks, 2) if set(a.members) & set(b.members))
    reference = max(nx.greedy_color(conflicts, strategy="saturation_largest_first").values()) + 1

    assert waves_of(tasks, "auto") <= reference
    assert waves_of(tasks, "edge_coloring") <= reference
    assert waves_of(tasks, "dsatur") <= reference + 2


def test_two_sides_are_found_whatever_they_are_called() -> None:
    path = [(0, 1), (1, 2), (2, 3), (3, 0)]

    assert is_bipartite(build_graph(one_to_one(path), "half"))
    assert not is_bipartite(build_graph(one_to_one([*path, (0, 2)]), "half"))
    assert is_bipartite(build_graph(one_to_one([*path, (0, 2)]), "full"))
    assert not is_bipartite(build_graph([Task(0, (0,), (1, 2), 1)], "half"))


def test_balanced_puts_tasks_of_like_size_together_and_long_waves_first() -> None:
    rng = random.Random(1)
    tasks = [Task(id, (id % 4,), (4 + (id // 4) % 4,), rng.choice((1, 10, 100, 1000))) for id in range(64)]

    balanced = plan_waves(tasks, strategy="balanced")
    first_fit = plan_waves(tasks, strategy="first_fit")

    longest = [wave.longest_nbytes for wave in balanced.waves]
    assert longest == sorted(longest, reverse=True)
    assert len(balanced.waves) == 16
    assert balanced.makespan_bytes < 0.75 * first_fit.makespan_bytes


def test_auto_says_what_it_chose_and_why() -> None:
    pairs = one_to_one([(0, 2), (1, 3), (0, 3)])
    alike = plan_waves(pairs)
    assert alike.strategy == "edge_coloring"
    assert "one-to-one tasks over a bipartite graph" in alike.reason

    unlike = plan_waves([*pairs, Task(9, (1,), (2,), 7)])
    assert (unlike.strategy, "of several sizes" in unlike.reason) == ("balanced", True)

    broadcast = plan_waves([*pairs, Task(9, (1,), (2, 3), 7)])
    assert broadcast.strategy in STRATEGIES
    assert broadcast.reason == "conflicts that are not bipartite: 9 bytes in 3 waves meet the bounds"

    # Seven actors that exchange, each pair with an eighth too: no colouring meets these bounds.
    rng = random.Random(0)
    mixed = [Task(id, (a,), (b, 7), rng.randrange(1, 9)) for id, (a, b) in enumerate(combinations(range(7), 2))]
    assert plan_waves(mixed).reason.startswith("conflicts that are not bipartite: ")
    assert plan_waves(pairs, strategy="dsatur").reason == ""


def test_every_strategy_tells_its_bound_its_cost_or_its_source() -> None:
    for name, strategy in STRATEGIES.items():
        assert strategy.__name__ == name
        assert len(strategy.__doc__ or "") > 200


@pytest.mark.parametrize("strategy", OPTIMAL)
def test_a_port_of_more_tasks_than_a_row_of_waves_is_optimal_too(strategy: str) -> None:
    rng = random.Random(3)
    edges = [(rng.randrange(3), 3 + rng.randrange(3)) for _ in range(3 * ROW_WAVES + 500)]
    tasks = one_to_one(edges)
    degrees = [sum(port in edge for edge in edges) for port in range(6)]
    assert max(degrees) > ROW_WAVES

    assert waves_of(tasks, strategy) == max(degrees)


@pytest.mark.parametrize("linked", [False, True])
def test_first_fit_over_rows_is_first_fit(linked: bool) -> None:
    rng = random.Random(5)
    tasks = [
        Task(
            id,
            (id % 2,),
            tuple(rng.sample(range(2, 8), rng.randint(1, 2))),
            1,
            after=(rng.randrange(max(0, id - 3), id),) if linked and id and rng.random() < 0.5 else (),
        )
        for id in range(4 * ROW_WAVES + 500)
    ]
    taken: list[set[int]] = [set() for _ in range(8)]
    first = [0] * 8  # per actor: all waves below are taken
    expected: list[int] = []
    for task in tasks:
        wave = max([first[actor] for actor in task.members] + [expected[before] + 1 for before in task.after])
        while any(wave in taken[actor] for actor in task.members):
            wave += 1

        for actor in task.members:
            taken[actor].add(wave)
            while first[actor] in taken[actor]:
                first[actor] += 1

        expected.append(wave)

    graph = build_graph(tasks, "half")
    assert greedy(graph, graph.order) == expected
    assert max(expected) > 2 * ROW_WAVES


def test_depths_share_one_budget_of_local_search(monkeypatch: pytest.MonkeyPatch) -> None:
    # A gate between depths, so that only colouring each by itself can do with fewer waves than first fit.
    rng = random.Random(1)
    tasks: list[Task] = []
    before: tuple[int, ...] = ()
    for _ in range(8):
        level = [
            Task(
                len(tasks) + index,
                (rng.randrange(12),),
                tuple(12 + actor for actor in rng.sample(range(12), rng.randint(2, 5))),
                1,
                before,
            )
            for index in range(150)
        ]
        tasks += [*level, Task(len(tasks) + 150, (30,), (31,), 1, tuple(task.id for task in level))]
        before = (tasks[-1].id,)

    given: list[int] = []
    search = coloring._search

    def count(graph: TaskGraph, waves: list[int], fewest: int, steps: int) -> list[int]:
        given.append(steps)
        return search(graph, waves, fewest, steps)

    monkeypatch.setattr(coloring, "_search", count)

    found = waves_of(tasks, "edge_coloring")

    assert len(given) > 1
    assert sum(given) <= coloring._REDUCE_STEPS
    assert found < waves_of(tasks, "first_fit")


def test_depths_that_cannot_do_with_fewer_waves_are_not_coloured_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    tasks = [
        Task(id, (rng.randrange(5),), (5 + rng.randrange(7),), 1, (id - 20,) if id >= 20 else ()) for id in range(400)
    ]
    assert plan_waves(tasks, strategy="first_fit").bound.waves < waves_of(tasks, "first_fit")
    monkeypatch.setattr(coloring, "_by_depth", lambda graph, levels: pytest.fail("coloured by depth"))

    assert waves_of(tasks, "edge_coloring") <= waves_of(tasks, "first_fit")
