"""Tasks: equal chunks, cuts between rows where they may be, an order that spreads the actors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.plan.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, choose_chunk_bytes, cut_run
from wavecast.runtime.plan.digest import plan_digest
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import (
    MAX_TASKS,
    build_tasks,
    group_routes,
    relabel,
    spread_tasks,
    task_routes,
)
from wavecast.scheduler import LinkCost, Task

MIB = 1 << 20


def route(*extent: int, offset: tuple[int, ...] = (), dtype: str = "float32", itemsize: int = 4) -> Route:
    numel = 1
    for size in extent:
        numel *= size

    return Route(0, (1,), "w", offset or (0,) * len(extent), extent, dtype, numel * itemsize)


def sizes(chunks: tuple[tuple[Route, ...], ...]) -> list[int]:
    return [sum(each.nbytes for each in chunk) for chunk in chunks]


def test_chunks_are_equal_and_the_fewest_that_fit() -> None:
    chunks = cut_run([route(1000, 256)], chunk_bytes=300 * 1024)
    assert sizes(chunks) == [256_000] * 4
    assert [chunk[0].offset for chunk in chunks] == [(0, 0), (250, 0), (500, 0), (750, 0)]


def test_a_border_moves_to_a_row_where_that_costs_little() -> None:
    chunks = cut_run([route(10_000, 7)], chunk_bytes=100_000)
    assert all(len(chunk) == 1 for chunk in chunks)
    assert sizes(chunks) == [3333 * 28, 3334 * 28, 3333 * 28]


def test_a_border_cuts_a_row_where_rows_are_too_coarse() -> None:
    chunks = cut_run([route(3, 100)], chunk_bytes=600)
    assert sizes(chunks) == [600, 600]
    assert [[(each.offset, each.extent) for each in chunk] for chunk in chunks] == [
        [((0, 0), (1, 100)), ((1, 0), (1, 50))],
        [((1, 50), (1, 50)), ((2, 0), (1, 100))],
    ]


def test_chunks_never_exceed_their_limit_even_by_a_row() -> None:
    for chunk_bytes in (1000, 1001, 1016, 4096):
        chunks = cut_run(
            [route(499, 3), route(77, 5, dtype="uint8", itemsize=1), route(600, 2)], chunk_bytes=chunk_bytes
        )
        assert max(sizes(chunks)) <= chunk_bytes
        assert sum(sizes(chunks)) == 499 * 12 + 385 + 4800


def test_a_row_is_cut_rather_than_a_chunk_added() -> None:
    found = sizes(cut_run([route(10_000, 7)], chunk_bytes=93_336))
    assert found == [93_332, 93_332, 93_336]


def test_chunks_of_a_run_are_within_one_part_in_256_of_equal() -> None:
    routes = [route(1536, 333, offset=(1536 * number, 0)) for number in range(37)]
    found = sizes(cut_run(routes, chunk_bytes=3 * MIB))
    ideal = sum(found) / len(found)
    assert all(abs(size - ideal) <= ideal / 256 for size in found)


def test_a_border_between_two_routes_cuts_neither() -> None:
    routes = [route(8, 8), route(8, 8, offset=(8, 0))]
    assert cut_run(routes, chunk_bytes=256) == ((routes[0],), (routes[1],))


def test_a_run_that_fits_is_one_chunk_and_an_empty_one_none() -> None:
    routes = (route(8, 8), route())
    assert cut_run(routes, chunk_bytes=260) == (routes,)
    assert cut_run((), chunk_bytes=16) == ()


def test_scalars_fill_chunks_whole() -> None:
    assert sizes(cut_run([route() for _ in range(5)], chunk_bytes=16)) == [8, 12]


def test_a_chunk_smaller_than_an_element_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_bytes is 15; an element may need 16"):
        cut_run([route(4)], chunk_bytes=15)


def test_chunks_so_small_that_tasks_have_no_end_are_refused_before_any_is_made(kit) -> None:
    plan = plan_reshard(kit.split("w", (MAX_TASKS + 1, 4), 1), kit.split("w", (MAX_TASKS + 1, 4), 1))
    assert plan.nbytes == 16 * (MAX_TASKS + 1)
    with pytest.raises(ConfigError, match="chunk_bytes is 16: it cuts 1048592 bytes into 65537 tasks, more than 65536"):
        build_tasks(plan, chunk_bytes=16)

    assert len(build_tasks(plan, chunk_bytes=32)) == MAX_TASKS // 2 + 1


@pytest.mark.parametrize(
    ("port_nbytes", "chunk_bytes"),
    [(0, MIN_CHUNK_BYTES), (100 * MIB, MIN_CHUNK_BYTES), (1200 * MIB, 150 * MIB), (1 << 40, MAX_CHUNK_BYTES)],
)
def test_the_chunk_size_follows_the_busiest_port(port_nbytes: int, chunk_bytes: int) -> None:
    assert choose_chunk_bytes(port_nbytes) == chunk_bytes


def test_the_chunk_size_makes_chunks_of_different_runs_alike() -> None:
    assert choose_chunk_bytes(8000 * MIB, [600 * MIB] * 4 + [900 * MIB] * 4 + [MIB]) == 300 * MIB
    assert choose_chunk_bytes(8000 * MIB, [900 * MIB] * 8) == 1000 * MIB


def test_eight_chunks_leave_the_busiest_actor(kit) -> None:
    plan = plan_reshard(kit.split("w", (48 * 1024, 1024), 1), kit.split("w", (48 * 1024, 1024), 1))
    tasks = build_tasks(plan)
    assert [task.nbytes for task in tasks] == [24 * MIB] * 8
    assert len(build_tasks(plan, min_chunk_bytes=64 * MIB)) == 3
    assert len(build_tasks(plan, chunk_bytes=8 * MIB)) == 24


def test_routes_between_the_same_actors_are_one_run(kit) -> None:
    sources = [kit.layout(*((f"w{n}", (0,), (4,), (4,), "float32") for n in range(6)))]
    destinations = sources * 2
    plan = plan_reshard(sources, destinations)
    (task,) = build_tasks(plan)
    assert task == Task(0, (0,), (1, 2), 96, payload=plan.routes)
    assert group_routes(plan.routes) == {(0, (1, 2)): plan.routes}


def test_tasks_in_order_of_id_share_no_actor_until_they_must(kit) -> None:
    shape = (48, 48)
    plan = plan_reshard(kit.split("w", shape, 4), kit.split("w", shape, 4, dim=1))
    tasks = build_tasks(plan)
    assert [(task.senders[0], task.receivers[0] - 4) for task in tasks] == [
        (sender, (sender + turn) % 4) for turn in range(4) for sender in range(4)
    ]


def test_runs_are_interleaved_chunk_by_chunk(kit) -> None:
    plan = plan_reshard(kit.split("w", (64, 8), 2), kit.split("w", (64, 8), 2))
    tasks = build_tasks(plan, chunk_bytes=256)
    assert [task.senders[0] for task in tasks] == [0, 1] * 4
    assert [task_routes(task)[0].offset[0] for task in tasks] == [0, 32, 8, 40, 16, 48, 24, 56]


def test_a_task_of_a_relay_is_relabelled(kit) -> None:
    plan = plan_reshard(kit.split("w", (4,), 1), kit.split("w", (4,), 1, copies=3))
    (task,) = build_tasks(plan)
    assert relabel(task) is task
    hop = replace(task, id=7, senders=(1,), receivers=(3, 2), after=(0,))
    (moved,) = task_routes(relabel(hop))
    assert moved == replace(plan.routes[0], sender=1, receivers=(2, 3))
    assert replace(relabel(hop), payload=None) == replace(hop, payload=None)


@pytest.mark.parametrize("method", ["chain", "tree"])
def test_hops_carry_the_routes_of_what_they_pass_on(kit, method) -> None:
    """Four chunks to three receivers: twelve hops, each of them after the one that brought its bytes."""
    plan = plan_reshard(kit.split("w", (64,), 1), kit.split("w", (64,), 1, copies=3))
    tasks = build_tasks(plan, chunk_bytes=64)
    hops = spread_tasks(tasks, method=method)
    assert len(tasks) == 4
    assert len(hops) == 12
    by_id = {hop.id: hop for hop in hops}
    for hop in hops:
        (route,) = task_routes(hop)
        assert ((route.sender,), route.receivers) == (hop.senders, hop.receivers)
        if hop.senders == (0,):
            assert hop.after == ()
        else:
            (before,) = (by_id[id] for id in hop.after)
            assert before.receivers == hop.senders
            assert task_routes(before)[0].box == route.box

    assert sorted((hop.receivers[0], task_routes(hop)[0].offset[0]) for hop in hops) == [
        (receiver, 16 * chunk) for receiver in (1, 2, 3) for chunk in range(4)
    ]


def test_a_broadcast_stays_unless_its_receivers_cost_a_copy_each(kit) -> None:
    plan = plan_reshard(kit.split("w", (64,), 1), kit.split("w", (64,), 1, copies=3))
    tasks = build_tasks(plan, chunk_bytes=64)
    assert spread_tasks(tasks) == tasks
    assert spread_tasks(tasks, cost=LinkCost(branching=1.0, alpha_seconds=0.0)) == spread_tasks(tasks, method="tree")


def test_a_task_of_something_else_has_no_routes() -> None:
    with pytest.raises(TypeError, match="task 3 carries no routes"):
        task_routes(Task(3, (0,), (1,), 8, payload="mine"))


def test_a_digest_covers_plan_and_schedule() -> None:
    @dataclass(frozen=True)
    class Digested:
        digest: str

    a, b = Digested("aa"), Digested("bb")
    assert plan_digest(a, b) == "b8ea367346d0d8fa03cca835011f81bae259cc5bc02a7e0843fd647cddf8ea3e"
    assert plan_digest(a, b) != plan_digest(b, a)
