"""Flat ranges as shards, held against flattening with torch itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import flat
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Shard


def numbered(shape, first=0):
    return torch.arange(first, first + math.prod(shape), dtype=torch.int32).reshape(shape)


def laid_out(shapes):
    """Return named whole tensors, each element a number of its own."""
    wholes = {}
    for index, shape in enumerate(shapes):
        wholes[f"w{index}"] = numbered(shape, 10_000 * index)

    return wholes


shapes = st.lists(st.lists(st.integers(1, 6), max_size=4).map(tuple), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(shapes, st.lists(st.integers(0, 7), min_size=6, max_size=6), st.integers(1, 7))
def test_ranges_of_equal_size_bring_every_parameter_back_whole(sizes, paddings, world):
    wholes = laid_out(sizes)
    parameters, elements = [], []
    for padding, (name, whole) in zip(paddings, wholes.items(), strict=False):
        parameters += [(None, (padding,)), (name, whole.shape)]
        elements += [torch.full((padding,), -7, dtype=torch.int32), whole.flatten()]

    joined = torch.cat(elements)
    each = -(-joined.numel() // world)
    joined = torch.cat([joined, torch.full((each * world - joined.numel(),), -7, dtype=torch.int32)])
    ranks = [joined[rank * each : (rank + 1) * each].clone() for rank in range(world)]
    sources = [flat.flat_shards(part, parameters, start=rank * each) for rank, part in enumerate(ranks)]

    for part, shards in zip(ranks, sources, strict=True):
        for shard in shards:
            assert shard.view.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()
            assert shard.view.is_contiguous()

    targets = {name: torch.full_like(whole, -1) for name, whole in wholes.items()}
    move(sources, [[Shard(name, view, (0,) * view.dim(), tuple(view.shape)) for name, view in targets.items()]])
    for name, whole in wholes.items():
        assert torch.equal(targets[name], whole)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple), st.data())
def test_a_range_is_at_most_twice_its_dims_less_one_boxes(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    shards = flat.flat_shards(torch.zeros(stop - start), [("w", shape)], start=start)
    assert 1 <= len(shards) <= 2 * len(shape) - 1


def test_a_range_of_a_matrix_is_a_ragged_row_whole_rows_and_a_ragged_row():
    shards = flat.flat_shards(numbered((13,), 5), [("w", (4, 5))], start=3)
    assert [shard.box for shard in shards] == [Box((0, 3), (1, 2)), Box((1, 0), (2, 5)), Box((3, 0), (1, 1))]
    assert [shard.view.tolist() for shard in shards] == [[[5, 6]], [[7, 8, 9, 10, 11], [12, 13, 14, 15, 16]], [[17]]]


def test_ranges_can_be_written_to():
    buffers = [torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)]
    destinations = [
        flat.flat_shards(buffer, [("a", (2, 2)), ("b", (3,))], start=4 * rank) for rank, buffer in enumerate(buffers)
    ]
    a, b = numbered((2, 2), 1), numbered((3,), 10)
    move([[Shard("a", a, (0, 0), (2, 2)), Shard("b", b, (0,), (3,))]], destinations)
    assert [buffer.tolist() for buffer in buffers] == [[1, 2, 3, 4], [10, 11, 12, 0]]


@pytest.mark.parametrize(("shape", "start"), [((2, 2), 0), ((4,), -1)])
def test_what_is_no_flat_range_is_refused(shape, start):
    with pytest.raises(LayoutError, match="a flat range needs one dim and a start of at least 0"):
        flat.flat_shards(torch.zeros(shape), [("w", (8,))], start=start)


def partitioned(whole, rank, world):
    """Return a parameter as ZeRO-3 leaves it: no elements of its own, and a padded partition."""
    each = -(-whole.numel() // world)
    part = torch.full((each,), -7, dtype=whole.dtype)
    held = whole.flatten()[rank * each : (rank + 1) * each]
    part[: held.numel()] = held
    part.ds_numel = each
    parameter = torch.nn.Parameter(torch.empty(0, dtype=whole.dtype), requires_grad=False)
    parameter.ds_tensor = part
    parameter.ds_shape = whole.shape
    parameter.ds_process_group = None
    parameter.ds_zero_partition_rank = rank
    return parameter


class Zero3Module(torch.nn.Module):
    def __init__(self, wholes, rank, world):
        super().__init__()
        for name, whole in wholes.items():
            self.register_parameter(name, partitioned(whole, rank, world))

        self.plain = torch.nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)


def test_partitions_of_each_parameter_are_read_where_zero3_keeps_them():
    wholes = laid_out([(5, 3), (2,), (3, 3, 3)])
    sources = [flat.zero3_shards(Zero3Module(wholes, rank, 4), names=lambda name: f"model.{name}") for rank in range(4)]
    wholes["plain"] = torch.ones(2, dtype=torch.int32)
    targets = {name: torch.full_like(whole, -1) for name, whole in wholes.items()}
    move(
        sources,
        [[Shard(f"model.{name}", view, (0,) * view.dim(), tuple(view.shape)) for name, view in targets.items()]],
    )
    for name, whole in wholes.items():
        assert torch.equal(targets[name], whole)


def test_a_partition_on_disk_is_refused():
    module = Zero3Module(laid_out([(5, 3)]), 0, 2)
    module.w0.ds_tensor.data = torch.empty(0, dtype=torch.int32)
    with pytest.raises(LayoutError, match="ZeRO-3 has 'w0' swapped out or quantised") as caught:
        flat.zero3_shards(module)

    assert caught.value.tensor == "w0"


@dataclass
class Handle:
    """As much of FSDP1's handle of a flat parameter as the adapter asks for."""

    flat_param: torch.nn.Parameter
    rank: int
    uses_sharded_strategy: bool = True


