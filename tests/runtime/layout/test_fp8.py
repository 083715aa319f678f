"""Block-scaled FP8, held against a quantiser of numpy that knows e4m3 from its table of values alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import fp8, lora, vllm
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.layout.shard import Computed, Shard, describe
from wavecast.runtime.plan.reshard import plan_reshard

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{NAME}_scale_inv"

#: Every positive value of e4m3, by its bits: no infinities, one NaN.
TABLE = np.array(
    [
        (mantissa / 8 if exponent == 0 else 1 + mantissa / 8) * 2.0 ** (max(exponent, 1) - 7)
        for exponent in range(16)
        for mantissa in range(8)
    ][:127]
)


def nearest(values):
    """Return the bits of the e4m3 value nearest to each of ``values``, of two the one with the even bits."""
    magnitude = np.abs(values).astype(np.float64)
    above = np.clip(np.searchsorted(TABLE, magnitude), 1, 126)
    below = above - 1
    up, down = TABLE[above] - magnitude, magnitude - TABLE[below]
    bits = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (bits | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def reference(whole, block):
    """Return bits and scales of a float32 matrix, block after block."""
    rows, columns = whole.shape
    bits = np.zeros(whole.shape, np.uint8)
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            largest = np.float32(np.abs(whole[where]).max())
            scales[i, j] = largest / np.float32(448) if largest else np.float32(1)
            bits[where] = nearest(whole[where] / scales[i, j])

    return bits, scales


def randoms(seed, *shape, dtype=torch.bfloat16):
    """Return values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp2(torch.randint(-9, 9, shape, generator=generator))
    return values.to(dtype)


def part(tensor, rows, columns, name=NAME):
    return Shard(name, tensor[slice(*rows), slice(*columns)], (rows[0], columns[0]), tuple(tensor.shape))


def arrived(sources, shape, block=fp8.BLOCK):
    """Move the pair of weight and scales into one actor that holds both whole; return the bits and the scales."""
    weight = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(fp8.scale_shape(shape, block=block))
    whole = Shard(NAME, weight, (0, 0), tuple(shape))
    move(sources, [fp8.paired(whole, scale, block=block)])
    return weight.view(torch.uint8).numpy(), scale.numpy()


def check(sources, whole, block=fp8.BLOCK):
    bits, scales = arrived(sources, tuple(whole.shape), block)
    want_bits, want_scales = reference(whole.float().numpy(), block)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(bits, want_bits)


def test_the_reference_knows_every_value_of_the_format():
    bits = torch.arange(127, dtype=torch.uint8)
    np.testing.assert_array_equal(bits.view(torch.float8_e4m3fn).double().numpy(), TABLE)
    assert nearest(np.array([0.0, -0.0, 448.0, -448.0, 2.0**-10])).tolist() == [0, 128, 126, 254, 0]


@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (128, 128), (1, 1), (300, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_whole_matrix_is_quantised_as_the_reference_does(shape, dtype):
    whole = randoms(1, *shape, dtype=dtype)
    check([fp8.quantised([part(whole, (0, shape[0]), (0, shape[1]))])], whole)


def test_weight_times_scale_is_the_weight_to_within_the_formats_step():
    whole = randoms(1, 256, 256, dtype=torch.float32)
    bits, scales = arrived([fp8.quantised([part(whole, (0, 256), (0, 256))])], (256, 256))
    values = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    scale = np.kron(scales, np.ones((128, 128), np.float32))
    off = np.abs(values * scale - whole.numpy())
    assert (off <= np.maximum(np.abs(whole.numpy()) * 2**-4, scale * 2**-10) * 1.0001).all()


@st.composite
def on_the_grid(draw, size, block):
    inner = [edge for edge in range(block, size, block) if draw(st.booleans())]
    edges = [0, *inner, size]
    return list(itertools.pairwise(edges))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 17), st.integers(1, 17), st.integers(1, 5), st.integers(1, 5))
def test_any_cut_on_the_grid_gives_the_whole_matrix_quantised(data, rows, columns, height, width):
    whole, block = randoms(rows * 100 + columns, rows, columns), (height, width)
    sources = [
        fp8.quantised([part(whole, down, across)], block=block)
        for down in data.draw(on_the_grid(rows, height))
        for across in data.draw(on_the_grid(columns, width))
    ]
    check(sources, whole, block)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(2, 17), st.integers(1, 9), st.integers(2, 6))
