"""DTensors read as shards, held against tensors that were really chunked, axis after axis."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import dtensor
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Shard, describe


@dataclass
class FakeMesh:
    shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None

    def get_coordinate(self):
        return None if self.coordinate is None else list(self.coordinate)


@dataclass
class FakeDTensor:
    """As much of a DTensor as the adapter asks for, without a process group."""

    shape: torch.Size
    device_mesh: FakeMesh
    placements: tuple[object, ...]
    local: torch.Tensor
    requires_grad: bool = True
    _spec: object = None

    def to_local(self):
        return self.local

    def numel(self):
        return math.prod(self.shape)


def numbered(*shape):
    return torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)


def chunk(tensor, parts, dim):
    """Return what torch gives each of ``parts`` ranks: chunks, then empty ones."""
    chunks = list(torch.chunk(tensor, parts, dim=dim))
    return chunks + [tensor.narrow(dim, 0, 0)] * (parts - len(chunks))


def ranks_of(mesh_shape):
    return list(itertools.product(*(range(size) for size in mesh_shape)))


def distribute(whole, mesh_shape, cuts, made):
    """
    Return a fake DTensor for every rank of a mesh.

    :param cuts: for each mesh axis the dim it cuts, or None
    :param made: the mesh axes in the order in which they cut
    """
    placements = []
    for axis, dim in enumerate(cuts):
        before = made[: made.index(axis)]
        factor = math.prod(mesh_shape[other] for other in before if other > axis and cuts[other] == dim)
        if dim is None:
            placements.append(Replicate())
        else:
            placements.append(Cut(dim) if factor == 1 else _StridedShard(dim, split_factor=factor))

    held = {}
    for coordinate in ranks_of(mesh_shape):
        local = whole
        for axis in made:
            if cuts[axis] is not None:
                local = chunk(local, mesh_shape[axis], cuts[axis])[coordinate[axis]]

        mesh = FakeMesh(tuple(mesh_shape), coordinate)
        held[coordinate] = FakeDTensor(whole.shape, mesh, tuple(placements), local.clone())

    return held


def check_every_element(whole, held):
    """Each shard's elements are the logical tensor's, as views; each rank gives all it holds, and nothing twice."""
    for tensor in held.values():
        shards = dtensor.tensor_shards("w", tensor)
        seen = torch.zeros_like(whole)
        for shard in shards:
            where = tuple(slice(a, a + n) for a, n in zip(shard.box.offset, shard.box.extent, strict=True))
            assert torch.equal(shard.view, whole[where])
            assert shard.view.untyped_storage().data_ptr() == tensor.local.untyped_storage().data_ptr()
            seen[where] += 1

        assert int(seen.max()) <= 1
        assert int(seen.sum()) == tensor.local.numel()


@st.composite
def distributions(draw):
    shape = draw(st.lists(st.integers(1, 13), min_size=1, max_size=3))
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    cuts = [draw(st.one_of(st.none(), st.integers(0, len(shape) - 1))) for _ in mesh_shape]
    made = draw(st.permutations(range(len(mesh_shape))))
    return tuple(shape), tuple(mesh_shape), cuts, list(made)


@settings(max_examples=200, deadline=None)
@given(distributions())
def test_any_mesh_and_any_order_of_cuts_give_the_elements_that_are_held(case):
    shape, mesh_shape, cuts, made = case
    whole = numbered(*shape)
    held = distribute(whole, mesh_shape, cuts, made)
    check_every_element(whole, held)
    target = torch.full_like(whole, -1)
    sources = [dtensor.tensor_shards("w", tensor) for tensor in held.values()]
    move(sources, [[Shard("w", target, (0,) * len(shape), shape)]])
    assert torch.equal(target, whole)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(1, 4), st.integers(2, 5))
def test_a_split_factor_that_no_order_explains_is_read_as_torch_reads_it(size, parts, factor):
    whole = numbered(size, 2)
    placement = _StridedShard(0, split_factor=factor)
    locals_, _ = placement._split_tensor(whole, parts, with_padding=False)
    held = {
        (rank,): FakeDTensor(whole.shape, FakeMesh((parts,), (rank,)), (placement,), local.clone())
        for rank, local in enumerate(locals_)
    }
    check_every_element(whole, held)


def boxes(tensor):
    return [shard.box for shard in dtensor.tensor_shards("w", tensor)]


def test_fsdp_cuts_rows_as_chunks_and_the_last_ranks_may_hold_nothing():
    held = distribute(numbered(10, 3), (4,), [0], [0])
    assert [boxes(tensor) for tensor in held.values()] == [
        [Box((0, 0), (3, 3))],
        [Box((3, 0), (3, 3))],
        [Box((6, 0), (3, 3))],
        [Box((9, 0), (1, 3))],
    ]
    held = distribute(numbered(3, 2), (4,), [0], [0])
    assert boxes(held[3,]) == []


def test_fsdp_after_tensor_parallel_cuts_what_the_plan_left():
    held = distribute(numbered(8, 2), (2, 2), [0, 0], [1, 0])
    assert isinstance(held[0, 0].placements[0], _StridedShard)
    assert {rank: [box.offset[0] for box in boxes(tensor)] for rank, tensor in held.items()} == {
        (0, 0): [0],
        (0, 1): [4],
        (1, 0): [2],
        (1, 1): [6],
    }


def test_an_uneven_cut_by_both_is_read_in_the_order_it_was_made():
    # Seven rows: the plan leaves four and three, and of three rows each of three data ranks has one.
    held = distribute(numbered(7, 1), (3, 2), [0, 0], [1, 0])
    assert boxes(held[2, 1]) == [Box((6, 0), (1, 1))]
    assert boxes(held[2, 0]) == []


def test_a_strided_shard_may_be_several_boxes():
    tensor = FakeDTensor(
        torch.Size((8, 2)), FakeMesh((2,), (1,)), (_StridedShard(0, split_factor=2),), numbered(8, 2)[[2, 3, 6, 7]]
    )
    assert boxes(tensor) == [Box((2, 0), (2, 2)), Box((6, 0), (2, 2))]


def test_replicas_of_a_hybrid_mesh_hold_equal_boxes():
    held = distribute(numbered(6, 2), (2, 2), [None, 0], [0, 1])
    assert boxes(held[0, 0]) == boxes(held[1, 0]) == [Box((0, 0), (3, 2))]
    assert boxes(held[0, 1]) == boxes(held[1, 1]) == [Box((3, 0), (3, 2))]


def test_a_stated_order_of_cuts_is_followed():
    class Spec:
        use_strided_shard_as_shard_order = False
        shard_order = ((0, (1, 0)),)

    held = distribute(numbered(8), (2, 2), [0, 0], [1, 0])
    plain = FakeDTensor(torch.Size((8,)), FakeMesh((2, 2), (0, 1)), (Cut(0), Cut(0)), held[0, 1].local, True, Spec())
    assert boxes(plain) == [Box((4,), (2,))]


def test_a_rank_outside_the_mesh_holds_nothing():
    tensor = FakeDTensor(torch.Size((4,)), FakeMesh((2,), None), (Cut(0),), torch.empty(0))
    assert dtensor.tensor_shards("w", tensor) == []


def test_pending_sums_are_refused():
    tensor = FakeDTensor(torch.Size((4,)), FakeMesh((2,), (0,)), (Partial(),), torch.zeros(4))
    with pytest.raises(LayoutError, match=r"'w' has the placement Partial\(sum\), which no box can say"):
        dtensor.tensor_shards("w", tensor)


def test_a_local_shape_that_is_not_what_placements_say_is_refused():
    tensor = FakeDTensor(torch.Size((5, 2)), FakeMesh((2,), (1,)), (Cut(0),), torch.zeros(3, 2))
    with pytest.raises(
        LayoutError, match=r"'w' has the local shape \(3, 2\), its placements .* say \(2, 2\)"
    ) as caught:
        dtensor.tensor_shards("w", tensor)

    assert caught.value.tensor == "w"


def test_plain_tensors_are_whole_and_views():
    module = torch.nn.Linear(3, 2)
    found = dtensor.shards(module)
    assert [(shard.name, shard.offset, shard.global_shape) for shard in found] == [
        ("weight", (0, 0), (2, 3)),
        ("bias", (0,), (2,)),
    ]
    assert found[0].view.data_ptr() == module.weight.data_ptr()
    assert not found[0].view.requires_grad


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("cache", torch.ones(1), persistent=False)


def names_of(shards):
    return [shard.name for shard in shards]


def test_tied_weights_come_once_and_under_every_name_asked_for():
    model = Model()
    assert names_of(dtensor.shards(model)) == ["embed.weight"]
    tied = {"embed.weight": ("model.embed_tokens.weight", "lm_head.weight")}
    found = dtensor.shards(model, names=tied)
    assert names_of(found) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert found[0].view.data_ptr() == found[1].view.data_ptr()


def test_only_persistent_buffers_come_and_only_when_asked_for():
    assert names_of(dtensor.shards(Model(), buffers=True)) == ["embed.weight", "scale"]


def test_names_can_be_mapped_left_out_and_are_freed_of_wrappers():
    tensors = [
        ("_orig_mod.layers.0._checkpoint_wrapped_module.w", torch.ones(1)),
        ("_fsdp_wrapped_module.rotary", torch.ones(1)),
    ]
    assert names_of(dtensor.shards(tensors)) == ["layers.0.w", "rotary"]
    assert names_of(dtensor.shards(tensors, names=lambda name: None if name == "rotary" else f"model.{name}")) == [
        "model.layers.0.w"
    ]
    assert names_of(dtensor.shards(tensors, names={"rotary": None})) == ["layers.0.w"]


def test_trainable_names_are_those_with_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    assert dtensor.trainable_names(model) == {"1.weight", "1.bias"}
    assert dtensor.trainable_names(model, names=lambda name: f"model.{name}") == {"model.1.weight", "model.1.bias"}


def test_a_flat_parameter_is_refused_by_name():
    flat = torch.nn.Parameter(torch.ones(3))
    flat._is_flat_param = True
    with pytest.raises(
        LayoutError, match=r"'w' is an FSDP1 flat parameter: give it to wavecast\.runtime\.layout\.flat"
    ):
        dtensor.tensor_shards("w", flat)


def test_empty_and_scalar_tensors():
    assert dtensor.tensor_shards("e", torch.empty(0, 3)) == []
    assert describe(dtensor.tensor_shards("s", torch.tensor(1.0))).pieces[0].box == Box((), ())


def test_parameters_are_trainable_by_their_gradients_and_buffers_never():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    found = {shard.name: shard.trainable for shard in dtensor.shards(model, buffers=True)}
    trained = {name for name, trainable in found.items() if trainable}
    assert trained == dtensor.trainable_names(model) == {"0.bias", "1.weight", "1.bias"}
    assert found.keys() - trained == {"0.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    # A tensor by itself may come from anywhere: it is taken for one in training.
    assert dtensor.tensor_shards("w", torch.zeros(2))[0].trainable
    assert not dtensor.tensor_shards("w", torch.nn.Parameter(torch.zeros(2), requires_grad=False))[0].trainable
