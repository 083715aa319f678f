"""Which way bytes go: from what actors can do to pulls and communicators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from wavecast.runtime.carriers import Ability, Carriers, PullRule, choose_carriers, part_routes
from wavecast.runtime.errors import TransportUnavailable
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Layout, Piece, Place, Shard, describe
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.transfer.messages import Described


def gpu(device: int, node: str = "n0", *, unshared: str = "", kernels: bool = True) -> Ability:
    return Ability(Place(node, f"GPU-{device}"), unshared, kernels)


CPU = Ability(Place("n0", "cpu"))
ONE_NODE = [gpu(0), gpu(1), gpu(2)]
TWO_NODES = [gpu(0), gpu(1), gpu(0, "n1")]
SHARED_GPU = [gpu(0), gpu(1), gpu(1)]
ALL = frozenset(permutations(range(3), 2))
NODES = ("the actors are on several nodes: no GPU's memory can be read from another node",)
NO_TRITON = ("Triton is missing on some actors: tensors are copied one by one",)


@pytest.mark.parametrize(
    ("wanted", "abilities", "chosen"),
    [
        ("auto", ONE_NODE, Carriers("nccl", ALL, True)),
        ("auto", TWO_NODES, Carriers("nccl", frozenset({(0, 1), (1, 0)}), True, NODES)),
        ("auto", SHARED_GPU, Carriers("ipc", ALL, True)),
        ("auto", [CPU, CPU], Carriers("gloo")),
        ("auto", [gpu(0), CPU], Carriers("gloo", reasons=("some shards are in host memory",))),
        ("auto", [gpu(0), gpu(1, kernels=False)], Carriers("nccl", reasons=NO_TRITON)),
        (
            "auto",
            [gpu(0), gpu(1, unshared="it is expandable"), gpu(2)],
            Carriers(
                "nccl",
                frozenset({(0, 1), (0, 2), (2, 0), (2, 1)}),
                True,
                ("the memory of actor 1 cannot be shared: it is expandable",),
            ),
        ),
        (
            "auto",
            [gpu(0), gpu(0, "n1"), gpu(0)],
            Carriers(
                "nccl",
                frozenset({(0, 2), (2, 0)}),
                True,
                (*NODES, "actors 0 and 2 share a GPU: NCCL serves 2 through 0"),
                owners=(0, 1, 0),
            ),
        ),
        (
            "auto",
            [gpu(0), gpu(0, unshared="no"), gpu(0, "n1"), gpu(0, "n1")],
            Carriers(
                "gloo",
                reasons=(
                    "the memory of actor 1 cannot be shared: no",
                    *NODES,
                    "actors 0 and 1 share a GPU, which NCCL refuses",
                ),
            ),
        ),
        (
            "auto",
            [gpu(0), gpu(0, unshared="no")],
            Carriers(
                "gloo",
                reasons=(
                    "the memory of actor 1 cannot be shared: no",
                    "actors 0 and 1 share a GPU, which NCCL refuses",
                ),
            ),
        ),
        (
            "auto",
            [gpu(0), gpu(0, kernels=False)],
            Carriers("gloo", reasons=(*NO_TRITON, "actors 0 and 1 share a GPU, which NCCL refuses")),
        ),
        ("gloo", ONE_NODE, Carriers("gloo")),
        ("gloo", [CPU, gpu(0)], Carriers("gloo")),
        ("nccl", ONE_NODE, Carriers("nccl", kernels=True, unused=ALL)),
        ("nccl", TWO_NODES, Carriers("nccl", kernels=True, unused=frozenset({(0, 1), (1, 0)}))),
        ("nccl", [gpu(0), gpu(1, kernels=False)], Carriers("nccl", reasons=NO_TRITON)),
        ("ipc", ONE_NODE, Carriers("ipc", ALL, True)),
        ("ipc", SHARED_GPU, Carriers("ipc", ALL, True)),
    ],
)
def test_the_ways_follow_places_and_abilities(wanted: str, abilities: Sequence[Ability], chosen: Carriers) -> None:
    assert choose_carriers(wanted, abilities) == chosen


@pytest.mark.parametrize(
    ("wanted", "abilities", "message", "actors"),
    [
        ("nccl", [gpu(0), CPU, gpu(1), CPU], "shards are in host memory", (1, 3)),
        ("nccl", [gpu(0), gpu(1), gpu(0, "n1"), gpu(1)], "these share one", (1, 3)),
        ("ipc", [gpu(0), CPU], "these actors' shards are on the host", (1,)),
        ("ipc", TWO_NODES, "the actors are on several nodes", ()),
        ("ipc", [gpu(0), gpu(1, kernels=False)], "Triton is missing", ()),
        ("ipc", [gpu(0), gpu(1, unshared="it is expandable")], "the memory of actor 1 cannot be shared: it is", ()),
    ],
)
def test_what_was_asked_for_by_name_and_cannot_be_is_refused(
    wanted: str, abilities: Sequence[Ability], message: str, actors: tuple[int, ...]
) -> None:
    with pytest.raises(TransportUnavailable, match=message) as caught:
        choose_carriers(wanted, abilities)

    assert caught.value.actors == actors


def test_a_refused_pair_is_served_another_way_and_said() -> None:
    reason = "actor 2 cannot read the memory of actor 0"
    chosen = choose_carriers("auto", ONE_NODE, refused=[(0, 2)])
    assert chosen == Carriers("nccl", ALL - {(0, 2)}, True, (reason,))
    # NCCL cannot help two that share a GPU.
    chosen = choose_carriers("nccl", ONE_NODE, refused=[(0, 2)])
    assert chosen == Carriers("nccl", kernels=True, reasons=(reason,), unused=ALL - {(0, 2)})
    chosen = choose_carriers("auto", SHARED_GPU, refused=[(0, 2)])
    through = "actors 1 and 2 share a GPU: NCCL serves 2 through 1"
    assert chosen == Carriers("nccl", ALL - {(0, 2)}, True, (reason, through), owners=(0, 1, 1))
    reason = "actor 2 cannot read the memory of actor 1"
    chosen = choose_carriers("auto", SHARED_GPU, refused=[(1, 2)], sending=[0])
    through = "actors 1 and 2 share a GPU: NCCL serves 1 through 2"
    assert chosen == Carriers("nccl", ALL - {(1, 2)}, True, (reason, through), owners=(0, 2, 2))
    chosen = choose_carriers("auto", SHARED_GPU, refused=[(1, 2)])
    assert chosen.moved == "gloo"
    assert chosen.reasons[-1] == "actors 1 and 2 share a GPU, which NCCL refuses"
    reason = "actor 2 cannot read the memory of actor 0"
    with pytest.raises(TransportUnavailable, match=reason):
        choose_carriers("ipc", ONE_NODE, refused=[(0, 2)])


def test_who_shares_a_gpu_must_be_able_to_read_its_owner_and_to_lend_it_what_it_sends() -> None:
    # Engines that sleep have memory that nobody can map; what is pulled into it is read from others.
    asleep = [gpu(0), gpu(0, "n1"), gpu(0, unshared="it sleeps"), gpu(0, "n1", unshared="it sleeps")]
    chosen = choose_carriers("auto", asleep, sending=range(2))
    assert chosen.moved == "nccl"
    assert chosen.owners == (0, 1, 0, 1)
    assert chosen.pulls == {(0, 2), (1, 3)}
    assert choose_carriers("auto", asleep, sending=range(4)).moved == "gloo"
    # An engine owns the port where a trainer's memory cannot be read, unless that trainer has something to send.
    strange = [gpu(0, unshared="it expands"), gpu(0, "n1"), gpu(0)]
    assert choose_carriers("auto", strange, sending=[1]).owners == (2, 1, 2)
    assert choose_carriers("auto", strange, sending=[0, 1]).moved == "gloo"


def test_whoever_may_send_on_a_shared_gpu_is_read_by_all_there() -> None:
    three = [gpu(0), gpu(0), gpu(0), gpu(0, "n1")]
    assert choose_carriers("auto", three, sending=[0, 1]).owners == (0, 0, 0, 3)
    # What actor 1 has for actor 2 would go from the one to the other.
    assert choose_carriers("auto", three, sending=[0, 1], refused=[(1, 2)]).moved == "gloo"
    assert choose_carriers("auto", three, sending=[0], refused=[(1, 2)]).owners == (0, 0, 0, 3)
    # On a single GPU there is no port to own.
    assert choose_carriers("auto", three[:3], refused=[(1, 2)]).moved == "gloo"
    assert choose_carriers("auto", three[:3], sending=[0], refused=[(1, 2)]).moved == "gloo"


# Which routes are pulled.


def rows(tensor: str, size: int, parts: int, part: int, dtype: str = "float32") -> Piece:
    """The part of a matrix of ``size`` rows of 4 elements that one of ``parts`` holds."""
    low, high = size * part // parts, size * (part + 1) // parts
    return Piece(tensor, Box((low, 0), (high - low, 4)), (size, 4), dtype)


def side(parts: int, *tensors: str, size: int = 12) -> list[Layout]:
    return [Layout(tuple(rows(tensor, size, parts, part) for tensor in tensors)) for part in range(parts)]


def everywhere(actors: int, moved: str = "nccl") -> Carriers:
    return Carriers(moved, frozenset(permutations(range(actors), 2)), True)


def a_route(sender: int, *receivers: int, tensor: str = "w", dtype: str = "float32") -> Route:
    return Route(sender, receivers, tensor, (0, 0), (2, 4), dtype, 32)


def test_a_route_of_one_neighbour_that_takes_the_bytes_as_they_are_is_pulled() -> None:
    layouts = [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    rule = PullRule(layouts, Carriers("nccl", frozenset({(0, 1)}), True))
    assert rule(a_route(0, 1))
    assert not rule(a_route(0, 2))
    assert not rule(a_route(1, 0))
    assert not rule(a_route(0, 1, 2))
    assert not rule(a_route(0, 1, dtype="bfloat16"))
    assert not rule(a_route(0, 1, tensor="unknown"))
    assert not PullRule(layouts, Carriers("nccl", kernels=True))(a_route(0, 1))


def test_it_is_said_what_is_not_pulled_where_the_memory_could_be_read() -> None:
    layouts = [*side(1, "w", "v", "u"), *side(1, "w", "v", "u"), *side(1, "w")]
    rule = PullRule(layouts, Carriers("nccl", frozenset({(0, 1), (0, 2), (2, 1)}), True))
    routes = [
        a_route(0, 1),
        a_route(0, 1, dtype="bfloat16"),
        a_route(0, 1, tensor="v", dtype="bfloat16"),
        a_route(0, 1, 2, tensor="u"),
        # Not to be read in any case.
        a_route(1, 2, tensor="u", dtype="bfloat16"),
        a_route(1, 0, 2),
    ]
    several = "tensors that go to several receivers at once: 1"
    altered = "tensors that are cast or worked out as they are sent: 2"
    assert rule.reasons(routes) == (several, altered)
    assert rule.reasons(routes[:1]) == ()
    assert rule.reasons(routes[1:2]) == ("tensors that are cast or worked out as they are sent: 1",)
    assert PullRule(layouts, Carriers("gloo")).reasons(routes) == ()


def test_what_is_computed_or_held_in_two_dtypes_is_not_pulled() -> None:
    pieces = (rows("w", 12, 2, 0), rows("w", 12, 2, 1), rows("v", 12, 1, 0), rows("u", 12, 1, 0))
    layout = Layout((*pieces, rows("v", 12, 1, 0, "bfloat16")), computed=("u",))
    rule = PullRule([layout, layout], everywhere(2))
    assert rule(a_route(0, 1, tensor="w"))
    for dtype in ("float32", "bfloat16"):
        assert not rule(a_route(0, 1, tensor="v", dtype=dtype))
        assert not rule(a_route(0, 1, tensor="u", dtype=dtype))


def test_a_layout_says_what_is_computed_also_over_the_wire() -> None:
    def shard(name: str, *, computed: bool, first: int = 0) -> Shard:
        view = torch.zeros(2, 4)
        stand_in = Computed((2, 4), torch.float32, view.device, lambda box: view)
        return Shard(name, stand_in if computed else view, (first, 0), (4, 4))

    shards = [
        shard("a", computed=False),
        shard("b", computed=True),
        # One of its shards is enough.
        shard("c", computed=False),
        shard("c", computed=True, first=2),
        shard("b", computed=True, first=2),
    ]
    layout = describe(shards)
    assert layout.computed == ("b", "c")
    assert Described.of(layout).layout() == layout
    many = Layout(tuple(rows(f"w{number}", 12, 1, 0) for number in range(3000)), frozen=("w1",), computed=("w2",))
    assert len(Described.of(many).parts) == 3
    assert Described.of(many).layout() == many


# Routes of several receivers made single ones.


def loads(plan: ReshardPlan) -> Counter[int]:
    """Bytes through each actor's port, a route counted once at its sender."""
    found = Counter[int]()
    for route in plan.routes:
        found[route.sender] += route.nbytes
        for receiver in route.receivers:
            found[receiver] += route.nbytes

    return found


