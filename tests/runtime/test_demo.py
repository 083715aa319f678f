"""The demo's weights: known to everybody from their place alone, and so a judge of what arrived."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wavecast.runtime.checkpoint import Checkpoint
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, describe
from wavecast.runtime.presets import PRESETS
from wavecast.runtime.transfer.memory import as_bits, dtype_of

DTYPES = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
)

SHAPE = (7, 5, 3)


def piece(dtype: str = "bfloat16", box: Box | None = None, *, name: str = "w", shape: tuple[int, ...] = SHAPE) -> Piece:
    return Piece(name, box or Box((0,) * len(shape), shape), shape, dtype)


def values(of: Piece, step: int = 0, *, seed: int = 1, checkpoint: Checkpoint | None = None) -> torch.Tensor:
    view = torch.zeros(of.box.extent, dtype=dtype_of(of.dtype))
    directory = None if checkpoint is None else str(checkpoint.directory)
    Weights(seed, directory).write(of, step, view, checkpoint)
    return view


def cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    return whole[tuple(slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True))]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(as_bits(a), as_bits(b))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    low = [draw(st.integers(0, size - 1)) for size in SHAPE]
    high = [draw(st.integers(start + 1, size)) for start, size in zip(low, SHAPE, strict=True)]
    return Box(tuple(low), tuple(b - a for a, b in zip(low, high, strict=True)))


@settings(max_examples=60)
@given(boxes(), st.sampled_from(DTYPES), st.integers(0, 3))
def test_a_box_alone_is_the_cut_of_the_whole(box: Box, dtype: str, step: int) -> None:
    assert same(values(piece(dtype, box), step), cut(values(piece(dtype), step), box))


def test_values_worked_out_block_by_block_are_those_worked_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = values(piece())
    monkeypatch.setattr("wavecast.runtime.demo._BLOCK", 30)
    assert same(values(piece()), whole)
    box = Box((2, 1, 0), (4, 3, 2))
    assert same(values(piece(box=box)), cut(whole, box))


def test_a_view_of_any_strides_is_filled_alike() -> None:
    view = torch.zeros(3, 5, 7, dtype=torch.bfloat16).permute(2, 1, 0)
    Weights(1).write(piece(), 0, view, None)
    assert same(view, values(piece()))


def test_scalars_and_empty_pieces_have_their_values_too() -> None:
    assert values(piece("float32", shape=())).dim() == 0
    assert float(values(piece("float32", shape=()))) != 0
    assert values(piece("float32", Box((2, 0, 0), (0, 5, 3)))).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_no_value_is_nan_or_infinite_and_hardly_any_is_another_again(dtype: str, step: int) -> None:
    found = values(piece(dtype, shape=(64, 33)), step)
    if found.dtype.is_floating_point:
        assert bool(found.double().isfinite().all())

    distinct = len(as_bits(found).unique())
    assert distinct == 64 if found.element_size() == 1 else distinct > 1900


def test_seed_step_name_and_place_all_make_other_values() -> None:
    shape = (50, 40)
    variants = [
        values(piece("float32", shape=shape, name=name), step, seed=seed)
        for name, step, seed in itertools.product(("w", "v"), (0, 1), (1, 2))
    ]
    for one, other in itertools.combinations(variants, 2):
        assert int((as_bits(one) == as_bits(other)).sum()) <= 2

    assert same(variants[0], values(piece("float32", shape=shape), 0, seed=1))


def test_values_are_the_same_in_every_process() -> None:
    """Trainers write them, engines know them: a change of the arithmetic would show nowhere else."""
    assert as_bits(values(piece("int32", shape=(4,)))).tolist() == [604449789, 846074470, 922139241, 1045033043]


def test_elements_of_a_shape_with_equal_rows_still_differ() -> None:
    found = values(piece("int64", shape=(40, 40)))
    assert len(found.unique()) == 1600


@pytest.mark.parametrize("dtype", DTYPES)
def test_differing_counts_the_elements_that_are_not_bit_for_bit_right(dtype: str) -> None:
    weights, of = Weights(3), piece(dtype)
    view = values(of, 2, seed=3)
    assert weights.differing(of, 2, view, None) == 0
    bits = as_bits(view)
    bits[0, 0, 0] ^= 1
    bits[6, 4, 2] ^= 1
    bits[3, 0, 1] ^= 1
    assert weights.differing(of, 2, view, None) == 3
    # As many as can be: a hundred and five elements, of which some may be equal by chance.
    assert weights.differing(of, 3, view, None) > 90


def test_zeros_of_the_other_sign_and_nan_are_differing() -> None:
    weights, of = Weights(1), piece("float32", shape=(3,))
    view = values(of)
    view[0] = -view[0]
    view[1] = float("nan")
    assert weights.differing(of, 0, view, None) == 2


def layout() -> Layout:
    return Layout(
        (
            piece("bfloat16", Box((2, 0, 0), (3, 5, 3))),
            piece("float32", name="scale", shape=()),
            piece("bfloat16", Box((0, 0, 0), (2, 5, 3))),
        )
    )


def test_an_actor_holds_what_its_layout_says() -> None:
    actor = DemoActor(layout(), Weights(1), "cpu")
    assert describe(actor.transfer_shards()) == layout()
    actor.fill(0)
    shards = actor.transfer_shards()
    assert isinstance(shards[0].view, torch.Tensor)
    assert same(shards[0].view, cut(values(piece()), Box((2, 0, 0), (3, 5, 3))))


def test_an_actor_tells_which_tensors_differ_and_by_how_many_elements() -> None:
    actor = DemoActor(layout(), Weights(1), "cpu")
    actor.fill(4)
    assert actor.differing(4) == {}
    first, scale, last = (shard.view for shard in actor.transfer_shards())
    assert isinstance(first, torch.Tensor)
    assert isinstance(scale, torch.Tensor)
    assert isinstance(last, torch.Tensor)
    as_bits(first)[0, 0, :2] ^= 1
    as_bits(last)[1, 4, 2] ^= 1
    assert actor.differing(4) == {"w": 3}
    as_bits(scale).fill_(0)
    assert actor.differing(4) == {"w": 3, "scale": 1}


def test_spoilt_weights_are_those_of_no_step() -> None:
    """All of them: a sync that left an element alone must show."""
    whole = Layout(tuple(piece(dtype, name=dtype) for dtype in DTYPES))
    actor = DemoActor(whole, Weights(1), "cpu")
    actor.spoil()
    for step in range(3):
        assert actor.differing(step) == dict.fromkeys(DTYPES, 105)


# On a checkpoint.


def write_checkpoint(folder: Path, dtype: str, data: torch.Tensor) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(dict(PRESETS["tiny-qwen2"])))
    save_file({"w": data.to(dtype_of(dtype))}, folder / "model.safetensors")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"])
def test_a_checkpoint_is_itself_at_first_and_then_changes_in_its_lowest_bits(tmp_path: Path, dtype: str) -> None:
    kind = dtype_of(dtype)
    limit = torch.finfo(kind).max
    ends = torch.tensor([limit, -limit, limit / 2, 0.0, -0.0] + [limit] * 7, dtype=torch.float64)
    data = torch.cat([torch.linspace(-2, 2, 93, dtype=torch.float64), ends]).view(SHAPE)
    with write_checkpoint(tmp_path, dtype, data) as checkpoint:
        stored = data.to(kind)
        assert same(values(piece(dtype), 0, checkpoint=checkpoint), stored)
        steps = [values(piece(dtype), step, checkpoint=checkpoint) for step in (1, 2)]
        for found in steps:
            assert bool(found.double().isfinite().all())
            assert 15 < int((as_bits(found) != as_bits(stored)).sum()) <= 105
            close = (found.double() - stored.double()).abs() <= stored.double().abs() * 0.26 + 2e-3
            assert bool(close.all())

        assert not same(*steps)
        box = Box((2, 1, 0), (4, 3, 2))
        assert same(values(piece(dtype, box), 2, checkpoint=checkpoint), cut(steps[1], box))


def test_actors_read_a_checkpoint_each_its_own_part(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "bfloat16", torch.arange(105.0).view(SHAPE)).close()
    actor = DemoActor(Layout((piece(box=Box((2, 0, 0), (3, 5, 3))),)), Weights(1, str(tmp_path)), "cpu")
    actor.fill(0)
    (shard,) = actor.transfer_shards()
    assert isinstance(shard.view, torch.Tensor)
    assert shard.view.flatten().tolist() == [float(value) for value in range(30, 75)]
    assert actor.differing(0) == {}
    assert actor.differing(1)["w"] > 20
