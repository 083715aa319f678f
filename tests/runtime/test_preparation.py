"""What is decided before a byte moves: names, transport, programs and what connects the actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from wavecast.runtime.carriers import Carriers
from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.selection import select_names


def rows(tensor: str, size: int, parts: int, part: int) -> Piece:
    """The part of a matrix of ``size`` rows of 64 float32 that one of ``parts`` holds."""
    low, high = size * part // parts, size * (part + 1) // parts
    return Piece(tensor, Box((low, 0), (high - low, 64)), (size, 64), "float32")


def side(parts: int, *tensors: str) -> list[Layout]:
    return [Layout(tuple(rows(tensor, 12, parts, part) for tensor in tensors)) for part in range(parts)]


def made(
    sources: Sequence[Layout],
    destinations: Sequence[Layout],
    *,
    names: frozenset[str] | None = None,
    options: SyncOptions | None = None,
    carriers: Carriers | None = None,
) -> Preparation:
    ways = carriers or Carriers("gloo")
    return prepare(sources, destinations, options or SyncOptions(chunk_bytes=512), names, ways)


def test_three_sources_to_two_destinations() -> None:
    """Twelve rows of 256 bytes: source 1 serves both, so there are four edges; a chunk is two rows."""
    ready = made(side(3, "w"), side(2, "w"))
    assert ready.plan.nbytes == 12 * 256
    assert sorted(ready.edges) == [(0, 3), (1, 3), (1, 4), (2, 4)]
    assert ready.groups == ()
    assert [len(program.steps) for program in ready.programs] == [2, 2, 2, 3, 3]
    assert {program.digest for program in ready.programs} == {ready.digest}
    assert [packed.unpack() for packed in ready.packed] == list(ready.programs)


def test_replicas_are_reached_by_one_broadcast_among_sorted_members() -> None:
    ready = made(side(2, "w"), [*side(1, "w"), *side(1, "w"), *side(1, "w")])
    assert sorted(ready.groups) == [(0, 2, 3, 4), (1, 2, 3, 4)]
    assert ready.edges == ()


def test_edges_and_groups_come_in_the_order_of_the_schedule_each_once() -> None:
    ready = made(side(3, "w"), side(2, "w"), options=SyncOptions(chunk_bytes=256))
    in_order = [(task.senders[0], task.receivers[0]) for wave in ready.schedule.waves for task in wave.tasks]
    assert len(in_order) == 12
    assert ready.edges == tuple(dict.fromkeys(in_order))


def test_each_members_step_of_a_task_is_where_its_program_has_it() -> None:
    ready = made(side(3, "w", "v"), side(2, "w", "v"))
    for wave in ready.schedule.waves:
        for task in wave.tasks:
            for member in task.members:
                assert ready.programs[member].steps[ready.step_of[member][task.id]].task == task.id

    assert [len(steps) for steps in ready.step_of] == [len(program.steps) for program in ready.programs]


def test_the_digest_follows_the_plan_the_bucket_and_the_checksum() -> None:
    sources, destinations = side(3, "w"), side(2, "w")
    first = made(sources, destinations)
    assert made(sources, destinations).digest == first.digest
    others = [
        made(side(2, "w"), destinations),
        made(sources, destinations, options=SyncOptions(chunk_bytes=1024)),
        made(sources, destinations, options=SyncOptions(chunk_bytes=512, budget_bytes=1 << 20)),
        made(sources, destinations, options=SyncOptions(chunk_bytes=512, checksum=False)),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 5


def test_only_the_names_selected_are_planned() -> None:
    ready = made(side(2, "w", "v"), side(1, "w", "v"), names=frozenset({"v"}))
    assert {route.tensor for route in ready.plan.routes} == {"v"}
    assert ready.plan.nbytes == 12 * 256


def test_what_is_not_selected_may_be_missing() -> None:
    made(side(2, "w"), side(1, "w", "v"), names=frozenset({"w"}))
    with pytest.raises(LayoutError) as caught:
        made(side(2, "w"), side(1, "w", "v"))

    assert caught.value.tensor == "v"


def test_what_is_allowed_to_be_missing_is_left_out() -> None:
    ready = made(side(2, "w"), side(1, "w", "v"), options=SyncOptions(allow_missing=["v"]))
    assert {route.tensor for route in ready.plan.routes} == {"w"}


def test_nothing_to_move_makes_empty_programs() -> None:
    ready = made(side(1, "v"), side(1, "w"), options=SyncOptions(allow_missing=["w"]))
    assert [program.steps for program in ready.programs] == [(), ()]
    assert ready.edges == ready.groups == ()


def test_names_are_selected_by_set_list_or_predicate() -> None:
    destinations = side(2, "a.weight", "b.weight", "b.bias")
    assert select_names([], destinations, None) is None
    assert select_names([], destinations, {"a.weight"}) == frozenset({"a.weight"})
    assert select_names([], destinations, ["b.bias", "a.weight", "b.bias"]) == frozenset({"a.weight", "b.bias"})
    assert select_names([], destinations, lambda name: name.startswith("b.")) == frozenset({"b.weight", "b.bias"})


def test_a_selection_that_cannot_be_meant_is_refused() -> None:
    destinations = side(1, "a", "b")
    with pytest.raises(LayoutError, match="only= names 'c', which no destination holds") as caught:
        select_names([], destinations, ["d", "a", "c"])

    assert caught.value.tensor == "c"
    with pytest.raises(LayoutError, match="picks no tensor"):
        select_names([], destinations, [])

    with pytest.raises(LayoutError, match="picks no tensor"):
        select_names([], destinations, lambda name: False)

    # One name is no collection of names: it would be taken for its letters.
    with pytest.raises(ConfigError, match=r"only= is the string 'ab'"):
        select_names([], destinations, "ab")


def test_a_predicate_is_asked_once_a_name_in_the_order_held() -> None:
    asked: list[str] = []

    def predicate(name: str) -> bool:
        asked.append(name)
        return True

    select_names([], side(3, "z", "a"), predicate)
    assert asked == ["z", "a"]


def test_trainable_are_the_names_that_some_source_holds_and_none_has_frozen() -> None:
    """ "b" is frozen on one of its holders, "c" on all, "d" no source holds, "e" no destination."""
    sources = [
        Layout(tuple(rows(name, 12, 2, part) for name in ("a", "b", "c", "e")), frozen=frozen)
        for part, frozen in enumerate([("c",), ("b", "c")])
    ]
    destinations = side(1, "a", "b", "c", "d")
    assert select_names(sources, destinations, "trainable") == frozenset({"a"})
    ready = made(sources, destinations, names=select_names(sources, destinations, "trainable"))
    assert {route.tensor for route in ready.plan.routes} == {"a"}


def test_everything_is_trainable_where_nobody_says_otherwise_and_all_frozen_picks_nothing() -> None:
    sources, destinations = side(2, "a", "b"), side(3, "a", "b")
    assert select_names(sources, destinations, "trainable") == frozenset({"a", "b"})
    frozen = [Layout(layout.pieces, frozen=("a", "b")) for layout in sources]
    with pytest.raises(LayoutError, match="picks no tensor"):
        select_names(frozen, destinations, "trainable")


# Pulls.


def pulling(*pairs: tuple[int, int], kernels: bool = True) -> Carriers:
    return Carriers("nccl", frozenset(pairs), kernels)


EVERY_PAIR = pulling(*((sender, receiver) for sender in range(3) for receiver in (3, 4)))


def test_what_is_pulled_needs_no_edge_and_what_is_not_needs_one() -> None:
    """Four rows from each of three sources; source 1 serves both destinations, destination 4 cannot map it."""
    ready = made(side(3, "w"), side(2, "w"), carriers=EVERY_PAIR)
    assert sorted(ready.pulls) == [(0, 3), (1, 3), (1, 4), (2, 4)]
    assert (ready.edges, ready.groups) == ((), ())
    assert ready.pulled_nbytes == ready.plan.nbytes == 12 * 256
    assert all(step.pull for program in ready.programs for step in program.steps)
    assert all(program.kernels for program in ready.programs)

    ready = made(side(3, "w"), side(2, "w"), carriers=pulling((0, 3), (1, 3), (2, 4)))
    assert sorted(ready.pulls) == [(0, 3), (1, 3), (2, 4)]
    assert ready.edges == ((1, 4),)
    assert ready.pulled_nbytes == 10 * 256
    assert [step.pull for step in ready.programs[4].steps if step.sender == 1] == [False]


def test_without_carriers_for_it_nothing_is_pulled() -> None:
    ready = made(side(3, "w"), side(2, "w"))
    assert (ready.pulls, ready.pulled_nbytes) == ((), 0)
    assert not any(step.pull for program in ready.programs for step in program.steps)
    assert not any(program.kernels for program in ready.programs)


def test_what_needs_a_cast_or_is_computed_goes_in_tasks_of_its_own_that_are_not_pulled() -> None:
    sources = [replace(layout, computed=("u",)) for layout in side(1, "w", "v", "u")]
    (wanted,) = side(1, "w", "v", "u")
    pieces = tuple(replace(piece, dtype="bfloat16") if piece.tensor == "v" else piece for piece in wanted.pieces)
    ready = made(sources, [Layout(pieces)], options=SyncOptions(chunk_bytes=1 << 20), carriers=pulling((0, 1)))
    steps = ready.programs[1].steps
    assert sorted((step.pull, *sorted({cut.tensor for cut in step.cuts})) for step in steps) == [
        (False, "u", "v"),
        (True, "w"),
    ]
    assert ready.pulled_nbytes == 12 * 256
    assert ready.edges == ready.pulls == ((0, 1),)


def test_the_digest_follows_the_ways_the_bytes_go() -> None:
    sources, destinations = side(3, "w"), side(2, "w")
    ways = [Carriers("gloo"), Carriers("nccl"), Carriers("nccl", kernels=True), EVERY_PAIR]
    assert len({made(sources, destinations, carriers=way).digest for way in ways}) == 4


def test_the_digest_tells_which_steps_are_pulled() -> None:
    """After a refused mapping the plan is the same but for one pair: actors must be given other programs."""
    sources, destinations = side(3, "w"), side(2, "w")
    first = made(sources, destinations, carriers=EVERY_PAIR)
    refused = made(sources, destinations, carriers=replace(EVERY_PAIR, pulls=EVERY_PAIR.pulls - {(1, 4)}))
    assert first.programs[4].steps != refused.programs[4].steps
    assert first.digest != refused.digest


def test_the_digest_tells_when_a_tensor_is_worked_out_from_now_on() -> None:
    sources, destinations = side(2, "w"), side(2, "w")
    pairs = pulling((0, 2), (1, 3))
    first = made(sources, destinations, carriers=pairs)
    worked = [replace(layout, computed=("w",) if actor else ()) for actor, layout in enumerate(sources)]
    second = made(worked, destinations, carriers=pairs)
    assert [program.steps for program in first.programs] != [program.steps for program in second.programs]
    assert first.digest != second.digest
