"""Routes by exact numbers on odd worlds, what is refused, and what stays the same."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from wavecast.runtime.errors import ConfigError, LayoutError, SyncError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.plan.cover import Cell, cover_tensor
from wavecast.runtime.plan.placement import Holding
from wavecast.runtime.plan.reshard import plan_reshard, routes_digest
from wavecast.runtime.plan.route import Route, is_castable
from wavecast.runtime.plan.tasks import build_tasks

# (sender, receiver, first row, rows) for a tensor of so many rows
ODD_WORLDS = [
    (3, 2, 6, [(0, 3, 0, 2), (1, 3, 2, 1), (1, 4, 3, 1), (2, 4, 4, 2)]),
    (2, 3, 6, [(0, 2, 0, 2), (0, 3, 2, 1), (1, 3, 3, 1), (1, 4, 4, 2)]),
    (4, 3, 12, [(0, 4, 0, 3), (1, 4, 3, 1), (1, 5, 4, 2), (2, 5, 6, 2), (2, 6, 8, 1), (3, 6, 9, 3)]),
    (
        6,
        4,
        12,
        [
            (0, 6, 0, 2),
            (1, 6, 2, 1),
            (1, 7, 3, 1),
            (2, 7, 4, 2),
            (3, 8, 6, 2),
            (4, 8, 8, 1),
            (4, 9, 9, 1),
            (5, 9, 10, 2),
        ],
    ),
]


@pytest.mark.parametrize(("nsources", "ndestinations", "size", "expected"), ODD_WORLDS)
def test_rows_are_cut_where_both_sides_cut(kit, nsources, ndestinations, size, expected) -> None:
    sources, destinations = kit.split("w", (size, 5), nsources), kit.split("w", (size, 5), ndestinations)
    plan = plan_reshard(sources, destinations)
    assert kit.lines(plan) == [(s, (r,), (first, 0), (rows, 5)) for s, r, first, rows in expected]
    assert plan.nbytes == size * 5 * 4
    kit.apply_routes(plan.routes, sources, destinations)


@pytest.mark.parametrize(("nsources", "ndestinations", "size", "expected"), ODD_WORLDS)
def test_columns_are_cut_where_both_sides_cut(kit, nsources, ndestinations, size, expected) -> None:
    sources = kit.split("w", (5, size), nsources, dim=1)
    destinations = kit.split("w", (5, size), ndestinations, dim=1)
    plan = plan_reshard(sources, destinations)
    assert kit.lines(plan) == [(s, (r,), (0, first), (5, columns)) for s, r, first, columns in expected]
    kit.apply_routes(plan.routes, sources, destinations)


def test_rows_become_columns(kit) -> None:
    plan = plan_reshard(kit.split("w", (4, 6), 2), kit.split("w", (4, 6), 3, dim=1))
    assert kit.lines(plan) == [
        (0, (2,), (0, 0), (2, 2)),
        (1, (2,), (2, 0), (2, 2)),
        (0, (3,), (0, 2), (2, 2)),
        (1, (3,), (2, 2), (2, 2)),
        (0, (4,), (0, 4), (2, 2)),
        (1, (4,), (2, 4), (2, 2)),
    ]


def test_equal_boxes_of_several_destinations_are_one_route(kit) -> None:
    plan = plan_reshard(kit.split("w", (4,), 2), kit.split("w", (4,), 4, copies=3))
    assert kit.lines(plan) == [
        (0, (2, 6, 10), (0,), (1,)),
        (0, (3, 7, 11), (1,), (1,)),
        (1, (4, 8, 12), (2,), (1,)),
        (1, (5, 9, 13), (3,), (1,)),
    ]
    assert plan.nbytes == 3 * 16
    assert plan.sent_nbytes() == (8, 8)
    assert plan.received_nbytes() == (4,) * 12


def test_parts_equal_after_the_cut_are_one_route_too(kit) -> None:
    sources = kit.split("w", (4,), 4)
    plan = plan_reshard(sources, kit.split("w", (4,), 2) + kit.split("w", (4,), 1))
    assert [(route.sender, route.receivers) for route in plan.routes] == [
        (0, (4, 6)),
        (1, (4, 6)),
        (2, (5, 6)),
        (3, (5, 6)),
    ]


def test_the_destination_says_the_dtype_and_the_bytes(kit) -> None:
    sources = kit.split("w", (4, 4), 1, dtype="float32")
    destinations = kit.split("w", (4, 4), 1, dtype="bfloat16") + kit.split("w", (4, 4), 1, dtype="float32")
    plan = plan_reshard(sources, destinations)
    assert [(route.receivers, route.dtype, route.nbytes) for route in plan.routes] == [
        ((1,), "bfloat16", 32),
        ((2,), "float32", 64),
    ]
    kit.apply_routes(plan.routes, sources, destinations)


def test_a_tied_copy_on_the_same_actor_shares_the_route(kit) -> None:
    sources = kit.split("w", (4,), 1)
    destinations = [kit.layout(("w", (0,), (4,), (4,), "float32"), ("w", (0,), (4,), (4,), "float32"))]
    plan = plan_reshard(sources, destinations)
    assert kit.lines(plan) == [(0, (1,), (0,), (4,))]
    kit.apply_routes(plan.routes, sources, destinations)


def test_scalars_travel_and_empty_pieces_do_not(kit) -> None:
    sources = [kit.layout(("scale", (), (), (), "float32"), ("w", (0, 0), (2, 3), (2, 3), "float32"))]
    destinations = [
        kit.layout(("scale", (), (), (), "float32"), ("w", (2, 0), (0, 3), (2, 3), "float32")),
        kit.layout(("w", (0, 0), (2, 3), (2, 3), "float32")),
    ]
    plan = plan_reshard(sources, destinations)
    assert [(route.tensor, route.receivers, route.offset, route.extent) for route in plan.routes] == [
        ("scale", (1,), (), ()),
        ("w", (2,), (0, 0), (2, 3)),
    ]
    kit.apply_routes(plan.routes, sources, destinations)


def test_partly_overlapping_sources_are_cut_so_that_each_part_has_all_its_holders(kit) -> None:
    sources = [
        kit.layout(("w", (0,), (6,), (10,), "float32")),
        kit.layout(("w", (4,), (6,), (10,), "float32")),
    ]
    destinations = kit.split("w", (10,), 1)
    plan = plan_reshard(sources, destinations)
    assert [(route.offset, route.extent) for route in plan.routes] == [((0,), (6,)), ((6,), (4,))]
    kit.apply_routes(plan.routes, sources, destinations)


def test_smaller_boxes_of_overlapping_sources_come_first(kit) -> None:
    # One actor holds all, four a quarter each: cut in quarters, every part has two who may send it.
    shape = (4096, 1024)
    sources = kit.split("w", shape, 1) + kit.split("w", shape, 4)
    destinations = kit.split("w", shape, 1)
    plan = plan_reshard(sources, destinations)
    kit.apply_routes(plan.routes, sources, destinations)
    assert len(plan.routes) >= 5
    assert max(plan.sent_nbytes()) <= 1.01 * min(plan.sent_nbytes())


def test_tensors_that_nobody_wants_are_left_alone(kit) -> None:
    sources = [kit.layout(("w", (0,), (4,), (4,), "float32"), ("rotary", (0,), (9,), (9,), "int32"))]
    assert {route.tensor for route in plan_reshard(sources, kit.split("w", (4,), 1)).routes} == {"w"}


def test_no_destinations_is_an_empty_plan(kit) -> None:
    plan = plan_reshard(kit.split("w", (4,), 2), [])
    assert (plan.routes, plan.nbytes, plan.sources, plan.destinations, plan.pieces) == ((), 0, 2, 0, 2)
    assert plan.digest == routes_digest(())


def test_plans_are_values(kit) -> None:
    sources, destinations = kit.split("w", (12,), 3), kit.split("w", (12,), 2)
    plan = plan_reshard(sources, destinations)
    assert hash(plan) == hash(plan_reshard(sources, destinations))
    assert plan.by_sender()[1] == tuple(route for route in plan.routes if route.sender == 1)
    assert plan.by_receiver()[4] == tuple(route for route in plan.routes if 4 in route.receivers)
    with pytest.raises(FrozenInstanceError):
        plan.routes[0].sender = 7  # type: ignore[misc]


def test_layouts_equal_but_not_identical_are_planned_as_one(kit) -> None:
    sources = kit.split("w", (4,), 2)
    shared = kit.split("w", (4,), 2)
    assert plan_reshard(sources, shared + shared) == plan_reshard(sources, shared + kit.split("w", (4,), 2))


def test_layouts_that_differ_in_one_piece_are_told_apart(kit) -> None:
    def actor(odd: int):
        return kit.layout(*((f"w{n}", (odd if n == 9 else 0,), (1,), (2,), "float32") for n in range(64)))

    sources, destinations = [actor(0), actor(1)], [actor(1), actor(0), actor(1)]
    plan = plan_reshard(sources, destinations)
    kit.apply_routes(plan.routes, sources, destinations)
    assert [(r.sender, r.receivers) for r in plan.routes if r.tensor == "w9"] == [(1, (2, 4)), (0, (3,))]


# What is refused


def refuse(sources: list[Layout], destinations: list[Layout], match: str) -> LayoutError:
    with pytest.raises(LayoutError, match=match) as caught:
        plan_reshard(sources, destinations)

    assert isinstance(caught.value, SyncError)
    return caught.value


def test_a_tensor_without_a_source_is_named(kit) -> None:
    error = refuse(
        kit.split("w", (4,), 2),
        kit.split("w", (4,), 1) + kit.split("bias", (8,), 2),
        r"no source holds 'bias', which actors \(3, 4\) want.*offset \(0,\), extent \(4,\)",
    )
    assert (error.tensor, error.actors) == ("bias", (3, 4))


def test_a_tensor_without_a_source_may_be_allowed(kit) -> None:
    destinations = kit.split("w", (4,), 1) + kit.split("bias", (8,), 2)
    plan = plan_reshard(kit.split("w", (4,), 2), destinations, allow_missing={"bias"})
    assert {route.tensor for route in plan.routes} == {"w"}


def test_elements_without_a_source_are_named_by_their_box(kit) -> None:
    sources = [
        kit.layout(("w", (0, 0), (4, 2), (4, 6), "float32")),
        kit.layout(("w", (0, 4), (4, 2), (4, 6), "float32")),
    ]
    error = refuse(
        sources,
        kit.split("w", (4, 6), 2),
        r"no source holds 'w' at offset \(0, 2\), extent \(2, 2\).*"
        r"actors \(2,\) want: offset \(0, 0\), extent \(2, 6\)",
    )
    assert (error.tensor, error.actors) == ("w", (2,))


def test_gaps_are_found_where_the_sizes_happen_to_add_up(kit) -> None:
    sources = [
        kit.layout(("w", (0,), (3,), (6,), "float32")),
        kit.layout(("w", (1,), (3,), (6,), "float32")),
    ]
    refuse(sources, kit.split("w", (6,), 1), r"offset \(4,\), extent \(2,\)")


def test_allowing_a_tensor_to_be_missing_does_not_allow_half_of_it(kit) -> None:
    sources = [kit.layout(("w", (0,), (3,), (6,), "float32"))]
    with pytest.raises(LayoutError, match="no source holds 'w'"):
        plan_reshard(sources, kit.split("w", (6,), 1), allow_missing=["w"])


@pytest.mark.parametrize("wrong", ["sources", "destinations", "between"])
def test_global_shapes_that_disagree_are_refused(kit, wrong: str) -> None:
    a, b = kit.split("w", (4, 2), 1), kit.split("w", (2, 4), 1)
    sources, destinations = {"sources": (a + b, a), "destinations": (a, a + b), "between": (a, b)}[wrong]
    error = refuse(sources, destinations, r"disagree on the global shape of 'w': \(4, 2\) on .* \(2, 4\) on")
    assert len(error.actors) >= 2


def test_as_many_dims_do_not_make_equal_shapes(kit) -> None:
    refuse(kit.split("w", (8,), 1), kit.split("w", (2, 4), 1), "disagree on the global shape")


@pytest.mark.parametrize(
    ("source", "destination"),
    [("float32", "int32"), ("int64", "bfloat16"), ("bool", "uint8"), ("complex64", "float32")],
)
def test_dtypes_of_different_kinds_are_refused(kit, source: str, destination: str) -> None:
    error = refuse(
        kit.split("w", (4,), 1, dtype=source),
        kit.split("w", (4,), 1, dtype=destination),
        rf"'w' is {source} on \(0,\), which is not cast to {destination} on \(1,\)",
    )
    assert (error.tensor, error.actors) == ("w", (0, 1))


def test_an_unknown_dtype_is_refused(kit) -> None:
    refuse(kit.split("w", (4,), 1, dtype="float3"), kit.split("w", (4,), 1), "unknown dtype 'float3'")


def test_pieces_of_one_destination_that_overlap_partly_are_refused(kit) -> None:
    destinations = [kit.layout(("w", (0,), (3,), (4,), "float32"), ("w", (2,), (2,), (4,), "float32"))]
    error = refuse(kit.split("w", (4,), 1), destinations, r"'w' overlap without being equal on \(1,\)")
    assert (error.tensor, error.actors) == ("w", (1,))


def test_pieces_of_one_destination_that_nest_are_refused(kit) -> None:
    destinations = [kit.layout(("w", (0, 0), (4, 4), (4, 4), "float32"), ("w", (1, 1), (2, 2), (4, 4), "float32"))]
    refuse(kit.split("w", (4, 4), 1), destinations, "overlap without being equal")


@pytest.mark.parametrize(
    ("offset", "extent"), [((3,), (2,)), ((-1,), (2,)), ((0, 0), (4, 1)), ((0,), (4, 1)), ((4,), (-1,)), ((), ())]
)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_piece_outside_its_tensor_is_refused(kit, offset, extent, side: str) -> None:
    good, bad = kit.split("w", (4,), 1), [kit.layout(("w", offset, extent, (4,), "float32"))]
    sources, destinations = (bad, good) if side == "source" else (good, bad)
    error = refuse(sources, destinations, r"does not fit in global shape \(4,\)")
    assert error.actors == ((0,) if side == "source" else (1,))


def test_nothing_is_wanted_of_a_tensor_without_a_source() -> None:
    piece = Piece("bias", Box((2,), (0,)), (4,), "float32")
    assert plan_reshard([], [Layout((piece,))]).routes == ()


def test_a_name_is_not_allowed_to_be_missing_by_being_part_of_another(kit) -> None:
    with pytest.raises(LayoutError, match="no source holds 'head'"):
        plan_reshard([], kit.split("head", (4,), 1), allow_missing=["lm_head"])


@pytest.mark.parametrize("wrong", ["lm_head", 3, None])
def test_what_may_be_missing_is_a_collection_of_names(kit, wrong) -> None:
    with pytest.raises(ConfigError, match=f"allow_missing={wrong!r} must be a collection of names"):
        plan_reshard([], kit.split("head", (4,), 1), allow_missing=wrong)


def test_shards_that_were_not_described_are_refused(kit) -> None:
    with pytest.raises(LayoutError, match=r"the layout of actor 1 is a list, not what describe\(\) returns"):
        plan_reshard(kit.split("w", (4,), 1), [[]])  # type: ignore[list-item]

    with pytest.raises(LayoutError, match="the source layouts are a NoneType, not a layout for each actor"):
        plan_reshard(None, [])  # type: ignore[arg-type]

    with pytest.raises(LayoutError, match="the destination layouts are a Layout, not a layout for each actor"):
        plan_reshard([], kit.split("w", (4,), 1)[0])


def test_what_is_computed_at_a_destination_is_not_written(kit) -> None:
    (whole,) = kit.split("w", (4,), 1)
    computed = replace(whole, computed=("w",))
    with pytest.raises(LayoutError, match="'w' is computed at a destination: it can be read only") as caught:
        plan_reshard([whole], [whole, computed])

    assert (caught.value.tensor, caught.value.actors) == ("w", (2,))
    assert len(plan_reshard([computed], [whole]).routes) == 1
    assert plan_reshard(kit.split("x", (4,), 1), [computed], allow_missing=["w"]).routes == ()


def test_the_collector_is_left_as_it_was(kit) -> None:
    assert gc.isenabled()
    plan_reshard(kit.split("w", (4,), 1), kit.split("w", (4,), 2))
    assert gc.isenabled()
    with pytest.raises(LayoutError):
        plan_reshard([], kit.split("w", (4,), 1))

    assert gc.isenabled()
    gc.disable()
    try:
        build_tasks(plan_reshard(kit.split("w", (4,), 1), kit.split("w", (4,), 2)))
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("source", "destination", "castable"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float8_e4m3fn", False),
        ("float32", "float8_e8m0fnu", False),
        ("float8_e8m0fnu", "float32", False),
        ("float8_e8m0fnu", "float8_e8m0fnu", True),
        ("int64", "uint8", True),
        ("float32", "int32", False),
        ("bool", "bool", True),
        ("bool", "int8", False),
    ],
)
def test_casts_stay_within_a_kind(source: str, destination: str, castable: bool) -> None:
    assert is_castable(source, destination) is castable


# What is worked out once, what is never needed


def test_geometry_is_worked_out_once_for_tensors_placed_alike(kit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def cover(tensor: str, *sides: list[Holding]) -> tuple[Cell, ...]:
        seen.append(tensor)
        return cover_tensor(tensor, *sides)

    monkeypatch.setattr("wavecast.runtime.plan.reshard.cover_tensor", cover)

    def actors(parts: int, copies: int) -> list[Layout]:
        return [
            kit.layout(
                *((f"w{n}", (12 // parts * part,), (12 // parts,), (12,), "float32") for n in range(50)),
                *((f"v{n}", (0,), (3,), (3,), "float32") for n in range(50)),
            )
            for _ in range(copies)
            for part in range(parts)
        ]

    plan = plan_reshard(actors(3, 2), actors(4, 5))
    assert seen == ["w0", "v0"]
    assert len(plan.routes) == 50 * 6 + 50


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = "import sys, wavecast.runtime.plan.tasks; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# What stays the same

SCRIPT = """
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.plan.cover import Cell, cover_tensor
from wavecast.runtime.plan.placement import Holding
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.tasks import build_tasks

def actors(parts, copies=1):
    return [
        Layout(tuple(
            Piece(f"layer.{n}", Box((60 // parts * part, 0), (60 // parts, 7)), (60, 7), "bfloat16") for n in range(9)
        ))
        for _ in range(copies) for part in range(parts)
    ]

plan = plan_reshard(actors(3, 2), actors(4, 3))
print(plan.digest, [(task.senders, task.receivers, task.nbytes) for task in build_tasks(plan, chunk_bytes=500)])
"""


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


def test_the_digest_is_pinned() -> None:
    route = Route(0, (4, 5), "model.norm.weight", (0,), (4096,), "bfloat16", 8192)
    other = Route(1, (4,), "w", (2, 0), (1, 3), "float32", 12)
    assert routes_digest([route, other]) == "0121900ef89065d2a72d7443c7cc482dd248971944978c6962052516ba596d02"
    assert routes_digest([other, route]) != routes_digest([route, other])
