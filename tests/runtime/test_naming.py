"""Name maps and aliases: what the planner sees of actors whose tensors have names of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from wavecast.runtime.carriers import Carriers
from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Shard, describe
from wavecast.runtime.layout.sharing import Sharing
from wavecast.runtime.layout.views import NameMap
from wavecast.runtime.naming import name_layouts
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.selection import select_names
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.program import Program

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = ((EMBED, HEAD),)


def held(*names: str, frozen: tuple[str, ...] = (), rows: int = 4) -> Layout:
    """Matrices of ``rows`` rows of two float32, each held whole."""
    return Layout(tuple(Piece(name, Box((0, 0), (rows, 2)), (rows, 2), "float32") for name in names), frozen=frozen)


def names_of(layout: Layout) -> list[str]:
    return [piece.tensor for piece in layout.pieces]


def test_without_maps_and_aliases_layouts_stay_the_objects_they_are() -> None:
    source, destination = held("a"), held("a", "b")
    naming = name_layouts([source], [destination])
    assert naming.sources[0] is source
    assert naming.destinations[0] is destination
    assert naming.renames == ((), ())
    assert naming.aliases == {}


@pytest.mark.parametrize(
    "names",
    [{"engine.a": "a", "engine.b": "b"}, lambda own: own.removeprefix("engine.")],
    ids=["mapping", "function"],
)
def test_a_map_gives_logical_names_and_the_program_what_it_changed(names: NameMap) -> None:
    naming = name_layouts([held("a", "b")], [held("engine.a", "engine.b", "c")], destination_names=names)
    assert names_of(naming.destinations[0]) == ["a", "b", "c"]
    assert naming.renames == ((), (("engine.a", ("a",)), ("engine.b", ("b",))))


def test_each_side_has_a_map_of_its_own() -> None:
    naming = name_layouts([held("x")], [held("x")], source_names={"x": "of the source"}, destination_names={"x": "y"})
    assert (names_of(naming.sources[0]), names_of(naming.destinations[0])) == (["of the source"], ["y"])
    assert naming.renames == ((("x", ("of the source",)),), (("x", ("y",)),))


def test_none_leaves_a_tensor_out_and_several_names_let_a_source_stand_for_each() -> None:
    naming = name_layouts([held(EMBED, "rope")], [held("x")], source_names={EMBED: (EMBED, HEAD), "rope": None})
    assert names_of(naming.sources[0]) == [EMBED, HEAD]
    assert naming.renames[0] == ((EMBED, (EMBED, HEAD)), ("rope", ()))


def test_a_destinations_tensor_cannot_be_two() -> None:
    with pytest.raises(LayoutError, match=r"makes a destination's 'x' both 'a' and 'b'") as caught:
        name_layouts([held("a", "b")], [held("x")], destination_names={"x": ("a", "b")})

    assert caught.value.tensor == "x"


def test_a_map_that_gives_no_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gives \(1, 2\) for 'a'"):
        name_layouts([held("a")], [held("a")], source_names=lambda own: (1, 2))  # type: ignore[return-value, arg-type]


def test_equal_layouts_are_renamed_once_and_stay_one_object() -> None:
    asked: list[str] = []

    def names(own: str) -> str:
        asked.append(own)
        return own.upper()

    replica = held("a", "b")
    naming = name_layouts([held("A", "B")], [replica, replica, replica], destination_names=names)
    assert asked == ["a", "b"]
    assert len({id(layout.pieces) for layout in naming.destinations}) == 1


def test_what_is_frozen_is_renamed_and_trained_where_any_of_its_memory_is() -> None:
    layout = replace(held("a", "b", "c", frozen=("a", "b")), sharing=Sharing(same=((1, 2),)))
    naming = name_layouts([layout], [held("x")], source_names={"a": "x", "b": "y", "c": "y"})
    assert naming.sources[0].frozen == ("x",)


def test_what_is_computed_is_renamed_too() -> None:
    source = replace(held("a", "b", "c"), computed=("a", "c"))
    naming = name_layouts([source], [held("x")], source_names={"a": ("x", "y"), "c": None})
    assert naming.sources[0].computed == ("x", "y")


def test_a_head_held_apart_is_read_from_the_embedding_of_a_tied_source() -> None:
    naming = name_layouts([held(EMBED)], [held(EMBED), held(HEAD)], aliases=TIED)
    assert [names_of(layout) for layout in naming.destinations] == [[EMBED], [EMBED]]
    assert naming.renames == ((), (), ((HEAD, (EMBED,)),))
    assert naming.aliases == {HEAD: EMBED}


def test_the_alias_that_sources_hold_is_taken_whichever_it_is() -> None:
    naming = name_layouts([held(HEAD)], [held(EMBED, HEAD)], aliases=TIED)
    assert names_of(naming.destinations[0]) == [HEAD, HEAD]


def test_aliases_apply_to_names_after_the_maps() -> None:
    naming = name_layouts([held("wte")], [held("out")], source_names={"wte": EMBED}, destination_names={"out": HEAD},
                          aliases=TIED)  # fmt: skip
    assert naming.renames == ((("wte", (EMBED,)),), (("out", (EMBED,)),))


def test_what_is_untied_on_both_sides_stays_apart() -> None:
    naming = name_layouts([held(EMBED), held(HEAD)], [held(EMBED, HEAD)], aliases=TIED)
    assert names_of(naming.destinations[0]) == [EMBED, HEAD]
    assert naming.aliases == {}


def test_aliases_that_no_source_holds_are_left_to_the_planner() -> None:
    naming = name_layouts([held("a")], [held("a", HEAD)], aliases=TIED)
    assert names_of(naming.destinations[0]) == ["a", HEAD]


def test_a_tied_destination_is_not_fed_by_an_untied_source() -> None:
    with pytest.raises(LayoutError, match=rf"sources hold '{EMBED}' and '{HEAD}' apart, destinations hold") as caught:
        name_layouts([held(EMBED, HEAD)], [held(EMBED)], aliases=TIED)

    assert caught.value.tensor == EMBED
    naming = name_layouts([held(EMBED, HEAD)], [held(EMBED)], source_names={HEAD: None}, aliases=TIED)
    assert names_of(naming.sources[0]) == [EMBED]


def test_which_of_several_untied_aliases_is_meant_is_not_guessed() -> None:
    with pytest.raises(LayoutError, match=r"sources hold 'a' and 'b' apart, destinations hold 'c'"):
        name_layouts([held("a", "b")], [held("c")], aliases=[("a", "b", "c")])


def test_to_pick_an_alias_is_to_pick_the_tensor_it_is_read_from() -> None:
    naming = name_layouts([held(EMBED, "a")], [held(EMBED, HEAD, "a")], aliases=TIED)
    sides = (naming.sources, naming.destinations)
    assert select_names(*sides, {HEAD}, aliases=naming.aliases) == frozenset({EMBED})
    assert select_names(*sides, {EMBED}, aliases=naming.aliases) == frozenset({EMBED})
    assert select_names(*sides, "trainable", aliases=naming.aliases) == frozenset({EMBED, "a"})


# Bytes.


def prepared(sources: list[Shard], destinations: list[list[Shard]], **how: object) -> Preparation:
    layouts = [describe(sources)], [describe(shards) for shards in destinations]
    naming = name_layouts(*layouts, **how)  # type: ignore[arg-type]
    return prepare(naming.sources, naming.destinations, SyncOptions(), None, Carriers("gloo"), renames=naming.renames)


def carry_out(programs: tuple[Program, ...], shards: list[list[Shard]]) -> None:
    """Copy every cut through the addressing that actors use, after a program's way over the wire."""
    memories = [Memory(own).under(program.renames) for own, program in zip(shards, programs, strict=True)]
    for program in programs:
        for step in program.steps:
            for cut in step.cuts if program.actor == step.sender else ():
                for receiver in step.receivers:
                    for target in memories[receiver].targets(cut):
                        target.copy_(memories[step.sender].source(cut))


