"""Whole models between parallel layouts that earlier systems refuse, skip or get wrong; every element is compared."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.tasks import build_tasks, task_routes

HIDDEN, LAYERS, HEADS, HEAD_DIM, EXPERTS, MOE = 12, 4, 24, 2, 8, 24


def bounds(size: int, parts: int, part: int) -> tuple[int, int]:
    return size * part // parts, size * (part + 1) // parts


def model(
    tp: int, *, pp: int = 1, dp: int = 1, ep: int = 1, etp: int = 1, kv_heads: int = 8, replicas: int = 1
) -> list[Layout]:
    """Return one layout a rank (tp fastest, then dp, then pp; experts: etp fastest, then ep) of a small MoE decoder."""
    layouts: list[Layout] = []
    for stage, local in product(range(pp), range(tp * dp)):
        t, expert_rank, expert_part = local % tp, local // etp % ep, local % etp
        first, last = bounds(LAYERS, pp, stage)
        pieces = [rows("embed", 48, t, tp)] if stage == 0 else []
        for layer in range(first, last):
            pieces += attention(f"layers.{layer}", t, tp, kv_heads)
            low, high = bounds(EXPERTS, ep, expert_rank)
            for expert in range(low, high):
                pieces.append(rows(f"layers.{layer}.experts.{expert}.up", MOE, expert_part, etp))
                pieces.append(columns(f"layers.{layer}.experts.{expert}.down", MOE, expert_part, etp))

        pieces += [Piece("norm", Box((0,), (HIDDEN,)), (HIDDEN,), "bfloat16"), rows("head", 48, t, tp)][
            : 2 if stage == pp - 1 else 0
        ]
        layouts.append(Layout(tuple(pieces)))

    return layouts * replicas


def attention(prefix: str, t: int, tp: int, kv_heads: int) -> list[Piece]:
    low, high = bounds(HEADS, tp, t)
    group = HEADS // kv_heads
    kv_low, kv_high = low // group, (high - 1) // group + 1
    kv_shape, kv_box = (kv_heads * HEAD_DIM, HIDDEN), (kv_low * HEAD_DIM, (kv_high - kv_low) * HEAD_DIM)
    return [
        Piece(f"{prefix}.norm", Box((0,), (HIDDEN,)), (HIDDEN,), "bfloat16"),
        rows(f"{prefix}.q", HEADS * HEAD_DIM, t, tp),
        *(
            Piece(f"{prefix}.{name}", Box((kv_box[0], 0), (kv_box[1], HIDDEN)), kv_shape, "bfloat16")
            for name in ("k", "v")
        ),
        columns(f"{prefix}.o", HEADS * HEAD_DIM, t, tp),
        Piece(f"{prefix}.router", Box((0, 0), (EXPERTS, HIDDEN)), (EXPERTS, HIDDEN), "float32"),
    ]


def rows(name: str, size: int, part: int, parts: int) -> Piece:
    low, high = bounds(size, parts, part)
    return Piece(name, Box((low, 0), (high - low, HIDDEN)), (size, HIDDEN), "bfloat16")


def columns(name: str, size: int, part: int, parts: int) -> Piece:
    low, high = bounds(size, parts, part)
    return Piece(name, Box((0, low), (HIDDEN, high - low)), (HIDDEN, size), "bfloat16")


def check(kit, sources: list[Layout], destinations: list[Layout]) -> ReshardPlan:
    plan = plan_reshard(sources, destinations)
    kit.apply_routes(plan.routes, sources, destinations)
    tasks = build_tasks(plan, chunk_bytes=700)
    kit.apply_routes([route for task in tasks for route in task_routes(task)], sources, destinations)
    return plan


def test_three_replicas_of_tp4_all_get_their_weights_from_tp2(kit) -> None:
    plan = check(kit, model(2), model(4, replicas=3))
    received = plan.received_nbytes()
    assert received[:4] == received[4:8] == received[8:]
    assert all(len(route.receivers) % 3 == 0 for route in plan.routes)


def test_an_odd_number_of_sources_does_not_shift_the_slices_of_tp2(kit) -> None:
    # Destinations are numbered from 3: their slice must not follow from the number.
    plan = check(kit, model(1, pp=3), model(2))
    slices = {route.receivers: route.offset for route in plan.routes if route.tensor == "head"}
    assert slices == {(3,): (0, 0), (4,): (24, 0)}


def test_the_slices_of_tp4_do_not_follow_from_an_offset_of_two(kit) -> None:
    plan = check(kit, model(1, pp=2), model(4))
    assert {route.receivers: route.offset for route in plan.routes if route.tensor == "embed"} == {
        (2,): (0, 0),
        (3,): (12, 0),
        (4,): (24, 0),
        (5,): (36, 0),
    }


def test_routed_experts_of_ep8_tp1_reach_tp4(kit) -> None:
    plan = check(kit, model(1, dp=8, ep=8), model(4, etp=4))
    experts = [route for route in plan.routes if ".experts." in route.tensor]
    assert len(experts) == LAYERS * EXPERTS * 2 * 4
    assert {route.sender for route in experts} == set(range(8))


@pytest.mark.parametrize(("src", "dst"), [(2, 3), (4, 6), (3, 2), (6, 4), (4, 3), (5, 7), (8, 6), (6, 8)])
def test_tp_sizes_need_not_divide_each_other(kit, src: int, dst: int) -> None:
    plan = check(kit, model(src), model(dst))
    assert {actor for route in plan.routes for actor in route.receivers} == set(range(src, src + dst))


def test_four_stages_feed_two_replicas_without_mixing_their_layers(kit) -> None:
    plan = check(kit, model(1, pp=4), model(2, replicas=2))
    assert {(route.sender, route.tensor.split(".")[1]) for route in plan.routes if "layers" in route.tensor} == {
        (stage, str(stage)) for stage in range(4)
    }
    assert {route.receivers for route in plan.routes} == {(4, 6), (5, 7), (4, 5, 6, 7)}


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ({"tp": 2, "dp": 2, "ep": 4}, {"tp": 2, "dp": 2, "ep": 2, "etp": 2}),
        ({"tp": 1, "dp": 8, "ep": 8}, {"tp": 4, "ep": 4}),
        ({"tp": 4, "etp": 4}, {"tp": 4, "dp": 2, "ep": 8}),
        ({"tp": 2, "dp": 3, "ep": 3}, {"tp": 4, "ep": 2, "etp": 2, "replicas": 3}),
    ],
)
def test_destinations_may_split_their_experts(kit, src: dict[str, int], dst: dict[str, int]) -> None:
    check(kit, model(**src), model(**dst))


@pytest.mark.parametrize(("src", "dst"), [(1, 2), (2, 4), (1, 4), (2, 8), (8, 2), (2, 1)])
def test_eight_kv_heads_are_cut_by_their_own_number(kit, src: int, dst: int) -> None:
    plan = check(kit, model(src, kv_heads=8), model(dst, kv_heads=8))
    k = {
        (route.receivers[0] - src, route.offset[0], route.extent[0])
        for route in plan.routes
        if route.tensor.endswith(".0.k")
    }
    per_rank, width = 8 * HEAD_DIM // dst, min(8 * HEAD_DIM // dst, 8 * HEAD_DIM // src)
    assert k == {(rank, rank * per_rank + start, width) for rank in range(dst) for start in range(0, per_rank, width)}


@pytest.mark.parametrize("tp", [4, 6, 8, 12])
def test_fewer_kv_heads_than_ranks_are_sent_to_all_who_share_them(kit, tp: int) -> None:
    plan = check(kit, model(2, kv_heads=2), model(tp, kv_heads=2))
    shared = [route.receivers for route in plan.routes if route.tensor == "layers.0.k"]
    assert shared == [tuple(range(2, 2 + tp // 2)), tuple(range(2 + tp // 2, 2 + tp))]


def test_tensors_that_every_rank_holds_whole_reach_every_rank(kit) -> None:
    # The router is the only float32 tensor: whatever is grouped by dtype holds nothing but replicas.
    plan = check(kit, model(2, dp=2), model(4, replicas=2))
    routers = [route for route in plan.routes if route.dtype == "float32"]
    assert len(routers) == LAYERS
    assert {route.receivers for route in routers} == {tuple(range(4, 12))}


def test_colocated_copies_on_every_device_feed_two_replicas(kit) -> None:
    # Four copies of tp 1, two destinations on the devices of the first and the last: each is fed by its neighbour.
    places = [Place("node", f"GPU-{index}") for index in range(4)]
    sources = [replace(layout, place=place) for layout, place in zip(model(1, dp=4), places, strict=True)]
    destinations = [
        replace(layout, place=place) for layout, place in zip(model(1, replicas=2), places[::3], strict=True)
    ]
    plan = check(kit, sources, destinations)
    assert {actor for route in plan.routes for actor in route.receivers} == {4, 5}


def test_no_expert_parallel_source_stands_idle(kit) -> None:
    plan = check(kit, model(2, pp=2, dp=2, ep=2, etp=2), model(2, replicas=4))
    sent = plan.sent_nbytes()
    assert min(sent) > 0
    assert max(sent) <= 1.25 * sum(sent) / len(sent)


def test_more_replicas_than_copies_are_served_once_each(kit) -> None:
    plan = check(kit, model(2, dp=2), model(2, replicas=5))
    assert len(set(plan.received_nbytes())) == 1
    assert all(len(route.receivers) % 5 == 0 for route in plan.routes)


# What earlier systems map rank by rank, as (tp, pp, dp, ep) to (tp, pp, replicas): one column of the other's tables.
MAPPED = [
    ((2, 1, 2, 1), (2, 1, 2)),
    ((1, 2, 2, 1), (1, 1, 3)),
    ((4, 2, 1, 1), (8, 1, 1)),
    ((2, 4, 1, 1), (8, 1, 1)),
    ((4, 1, 2, 1), (8, 1, 1)),
    ((2, 1, 4, 1), (8, 1, 1)),
    ((2, 4, 1, 1), (4, 2, 1)),
    ((1, 2, 4, 1), (4, 1, 2)),
    ((1, 1, 8, 1), (2, 1, 4)),
    ((2, 1, 2, 2), (4, 1, 2)),
    ((1, 1, 8, 4), (4, 1, 2)),
    ((2, 2, 2, 2), (4, 1, 2)),
]


@pytest.mark.parametrize(("src", "dst"), MAPPED)
def test_pairs_that_have_a_rank_mapping_need_none(kit, src: tuple[int, ...], dst: tuple[int, ...]) -> None:
    tp, pp, dp, ep = src
    plan = check(kit, model(tp, pp=pp, dp=dp, ep=ep), model(dst[0], pp=dst[1], replicas=dst[2], etp=dst[0]))
    assert min(plan.received_nbytes()) > 0


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ({"tp": 2, "pp": 2, "dp": 2}, {"tp": 4, "replicas": 3}),
        ({"tp": 2, "pp": 2}, {"tp": 1, "pp": 4}),
        ({"tp": 3, "pp": 2, "dp": 2}, {"tp": 2, "pp": 4, "replicas": 5}),
        ({"tp": 4, "pp": 4}, {"tp": 1}),
        ({"tp": 1, "dp": 7}, {"tp": 5, "replicas": 2}),
    ],
)
def test_pipelines_replicas_and_copies_mix(kit, src: dict[str, int], dst: dict[str, int]) -> None:
    check(kit, model(**src), model(**dst))
