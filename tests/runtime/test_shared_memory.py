"""What is written to one view is written to all on its memory: one tensor's, or refused before a byte moves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.runtime.local_actors import local
from tests.runtime.local_groups import held, sync
from wavecast.runtime import LayoutError, Shard, SyncOptions
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, describe
from wavecast.runtime.naming import name_layouts

__all__ = ("local",)

pytestmark = pytest.mark.usefixtures("local")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def full(value: float, shape: tuple[int, ...] = (4, 4)) -> torch.Tensor:
    return torch.full(shape, float(value))


@pytest.mark.parametrize("trainers", [1, 2])
@pytest.mark.parametrize("staging", ["in_place", "shadow"])
def test_two_names_on_one_memory_are_refused_where_sources_hold_them_apart(trainers: int, staging: str) -> None:
    embed, head, tied = held(EMBED, full(1)), held(HEAD, full(2)), full(0)
    sources = [[embed, head]] if trainers == 1 else [[embed], [head]]
    with pytest.raises(LayoutError, match=f"{EMBED}.*{HEAD}.*share memory") as caught:
        sync(sources, [[held(EMBED, tied), held(HEAD, tied)]], options=SyncOptions(staging=staging))  # type: ignore[arg-type]

    assert caught.value.actors == (trainers,)
    assert tied.unique().tolist() == [0]


def test_two_boxes_of_a_tensor_whose_views_overlap_are_refused() -> None:
    memory = full(0, (6, 4))
    shards = [Shard("w", memory[:4], (0, 0), (8, 4)), Shard("w", memory[2:], (4, 0), (8, 4))]
    with pytest.raises(LayoutError, match=r"'w' at offset \(0, 0\).*'w' at offset \(4, 0\).*share memory"):
        sync([[held("w", full(1, (8, 4)))]], [shards])

    assert memory.unique().tolist() == [0]


def test_names_tied_at_both_ends_are_one_tensor() -> None:
    weight, memory = full(3), full(0)
    report = sync([[held(EMBED, weight), held(HEAD, weight)]], [[held(EMBED, memory), held(HEAD, memory)]])
    assert memory.unique().tolist() == [3]
    assert (report.tensors, report.nbytes) == (1, 64)


def test_names_tied_at_one_source_only_are_not_one_tensor() -> None:
    weight, memory = full(3), full(0)
    sources = [[held(EMBED, weight), held(HEAD, weight)], [held(EMBED, full(3))]]
    with pytest.raises(LayoutError, match="share memory"):
        sync(sources, [[held(EMBED, memory), held(HEAD, memory)]])


def test_an_alias_is_one_tensor_whatever_it_is_called() -> None:
    memory = full(0)
    options = SyncOptions(aliases=[(EMBED, HEAD)])
    sync([[held(EMBED, full(5))]], [[held(EMBED, memory), held(HEAD, memory)]], options=options)
    assert memory.unique().tolist() == [5]


def test_memory_shared_with_what_is_not_sent_is_let_be() -> None:
    memory = full(0)
    options = SyncOptions(allow_missing=[HEAD])
    sync([[held(EMBED, full(5))]], [[held(EMBED, memory), held(HEAD, memory)]], options=options)
    assert memory.unique().tolist() == [5]


def test_slices_of_a_fused_tensor_are_no_overlap() -> None:
    fused = full(0, (4, 6))
    parts = [held("gate", fused[:, :3]), held("up", fused[:, 3:])]
    sync([[held("gate", full(1, (4, 3))), held("up", full(2, (4, 3)))]], [parts])
    assert fused.tolist() == [[1, 1, 1, 2, 2, 2]] * 4


def test_memory_that_is_tied_between_syncs_is_found_at_the_next() -> None:
    first, second = full(0), full(0)
    memory = [second]

    def shards() -> list[Shard]:
        return [held("a", first), held("b", memory[0])]

    sources = [[held("a", full(1)), held("b", full(2))]]
    sync(sources, [shards], times=2)
    assert (first.unique().tolist(), second.unique().tolist()) == ([1], [2])
    calls = []

    def tied_later() -> list[Shard]:
        calls.append(1)
        return [held("a", first), held("b", second if len(calls) == 1 else first)]

    with pytest.raises(LayoutError, match="share memory"):
        sync(sources, [tied_later], times=2)


def test_a_source_that_holds_a_box_twice_in_different_memory_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"holds 'w' .* twice, in different memory") as caught:
        sync([[held("w", full(1)), held("w", full(2))]], [[held("w", full(0))]])

    assert (caught.value.tensor, caught.value.actors) == ("w", (0,))


def test_a_name_map_that_makes_two_of_a_sources_tensors_one_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"'a' at .* and 'b' at "):
        sync(
            [[held("a", full(1)), held("b", full(2))]],
            [[held("w", full(0))]],
            source_names={"a": "w", "b": "w"},
        )


def test_views_of_one_memory_under_one_name_stay_fine() -> None:
    weight, memory = full(1), full(0)
    sync([[held("w", weight), held("w", weight)]], [[held("w", memory)]])
    assert memory.unique().tolist() == [1]


@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_a_source_that_holds_parts_of_boxes_in_different_memory_is_refused(shape: tuple[int, ...]) -> None:
    memory, rest = torch.arange(math.prod(shape)).float().reshape(shape), (0,) * (len(shape) - 1)
    upper, lower = Shard("w", memory[:6], (0, *rest), shape), Shard("w", memory[2:], (2, *rest), shape)
    apart = Shard("w", memory[2:].clone(), (2, *rest), shape)
    whole = Shard("w", memory, (0, *rest), shape)
    inner = Shard("w", memory[3:5].clone(), (3, *rest), shape)
    for shards in ([upper, apart], [apart, upper], [upper, lower, inner], [inner, whole]):
        with pytest.raises(LayoutError, match="a source holds 'w' twice in part, in different memory") as caught:
            name_layouts([describe([upper]), describe(shards)], [])

        assert caught.value.actors == (1,)

    # Windows of one memory, a tied copy among them, and an actor for each of the two memories.
    name_layouts([describe([upper, lower, upper]), describe([inner])], [])
    name_layouts([describe([replace(lower, name="tied"), upper, lower])], [])


def test_computed_views_may_overlap_in_part() -> None:
    def computed(rows: int) -> Computed:
        return Computed((rows,), torch.float32, torch.device("cpu"), lambda box: torch.ones(box.extent))

    name_layouts([describe([Shard("w", computed(6), (0,), (8,)), Shard("w", computed(4), (4,), (8,))])], [])


def test_a_computed_view_twice_is_refused() -> None:
    computed = Computed((4, 4), torch.float32, torch.device("cpu"), lambda box: full(1, box.extent))
    shard = Shard("w", computed, (0, 0), (4, 4))
    assert shard.box == Box((0, 0), (4, 4))
    with pytest.raises(LayoutError, match="twice, in different memory"):
        sync([[shard, shard]], [[held("w", full(0))]])