def test_an_actor_with_all_shards_of_a_block_may_cut_it_anywhere(data, rows, columns, size):
    whole, block = randoms(rows * 100 + columns, rows, columns), (size, size)
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, rows - 1)))), rows]
    shards = [part(whole, down, (0, columns)) for down in itertools.pairwise(edges)]
    check([fp8.quantised(data.draw(st.permutations(shards)), block=block)], whole, block)


def test_a_destination_cut_off_the_grid_still_gets_its_part():
    whole = randoms(1, 256, 256)
    sources = [fp8.quantised([part(whole, (0, 256), (0, 256))])]
    target = torch.zeros(100, 200, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(2, 2)
    move(sources, [[Shard(NAME, target, (70, 50), (256, 256)), Shard(SCALE, scales, (0, 0), (2, 2))]])
    want, want_scales = reference(whole.float().numpy(), (128, 128))
    np.testing.assert_array_equal(scales.numpy(), want_scales)
    np.testing.assert_array_equal(target.view(torch.uint8).numpy(), want[70:170, 50:250])


def test_a_shard_cut_off_the_grid_is_refused_with_what_is_lacking():
    whole = randoms(1, 300, 256)
    for rows, lacking in (((0, 150), (150, 106)), ((150, 300), (128, 22))):
        with pytest.raises(LayoutError) as caught:
            fp8.quantised([part(whole, rows, (0, 256))])

        assert caught.value.tensor == NAME
        assert str(caught.value) == (
            f"shard of '{NAME}' at offset ({rows[0]}, 0) with extent (150, 256) is cut off the grid of 128 x 128 "
            f"blocks, and this actor lacks the rest of its blocks: first at offset ({lacking[0]}, 0) with extent "
            f"({lacking[1]}, 256)"
        )


def test_a_matrixs_last_blocks_may_be_short():
    whole = randoms(1, 300, 200)
    sources = [fp8.quantised([part(whole, rows, (0, 200))]) for rows in ((0, 128), (128, 300))]
    check(sources, whole)


def test_zeros_have_scale_one_and_tiny_blocks_do_not_divide_by_nothing():
    whole = torch.zeros(2, 4)
    whole[0, 2], whole[1, 3] = 1e-44, -3e-38
    sources = [fp8.quantised([part(whole, (0, 2), (0, 4))], block=(2, 2))]
    bits, scales = arrived(sources, (2, 4), (2, 2))
    assert scales.tolist() == [[1.0, torch.finfo(torch.float32).tiny]]
    values = torch.from_numpy(bits).view(torch.float8_e4m3fn).float()
    assert values[:, :2].tolist() == [[0, 0], [0, 0]]
    assert not values.isnan().any()
    assert values[1, 3] == -2.5


def test_nan_is_not_hidden():
    whole = torch.ones(2, 2)
    whole[0, 1] = float("nan")
    bits, scales = arrived([fp8.quantised([part(whole, (0, 2), (0, 2))], block=(2, 2))], (2, 2), (2, 2))
    assert np.isnan(scales).all()
    assert torch.from_numpy(bits).view(torch.float8_e4m3fn).float().isnan().all()


def test_large_matrices_are_quantised_band_by_band(monkeypatch):
    monkeypatch.setattr(fp8, "_BAND", 1)
    whole = randoms(1, 11, 7)
    check([fp8.quantised([part(whole, (0, 11), (0, 7))], block=(3, 2))], whole, (3, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_quantises_to_the_same_bits():
    whole = randoms(1, 1100, 700)
    results = []
    for device in ("cpu", "cuda"):
        held = whole.to(device)
        pair = fp8.quantised([part(held, (0, 1100), (0, 700))])
        assert all(shard.view.device.type == device for shard in pair)
        reads = [shard.view.read(Box((0, 0), shard.view.shape)).cpu() for shard in pair]
        results.append([reads[0].view(torch.uint8), reads[1]])

    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# How the pair stands beside the original.


def test_the_pair_takes_the_place_of_the_original_so_that_no_route_is_a_plain_cast():
    whole = randoms(1, 256, 128)
    shards = fp8.quantised([part(whole, (128, 256), (0, 128))])
    assert all(isinstance(shard.view, Computed) for shard in shards)
    layout = describe(shards)
    assert [(piece.tensor, piece.box, piece.global_shape, piece.dtype) for piece in layout.pieces] == [
        (NAME, Box((128, 0), (128, 128)), (256, 128), "float8_e4m3fn"),
        (SCALE, Box((1, 0), (1, 1)), (2, 1), "float32"),
    ]
    plan = plan_reshard([layout], [replace(layout, computed=())])
    assert [(route.tensor, route.dtype) for route in plan.routes] == [(NAME, "float8_e4m3fn"), (SCALE, "float32")]


def test_only_projections_are_quantised_unless_told_otherwise():
    names = {
        NAME: True,
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": True,
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": True,
        "model.layers.0.self_attn.q_proj.bias": False,
        "model.layers.0.mlp.gate.weight": False,
        "model.layers.0.mlp.shared_expert_gate.weight": False,
        "model.layers.0.input_layernorm.weight": False,
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
        "weight": False,
    }
    assert {name: fp8.is_linear_weight(name) for name in names} == names
    shards = [Shard(name, torch.ones(2, 2), (0, 0), (2, 2)) for name in names]
    assert [shard.name for shard in fp8.quantised(shards) if isinstance(shard.view, Computed)][::2] == list(names)[:3]
    assert fp8.quantised(shards, names=lambda name: False) == shards


@pytest.mark.parametrize("view", [torch.ones(3), torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(2, 2).int()])
def test_what_is_no_matrix_of_wide_floats_is_refused(view):
    with pytest.raises(LayoutError, match="is not a matrix to quantise"):
        fp8.quantised([Shard(NAME, view, (0,) * view.dim(), tuple(view.shape))])


def test_a_matrix_in_two_dtypes_on_one_actor_is_refused_in_any_order():
    whole = randoms(1, 256, 128, dtype=torch.float32)
    parts = [part(whole.bfloat16(), (0, 64), (0, 128)), part(whole, (64, 256), (0, 128))]
    for shards in (parts, parts[::-1]):
        with pytest.raises(LayoutError, match=f"this actor holds '{NAME}' both in torch") as caught:
            fp8.quantised(shards)

        assert "torch.bfloat16" in str(caught.value)
        assert "torch.float32" in str(caught.value)


def test_a_merged_adapter_is_quantised_after_it_is_added():
    base, a, b = randoms(1, 256, 128), randoms(2, 4, 128), randoms(3, 256, 4)
    shards = lora.merged([part(base, (0, 256), (0, 128))], [lora.adapter(NAME, a, b, scale=0.5)])
    whole = torch.empty(256, 128, dtype=torch.bfloat16)
    move([shards], [[Shard(NAME, whole, (0, 0), (256, 128))]])
    assert not torch.equal(whole, base)
    check([fp8.quantised(shards)], whole)


def test_a_destinations_pair_is_checked():
    weight = torch.zeros(128, 256, dtype=torch.float8_e4m3fn)
    shard = Shard(NAME, weight, (128, 0), (256, 256))
    pair = fp8.paired(shard, torch.zeros(1, 2))
    assert [(each.name, each.offset, each.global_shape) for each in pair] == [
        (NAME, (128, 0), (256, 256)),
        (SCALE, (1, 0), (2, 2)),
    ]
    for wrong in (fp8.paired, lambda shard, scale: fp8.paired(shard, scale.t())):
        off = shard if wrong is not fp8.paired else Shard(NAME, weight, (100, 0), (256, 256))
        with pytest.raises(LayoutError, match=r"is no run of whole blocks of \(128, 128\)"):
            wrong(off, torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float16),
        (torch.float8_e4m3fn, torch.float64),
        (torch.float8_e5m2, torch.float32),
        (torch.float32, torch.float32),
    ],
)
def test_a_pair_in_other_dtypes_is_refused_with_both(weight, scale):
    shard = Shard(NAME, torch.zeros(128, 128, dtype=weight), (0, 0), (128, 128))
    with pytest.raises(LayoutError) as caught:
        fp8.paired(shard, torch.zeros(1, 1, dtype=scale))

    assert str(caught.value) == (
        f"'{NAME}' is {weight} and its scales are {scale}: a pair is torch.float8_e4m3fn and torch.float32"
    )
    assert caught.value.tensor == NAME


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_cast_neither_way_though_numbers_of_their_kind_are(dtype):
    """In float16 the scale of a small block is zero, and so were the weight."""
    weight = Shard(NAME, torch.zeros(128, 128, dtype=torch.float8_e4m3fn), (0, 0), (128, 128))
    narrow, exact = (Shard(SCALE, torch.ones(1, 1, dtype=each), (0, 0), (1, 1)) for each in (dtype, torch.float32))
    for sent, taken in ((exact, narrow), (narrow, exact)):
        # A tensor placed as the scales are, which may be cast: the scales are not taken for it.
        norms = [Shard("norm", each.view, (0, 0), (1, 1)) for each in (sent, taken)]
        with pytest.raises(LayoutError, match="the scales of a weight in float8 are not cast") as caught:
            move([[norms[0], weight, sent]], [[norms[1], weight, taken]])

        assert caught.value.tensor == SCALE
        assert caught.value.actors == (0, 1)

    plain = Shard(NAME, torch.zeros(128, 128), (0, 0), (128, 128))
    move([[plain, exact]], [[plain, narrow]])


def stored():
    """Return a pair of memory of its own."""
    weight = torch.ones(128, 256).to(torch.float8_e4m3fn)
    return fp8.paired(Shard(NAME, weight, (0, 0), (128, 256)), torch.ones(1, 2))


@pytest.mark.parametrize(("sent", "taken"), [("ws", "w"), ("ws", "s"), ("w", "ws"), ("s", "ws")])
def test_half_of_a_pair_is_refused_whoever_lacks_the_other(sent, taken):
    weight, scale = stored()
    halves = {"w": weight, "s": scale}
    half, other = (NAME, SCALE) if "w" in (sent, taken) else (SCALE, NAME)
    with pytest.raises(LayoutError) as caught:
        move([[halves[each] for each in sent]], [[halves[each] for each in taken]], allow_missing=(NAME, SCALE))

    assert str(caught.value).startswith(f"{half!r} would be written on (1,) without {other!r}: ")
    assert caught.value.actors == (1,)


def test_of_several_engines_the_one_without_scales_is_named():
    weight, scale = stored()
    with pytest.raises(LayoutError) as caught:
        move([[weight, scale]], [[weight, scale], [weight]])

    assert caught.value.actors == (2,)
    # More scales than weights harm nobody.
    move([[weight, scale]], [[weight, scale], [scale]])


def test_a_quantised_weight_without_scales_by_that_name_anywhere_is_sent_alone():
    weight, _ = stored()
    move([[weight]], [[weight]])


def qwen3_moe():
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3_moe",
            "vocab_size": 48,
            "hidden_size": 16,
            "intermediate_size": 32,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    )


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_an_engine_of_vllms_make_gets_every_pair_it_holds(expert_parallel):
    config, block = qwen3_moe(), (4, 4)
    whole = {each.name: randoms(seed, *each.shape) for seed, each in enumerate(logical_tensors(config))}
    source = fp8.quantised([Shard(n, v, (0,) * v.dim(), tuple(v.shape)) for n, v in whole.items()], block=block)
    ranks = [vllm.EngineRank(tp_rank=rank, tp_size=2, expert_parallel=expert_parallel) for rank in range(2)]
    layouts = [vllm.layout(config, rank, fmt=vllm.EngineFormat(scale_block=block)) for rank in ranks]
    destinations = [
        [
            Shard(p.tensor, torch.zeros(p.box.extent, dtype=getattr(torch, p.dtype)), p.box.offset, p.global_shape)
            for p in layout.pieces
        ]
        for layout in layouts
    ]
    move([source], destinations)
    dtypes = {describe([shard]).pieces[0].tensor: shard.view.dtype for shard in source}
    for shard in (shard for shards in destinations for shard in shards):
        where = tuple(slice(a, a + n) for a, n in zip(shard.box.offset, shard.box.extent, strict=True))
        assert shard.view.dtype == dtypes[shard.name]
        name = shard.name.removesuffix(fp8.SCALE)
        if dtypes[name] == torch.bfloat16:
            assert torch.equal(shard.view, whole[name][where])
        else:
            bits, scales = reference(whole[name].float().numpy(), block)
            held = shard.view.numpy() if name != shard.name else shard.view.view(torch.uint8).numpy()
            np.testing.assert_array_equal(held, (scales if name != shard.name else bits)[where])