@dataclass
class Tied:
    module_name: str
    param_name: str


@dataclass
class Flattened:
    contiguities: tuple[bool, ...] = (True, True)
    extensions: tuple[object, ...] = (None, None)
    tied: tuple[Tied, ...] = field(default=(Tied("", "head"),))


def fsdp1_module(rank, how):
    """Return a module whose two parameters FSDP1 has flattened with one element of padding between them."""
    whole = torch.cat([numbered((3, 2)).flatten(), torch.tensor([-7], dtype=torch.int32), numbered((2,), 100)])
    padded = torch.cat([whole, torch.tensor([-7], dtype=torch.int32)])
    module = torch.nn.Module()
    module._fsdp_wrapped_module = torch.nn.Module()
    parameter = torch.nn.Parameter(padded[5 * rank : 5 * rank + 5].clone(), requires_grad=False)
    parameter._is_flat_param = True
    parameter._fqns = ("up.weight", "up.bias")
    parameter._shapes = ((3, 2), (2,))
    parameter._contiguities = how.contiguities
    parameter._param_extensions = how.extensions
    parameter._numels_with_padding = (6, 1, 2)
    parameter._is_padding_mask = (False, True, False)
    parameter._shared_param_infos = how.tied
    module._handle = Handle(parameter, rank)
    module._fsdp_wrapped_module.register_parameter("_flat_param", parameter)
    module._fsdp_wrapped_module.register_parameter("head", torch.nn.Parameter(torch.zeros(1)))
    module._fsdp_wrapped_module.register_parameter("ignored", torch.nn.Parameter(torch.zeros(1)))
    return module


def test_a_flat_parameter_of_fsdp1_is_read_through_its_handle():
    found = [flat.fsdp1_shards(fsdp1_module(rank, Flattened())) for rank in range(2)]
    assert [[(shard.name, shard.box, shard.view.flatten().tolist()) for shard in shards] for shards in found] == [
        [
            ("up.weight", Box((0, 0), (2, 2)), [0, 1, 2, 3]),
            ("up.weight", Box((2, 0), (1, 1)), [4]),
            ("ignored", Box((0,), (1,)), [0]),
        ],
        [
            ("up.weight", Box((2, 1), (1, 1)), [5]),
            ("up.bias", Box((0,), (2,)), [100, 101]),
            ("ignored", Box((0,), (1,)), [0]),
        ],
    ]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Flattened(contiguities=(False, True)), "'up.weight' in another order than that of its dims"),
        (Flattened(extensions=(None, object())), "'up.bias' after tensor parallelism had cut it"),
    ],
)
def test_what_fsdp1_flattened_out_of_order_is_refused(how, message):
    with pytest.raises(LayoutError, match=message):
        flat.fsdp1_shards(fsdp1_module(0, how))


def test_ranges_of_frozen_parameters_are_not_trainable():
    found = flat.flat_shards(torch.zeros(5), [("a", (2, 2)), ("b", (3,))], start=1, frozen=("a",))
    assert [(shard.name, shard.trainable) for shard in found] == [("a", False), ("a", False), ("b", True)]


def test_zero3_and_fsdp1_tell_what_is_trained_by_their_parameters():
    module = Zero3Module(laid_out([(5, 3), (2,)]), 0, 2)
    assert {shard.name for shard in flat.zero3_shards(module) if shard.trainable} == set()
    module = fsdp1_module(0, Flattened())
    assert {shard.name: shard.trainable for shard in flat.fsdp1_shards(module)} == {
        "up.weight": False,
        "ignored": True,
    }
    originals = (torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    module = fsdp1_module(1, Flattened())
    module._handle.flat_param._params = originals
    assert {shard.name: shard.trainable for shard in flat.fsdp1_shards(module)} == {
        "up.weight": True,
        "up.bias": False,
        "ignored": True,
    }


def test_a_parameter_of_a_negative_size_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"parameter 'w' has shape \(-2, 3\)"):
        flat.flat_shards(torch.zeros(4), [("w", (-2, 3))])
