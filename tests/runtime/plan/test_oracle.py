"""Random worlds: every element of every destination piece arrives, once, from an actor that holds it."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place
from wavecast.runtime.plan.reshard import plan_reshard, routes_digest
from wavecast.runtime.plan.tasks import build_tasks, task_routes

WORLDS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 19, 23, 24)


def cut_randomly(random: Random, box: Box, parts: int) -> list[Box]:
    boxes = [box]
    while len(boxes) < parts:
        splittable = [(i, d) for i, b in enumerate(boxes) for d, n in enumerate(b.extent) if n > 1]
        if not splittable:
            break

        i, d = random.choice(splittable)
        whole = boxes.pop(i)
        at = random.randint(1, whole.extent[d] - 1)
        offset, extent = list(whole.offset), list(whole.extent)
        boxes.append(Box(tuple(offset), (*extent[:d], at, *extent[d + 1 :])))
        offset[d] += at
        boxes.append(Box(tuple(offset), (*extent[:d], extent[d] - at, *extent[d + 1 :])))

    return boxes


def random_box(random: Random, shape: tuple[int, ...]) -> Box:
    offset = tuple(random.randint(0, n) for n in shape)
    return Box(offset, tuple(random.randint(0, n - a) for a, n in zip(offset, shape, strict=True)))


def random_world(random: Random, *, overlaps: bool, mixed: bool = False) -> tuple[list[Layout], list[Layout]]:
    nsources = random.choice(WORLDS)
    replicas, replica_size = random.choice((1, 1, 2, 3, 5)), random.choice(WORLDS[:9])
    sources: list[list[Piece]] = [[] for _ in range(nsources)]
    destinations: list[list[Piece]] = [[] for _ in range(replicas * replica_size)]
    for number in range(random.randint(1, 5)):
        name = f"tensor.{number}"
        shape = tuple(random.randint(1, 8) for _ in range(random.randint(0, 4)))
        whole = Box((0,) * len(shape), shape)
        src_dtype, *dst_dtypes = random.choice((("float32", "float32", "bfloat16"), ("int32", "int32", "uint8")))
        others = (src_dtype, src_dtype, *dst_dtypes, "float64" if src_dtype == "float32" else src_dtype)
        for box in cut_randomly(random, whole, random.randint(1, 2 * nsources)):
            for actor in random.sample(range(nsources), random.randint(1, min(3, nsources))):
                sources[actor].append(Piece(name, box, shape, random.choice(others) if mixed else src_dtype))

        for _ in range(random.randint(0, 4) if overlaps else 0):
            dtype = random.choice(others) if mixed else src_dtype
            sources[random.randrange(nsources)].append(Piece(name, random_box(random, shape), shape, dtype))

        for replica in range(replicas):
            dtype = random.choice(dst_dtypes)
            for box in cut_randomly(random, whole, random.randint(1, 2 * replica_size)):
                for rank in random.sample(range(replica_size), random.randint(1, min(2, replica_size))):
                    wanted = destinations[replica * replica_size + rank]
                    wanted.append(Piece(name, box, shape, dtype))
                    if random.random() < 0.05:
                        wanted.append(Piece(name, box, shape, dtype))

    places = [None, *(Place(f"node{n}", f"gpu{g}") for n in range(2) for g in range(3))]
    known = random.random() < 0.5
    return (
        [Layout(tuple(pieces), random.choice(places) if known else None) for pieces in sources],
        [Layout(tuple(pieces), random.choice(places) if known else None) for pieces in destinations],
    )


@settings(max_examples=150, deadline=None)
@given(random=st.randoms(use_true_random=True), overlaps=st.booleans())
def test_routes_bring_every_element_exactly_once(kit, random: Random, overlaps: bool) -> None:
    sources, destinations = random_world(random, overlaps=overlaps)
    plan = plan_reshard(sources, destinations)
    kit.apply_routes(plan.routes, sources, destinations)
    assert plan.nbytes == sum(plan.received_nbytes()) == sum(r.nbytes * len(r.receivers) for r in plan.routes)
    assert plan.digest == routes_digest(plan.routes)
    assert plan_reshard(sources, destinations) == plan


@settings(max_examples=150, deadline=None)
@given(random=st.randoms(use_true_random=True))
def test_no_rounded_element_is_sent_where_an_exact_one_is_held(kit, random: Random) -> None:
    sources, destinations = random_world(random, overlaps=True, mixed=True)
    plan = plan_reshard(sources, destinations)
    kit.apply_routes(plan.routes, sources, destinations)
    kit.check_dtypes(plan.routes, sources)
    assert plan_reshard(sources, destinations) == plan


@settings(max_examples=75, deadline=None)
@given(random=st.randoms(use_true_random=True), chunk_bytes=st.integers(16, 400))
def test_tasks_of_any_chunk_size_bring_every_element_exactly_once(kit, random: Random, chunk_bytes: int) -> None:
    sources, destinations = random_world(random, overlaps=False)
    plan = plan_reshard(sources, destinations)
    tasks = build_tasks(plan, chunk_bytes=chunk_bytes)
    assert [task.id for task in tasks] == list(range(len(tasks)))
    for task in tasks:
        routes = task_routes(task)
        assert 0 < task.nbytes == sum(route.nbytes for route in routes) <= chunk_bytes
        assert {(route.sender,) for route in routes} == {task.senders}
        assert {route.receivers for route in routes} == {task.receivers}

    kit.apply_routes([route for task in tasks for route in task_routes(task)], sources, destinations)
