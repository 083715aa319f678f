"""From a module's own tensors to logical ones, by views alone."""

from __future__ import annotations

import pytest
import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import views
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def computed(tensor):
    """Return a stand-in that reads from ``tensor``."""

    def read(box):
        return tensor[tuple(slice(a, a + n) for a, n in zip(box.offset, box.extent, strict=True))].clone()

    return Computed(tuple(tensor.shape), tensor.dtype, tensor.device, read)


def both(tensor):
    return pytest.param(tensor, id="memory"), pytest.param(computed(tensor), id="computed")


def read(shard, box=None):
    return views.elements(shard.view, box or Box((0,) * len(shard.offset), tuple(shard.view.shape)))


@pytest.mark.parametrize("view", both(numbered(2, 3, 4)))
def test_a_stack_is_taken_apart_by_its_place_in_the_whole(view):
    shard = Shard("experts", view, (4, 0, 2), (8, 3, 6))
    found = views.unstacked(shard, "experts.{}.weight".format)
    assert [(each.name, each.offset, each.global_shape) for each in found] == [
        ("experts.4.weight", (0, 2), (3, 6)),
        ("experts.5.weight", (0, 2), (3, 6)),
    ]
    assert torch.equal(read(found[1]), numbered(2, 3, 4)[1])
    assert torch.equal(read(found[1], Box((1, 2), (2, 1))), numbered(2, 3, 4)[1, 1:3, 2:3])


@pytest.mark.parametrize("view", both(numbered(6, 2)))
def test_a_fused_tensor_is_cut_at_the_sizes_of_its_parts(view):
    # Rows 3 to 9 of a tensor of gate 4, padding 1, up 5.
    shard = Shard("fused", view, (3, 0), (10, 2))
    found = views.sections(shard, [("gate", 4), (None, 1), ("up", 5), ("none", 0)])
    assert [(each.name, each.box, each.global_shape) for each in found] == [
        ("gate", Box((3, 0), (1, 2)), (4, 2)),
        ("up", Box((0, 0), (4, 2)), (5, 2)),
    ]
    assert torch.equal(read(found[0]), numbered(6, 2)[:1])
    assert torch.equal(read(found[1]), numbered(6, 2)[2:])
    assert torch.equal(read(found[1], Box((1, 1), (2, 1))), numbered(6, 2)[3:5, 1:])


def test_a_tensor_can_be_cut_along_any_dim():
    found = views.sections(Shard("fused", numbered(2, 6), (0, 0), (2, 6)), [("a", 2), ("b", 4)], dim=1)
    assert [each.box for each in found] == [Box((0, 0), (2, 2)), Box((0, 0), (2, 4))]
    assert torch.equal(read(found[1]), numbered(2, 6)[:, 2:])


@pytest.mark.parametrize("view", both(numbered(2, 3)))
def test_a_transposed_matrix_swaps_all_that_has_two_sides(view):
    found = views.transposed(Shard("w", view, (1, 2), (4, 8)))
    assert (found.offset, found.global_shape, tuple(found.view.shape)) == ((2, 1), (8, 4), (3, 2))
    assert torch.equal(read(found), numbered(2, 3).t())
    assert torch.equal(read(found, Box((1, 0), (2, 1))), numbered(2, 3).t()[1:, :1])


def test_nothing_is_copied():
    memory = numbered(4, 6, 2)
    shard = Shard("w", memory, (0, 0, 0), (4, 6, 2))
    (part, _) = views.sections(views.transposed(views.unstacked(shard, str)[1]), [("a", 1), ("b", 1)])
    part.view.fill_(-1)
    assert (memory[1, :, 0] == -1).all()
    assert int((memory == -1).sum()) == 6


def test_what_cannot_be_taken_apart_is_refused_by_name():
    with pytest.raises(LayoutError, match="'s' has no dims and cannot be a stack"):
        views.unstacked(Shard("s", torch.tensor(1), (), ()), str)

    with pytest.raises(LayoutError, match="'v' has 1 dims and cannot be transposed"):
        views.transposed(Shard("v", torch.ones(2), (0,), (2,)))

    with pytest.raises(LayoutError, match="parts a: 1, b: 2 of 'v' do not add up to its size 2 along dim 0"):
        views.sections(Shard("v", torch.ones(2), (0,), (2,)), [("a", 1), ("b", 2)])


def test_shards_can_be_renamed_repeated_and_left_out():
    shards = [Shard(name, torch.ones(1), (0,), (1,)) for name in ("embed", "cache", "norm")]
    found = views.renamed(shards, {"embed": ("embed", "head"), "cache": None})
    assert [shard.name for shard in found] == ["embed", "head", "norm"]
    assert views.renamed(shards, None) == shards


def test_a_box_is_put_together_from_the_shards_that_hold_it():
    whole = numbered(4, 6)
    shards = [
        Shard("w", whole[:, 3:], (0, 3), (4, 6)),
        Shard("w", computed(whole[:2, :4]), (0, 0), (4, 6)),
        Shard("w", whole[2:, :2], (2, 0), (4, 6)),
    ]
    assert torch.equal(views.assembled("w", shards, Box((0, 1), (2, 5))), whole[:2, 1:])
    inside = views.assembled("w", shards, Box((1, 4), (3, 2)))
    assert inside.data_ptr() == whole[1, 4].data_ptr()
    assert views.missing(shards, Box((0, 0), (4, 6))) == [Box((2, 2), (2, 1))]
    with pytest.raises(LayoutError, match=r"lacks 'w' at offset \(2, 2\) with extent \(2, 1\)"):
        views.assembled("w", shards, Box((0, 0), (4, 6)))

    with pytest.raises(LayoutError, match=r"lacks 'w' at offset \(0, 0\) with extent \(1, 1\)"):
        views.assembled("w", [], Box((0, 0), (1, 1)))


@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_trainable_stays_so_in_every_view(trainable):
    stack = Shard("w", torch.zeros(2, 4, 3), (0, 0, 0), (2, 4, 3), trainable=trainable)
    units = views.unstacked(stack, lambda index: f"w{index}")
    parts = views.sections(units[0], [("gate", 2), ("up", 2)])
    made = [*units, *parts, views.transposed(parts[0]), *views.renamed(parts, {"up": ("up", "copy")})]
    assert [shard.trainable for shard in made] == [trainable] * 8