def test_bytes_land_in_the_actors_own_tensors() -> None:
    """A tied source of its own names; an engine with prefixed names that holds the head apart, cut in two."""
    whole = torch.arange(12.0).view(6, 2)
    norm = torch.tensor([7.0, 8.0])
    source = [Shard("wte", whole, (0, 0), (6, 2)), Shard("ln", norm, (0,), (2,))]
    engines = [
        [
            Shard("e.embed", torch.zeros(3, 2), (3 * rank, 0), (6, 2)),
            Shard("e.head", torch.zeros(3, 2), (3 * rank, 0), (6, 2)),
            Shard("e.norm", torch.zeros(2), (0,), (2,)),
        ]
        for rank in range(2)
    ]
    ready = prepared(
        source,
        engines,
        source_names={"wte": EMBED, "ln": "model.norm.weight"},
        destination_names={"e.embed": EMBED, "e.head": HEAD, "e.norm": "model.norm.weight"},
        aliases=TIED,
    )
    carry_out(tuple(packed.unpack() for packed in ready.packed), [source, *engines])
    for rank, engine in enumerate(engines):
        rows = whole[3 * rank : 3 * rank + 3].numpy()
        for shard, wanted in zip(engine, (rows, rows, norm.numpy()), strict=True):
            assert isinstance(shard.view, torch.Tensor)
            np.testing.assert_array_equal(shard.view.numpy(), wanted)

    # The head costs nothing: both copies of an actor are written from one route.
    assert ready.plan.nbytes == 2 * (24 + 8)


def test_what_a_map_leaves_out_is_not_written() -> None:
    source = [Shard("a", torch.ones(2), (0,), (2,)), Shard("b", torch.ones(2), (0,), (2,))]
    engine = [Shard("a", torch.zeros(2), (0,), (2,)), Shard("b", torch.zeros(2), (0,), (2,))]
    ready = prepared(source, [engine], destination_names={"b": None})
    carry_out(ready.programs, [source, engine])
    assert [shard.view.tolist() for shard in engine if isinstance(shard.view, torch.Tensor)] == [[1, 1], [0, 0]]


def test_programs_of_other_names_have_another_digest() -> None:
    """The plan is the same in both: only what the engine calls its tensor differs."""
    source = [Shard("a", torch.ones(2), (0,), (2,))]
    ready = [
        prepared(source, [[Shard(own, torch.zeros(2), (0,), (2,))]], destination_names={own: "a"})
        for own in ("a", "x", "y")
    ]
    assert len({each.plan.digest for each in ready}) == 1
    assert len({each.digest for each in ready}) == 3


def test_names_swapped_on_one_actor_are_not_mixed_up() -> None:
    memory = Memory([Shard("a", torch.tensor([1.0]), (0,), (1,)), Shard("b", torch.tensor([2.0]), (0,), (1,))])
    ready = prepared(
        [Shard("a", torch.tensor([1.0]), (0,), (1,)), Shard("b", torch.tensor([2.0]), (0,), (1,))],
        [[Shard("a", torch.zeros(1), (0,), (1,)), Shard("b", torch.zeros(1), (0,), (1,))]],
        source_names={"a": "b", "b": "a"},
    )
    (step,) = ready.programs[0].steps
    swapped = memory.under(ready.programs[0].renames)
    assert {cut.tensor: float(swapped.source(cut)) for cut in step.cuts} == {"a": 2.0, "b": 1.0}
    assert memory.under(()) is memory
    assert memory.under(ready.programs[0].renames) is swapped