def delivered(plan: ReshardPlan) -> list[tuple[int, str, tuple[int, ...], tuple[int, ...], str]]:
    return sorted(
        (receiver, route.tensor, route.offset, route.extent, route.dtype)
        for route in plan.routes
        for receiver in route.receivers
    )


def test_a_plan_without_several_receivers_or_without_pulls_is_left_alone() -> None:
    layouts = [*side(3, "w"), *side(2, "w")]
    plan = plan_reshard(layouts[:3], layouts[3:])
    assert part_routes(plan, layouts, everywhere(5)) is plan
    layouts = [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    plan = plan_reshard(layouts[:1], layouts[1:])
    assert [route.receivers for route in plan.routes] == [(1, 2)]
    assert part_routes(plan, layouts, Carriers("nccl", kernels=True)) is plan


def test_a_broadcast_out_of_the_busiest_port_stays_whole_over_nccl_and_is_parted_without() -> None:
    layouts = [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    plan = plan_reshard(layouts[:1], layouts[1:])
    assert part_routes(plan, layouts, everywhere(3)) is plan
    parted = part_routes(plan, layouts, everywhere(3, "ipc"))
    assert [(route.sender, route.receivers) for route in parted.routes] == [(0, (1,)), (0, (2,))]
    assert delivered(parted) == delivered(plan)


def test_broadcasts_are_parted_where_the_receivers_ports_are_busiest_anyway() -> None:
    """Two halves to two whole replicas: each sender sends 96 bytes twice, each receiver takes 192 anyway."""
    layouts = [*side(2, "w"), *side(1, "w"), *side(1, "w")]
    plan = plan_reshard(layouts[:2], layouts[2:])
    assert [(route.sender, route.receivers, route.nbytes) for route in plan.routes] == [
        (0, (2, 3), 96),
        (1, (2, 3), 96),
    ]
    parted = part_routes(plan, layouts, everywhere(4))
    assert [(route.sender, route.receivers) for route in parted.routes] == [
        (0, (2,)),
        (0, (3,)),
        (1, (2,)),
        (1, (3,)),
    ]
    assert max(loads(parted).values()) == max(loads(plan).values()) == 192
    # One of them could not be pulled: then all stay as they are.
    one_less = Carriers("nccl", everywhere(4).pulls - {(1, 3)}, True)
    assert part_routes(plan, layouts, one_less) is plan


def test_who_shares_the_senders_gpu_pulls_and_only_the_others_are_broadcast_to() -> None:
    """Two nodes of a GPU: a whole trainer on the first, and on each two engines that want all of it."""
    layouts = [*side(1, "w")] * 6
    plan = plan_reshard(layouts[:1], layouts[1:])
    (route,) = plan.routes
    assert route.receivers == (1, 2, 3, 4, 5)
    owners, near = (0, 0, 0, 3, 3, 3), [(0, 1), (0, 2), (3, 4), (3, 5)]
    carriers = Carriers("nccl", frozenset((*near, *((b, a) for a, b in near))), True, owners=owners)
    parted = part_routes(plan, layouts, carriers)
    assert [found.receivers for found in parted.routes] == [(1,), (2,), (3, 4, 5)]
    assert delivered(parted) == delivered(plan)
    assert parted.digest != plan.digest
    # What cannot be pulled as it is stays with the others.
    cast = [Layout((rows("w", 12, 1, 0, "bfloat16"),)), *layouts[1:]]
    plan = plan_reshard(cast[:1], cast[1:])
    assert [found.receivers for found in part_routes(plan, cast, carriers).routes] == [(1, 2, 3, 4, 5)]
    # All on one GPU: nothing is left to broadcast.
    alone = replace(carriers, pulls=frozenset(permutations(range(3), 2)), owners=(0, 0, 0))
    plan = plan_reshard(layouts[:1], layouts[1:3])
    assert [found.receivers for found in part_routes(plan, layouts[:3], alone).routes] == [(1,), (2,)]


@pytest.mark.parametrize(("sources", "destinations"), [(3, 2), (4, 3), (6, 4), (2, 3), (5, 4)])
@pytest.mark.parametrize("moved", ["nccl", "ipc"])
def test_parting_keeps_coverage_and_never_loads_a_sender_beyond_the_busiest(
    sources: int, destinations: int, moved: str
) -> None:
    """Shared and whole tensors: norms are on all, so their routes may go to whichever sender serves a receiver."""
    for whole in (0, 1, 7):
        norms = tuple(Piece(f"norm{n}", Box((0, 0), (3, 4)), (3, 4), "float32") for n in range(whole))
        layouts = [
            replace(layout, pieces=layout.pieces + norms)
            for layout in (*side(sources, "w", "v"), *side(destinations, "w", "v"))
        ]
        plan = plan_reshard(layouts[:sources], layouts[sources:])
        carriers = everywhere(sources + destinations, moved)
        parted = part_routes(plan, layouts, carriers)
        assert delivered(parted) == delivered(plan)
        assert parted.nbytes == plan.nbytes
        if parted is plan:
            assert moved == "nccl" or all(len(route.receivers) == 1 for route in plan.routes)
            continue

        assert all(len(route.receivers) == 1 for route in parted.routes)
        for route in parted.routes:
            held = layouts[route.sender].pieces
            assert any(piece.tensor == route.tensor and piece.box.contains(route.box) for piece in held)

        split = [replace(route, receivers=(receiver,)) for route in plan.routes for receiver in route.receivers]
        before = Counter[int]()
        for route in split:
            before[route.sender] += route.nbytes

        assert max(parted.sent_nbytes()) <= max(before.values())


def test_a_parted_route_goes_to_the_sender_that_brings_its_receiver_most() -> None:
    """Weights in halves to halves; the small tensor of all is the first sender's, until it is parted."""
    small = Piece("s", Box((0, 0), (1, 4)), (1, 4), "float32")
    layouts = [replace(layout, pieces=(*layout.pieces, small)) for layout in (*side(2, "w"), *side(2, "w"))]
    plan = plan_reshard(layouts[:2], layouts[2:])
    (shared,) = [route for route in plan.routes if len(route.receivers) == 2]
    assert (shared.tensor, shared.receivers) == ("s", (2, 3))
    parted = part_routes(plan, layouts, everywhere(4, "ipc"))
    assert sorted((route.tensor, route.sender, route.receivers) for route in parted.routes) == [
        ("s", 0, (2,)),
        ("s", 1, (3,)),
        ("w", 0, (2,)),
        ("w", 1, (3,)),
    ]
    assert parted.sent_nbytes() == (112, 112)


def test_a_parted_route_stays_where_the_other_sender_does_not_hold_it() -> None:
    small = Piece("s", Box((0, 0), (1, 4)), (1, 4), "float32")
    sources, destinations = side(2, "w"), side(2, "w")
    sources[0] = replace(sources[0], pieces=(*sources[0].pieces, small))
    destinations = [replace(layout, pieces=(*layout.pieces, small)) for layout in destinations]
    layouts = [*sources, *destinations]
    parted = part_routes(plan_reshard(sources, destinations), layouts, everywhere(4, "ipc"))
    assert [(route.sender, route.receivers) for route in parted.routes if route.tensor == "s"] == [(0, (2,)), (0, (3,))]


def test_a_parted_route_is_moved_to_no_sender_that_cannot_be_pulled_from() -> None:
    """Source 0 is on another node and brings receiver 2 most; the small tensor came from source 1, a neighbour."""
    small = Piece("s", Box((0, 0), (1, 4)), (1, 4), "float32")
    far = Layout((rows("w", 12, 1, 0), small))
    near = Layout((rows("v", 12, 1, 0), small))
    layouts = [far, near, Layout((rows("w", 12, 1, 0), small)), Layout((rows("v", 12, 1, 0), small))]
    routes = (
        Route(0, (2,), "w", (0, 0), (12, 4), "float32", 192),
        Route(1, (3,), "v", (0, 0), (12, 4), "float32", 192),
        Route(1, (2, 3), "s", (0, 0), (1, 4), "float32", 16),
    )
    plan = ReshardPlan(routes, 2, 2, 416, 8, "digest")
    carriers = Carriers("nccl", frozenset({(1, 2), (1, 3)}), True)
    parted = part_routes(plan, layouts, carriers)
    rule = PullRule(layouts, carriers)
    assert [rule(route) for route in parted.routes if route.tensor == "s"] == [True, True]
