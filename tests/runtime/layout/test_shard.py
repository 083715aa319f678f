"""Shards describe themselves, and refuse what does not fit."""

from __future__ import annotations

import pytest
import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place, Shard, describe


def test_a_strided_view_is_a_shard_and_a_piece():
    memory = torch.zeros(6, 10, dtype=torch.bfloat16)
    shard = Shard(name="w", view=memory[::2, 3:7], offset=(3, 4), global_shape=(9, 8))
    assert shard.box == Box((3, 4), (3, 4))
    place = Place("node", "cpu")
    assert describe([shard], place=place) == Layout((Piece("w", Box((3, 4), (3, 4)), (9, 8), "bfloat16"),), place)


def test_a_scalar_is_a_shard():
    shard = Shard(name="scale", view=torch.tensor(2.0), offset=(), global_shape=())
    assert describe([shard]).pieces == (Piece("scale", Box((), ()), (), "float32"),)


@pytest.mark.parametrize(
    ("offset", "global_shape"),
    [((1, 0), (4, 5)), ((-1, 0), (9, 9)), ((0,), (4, 5)), ((0, 0), (4,)), ((0, 1), (4, 5))],
)
def test_a_view_that_does_not_fit_is_refused_by_name(offset, global_shape):
    with pytest.raises(LayoutError, match=r"shard of 'w' at offset .* with extent \(4, 5\) does not fit") as caught:
        Shard(name="w", view=torch.zeros(4, 5), offset=offset, global_shape=global_shape)

    assert caught.value.tensor == "w"


def test_a_tensor_is_frozen_where_none_of_its_shards_is_trainable():
    held = [("a", False), ("b", True), ("c", False), ("a", False), ("b", False), ("c", True)]
    layout = describe(
        Shard(name, torch.zeros(1), (index,), (6,), trainable=trainable) for index, (name, trainable) in enumerate(held)
    )
    assert layout.frozen == ("a",)
    assert [piece.tensor for piece in layout.pieces] == [name for name, _ in held]
    assert describe([]).frozen == ()
