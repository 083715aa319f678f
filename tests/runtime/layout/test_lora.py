"""Merged adapters, held against float64 products of the whole matrices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.lora import Adapter, adapter, adapter_only, attached, merged
from wavecast.runtime.layout.shard import Computed, Shard, describe

NAME = "model.layers.0.self_attn.q_proj.weight"


def integers(seed, *shape, dtype=torch.bfloat16, high=8):
    """Return small whole numbers: sums of products of few of them are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, shape, generator=generator).to(dtype)


def whole(name, tensor):
    return Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))


def part(name, tensor, *spans):
    view = tensor[tuple(slice(*span) for span in spans)]
    return Shard(name, view, tuple(start for start, _ in spans), tuple(tensor.shape))


def expected(base, *products):
    """Return base plus every (a, b, scale), rounded once."""
    total = base.double()
    for a, b, scale in products:
        total += scale * (b.double() @ a.double())

    return total.float().to(base.dtype)


def arrived(sources, name, shape, dtype=torch.bfloat16):
    """Move ``name`` into one actor that holds it whole, and return it."""
    target = torch.full(shape, 99, dtype=dtype)
    move(sources, [[whole(name, target)]])
    return target


@st.composite
def cuts(draw, size):
    """Draw where a dim is cut: from nowhere to everywhere."""
    return [0, *sorted(draw(st.sets(st.sampled_from(range(1, size)))) if size > 1 else []), size]


def spans(points):
    return list(itertools.pairwise(points))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_any_cut_of_base_and_factors_gives_the_merged_matrix(data, rows, columns, rank, transposed):
    base = integers(1, *((columns, rows) if transposed else (rows, columns)))
    a, b = integers(2, rank, columns, dtype=torch.float32), integers(3, rows, rank, dtype=torch.float32)
    delta = (b.double() @ a.double()).t() if transposed else b.double() @ a.double()
    factors = adapter(
        NAME,
        [part("a", a, ranks, (0, columns)) for ranks in spans(data.draw(cuts(rank)))],
        [part("b", b, down, (0, rank)) for down in spans(data.draw(cuts(rows)))],
        scale=0.5,
        transposed=transposed,
    )
    sources = [
        merged([part(NAME, base, down, across)], [factors])
        for down in spans(data.draw(cuts(base.shape[0])))
        for across in spans(data.draw(cuts(base.shape[1])))
    ]
    got = arrived(sources, NAME, tuple(base.shape))
    assert torch.equal(got, (base.double() + 0.5 * delta).float().to(base.dtype))


def test_a_column_parallel_base_needs_its_rows_of_b_and_all_of_a():
    base, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    sources = [
        merged([part(NAME, base, rows, (0, 4))], [adapter(NAME, a, [part("b", b, rows, (0, 2))], scale=2.0)])
        for rows in ((0, 2), (2, 4), (4, 6))
    ]
    assert torch.equal(arrived(sources, NAME, (6, 4)), expected(base, (a, b, 2.0)))


def test_a_row_parallel_base_needs_its_columns_of_a_and_all_of_b():
    base, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    sources = [
        merged([part(NAME, base, (0, 6), across)], [adapter(NAME, [part("a", a, (0, 2), across)], b, scale=2.0)])
        for across in ((0, 3), (3, 4))
    ]
    assert torch.equal(arrived(sources, NAME, (6, 4)), expected(base, (a, b, 2.0)))


def test_the_base_is_never_written_to():
    base = integers(1, 6, 4)
    before = base.clone()
    shards = merged([whole(NAME, base)], [adapter(NAME, integers(2, 2, 4), integers(3, 6, 2), scale=1.0)])
    arrived([shards], NAME, (6, 4))
    assert torch.equal(base, before)
    assert not torch.equal(arrived([shards], NAME, (6, 4)), base)


def test_what_has_no_adapter_stays_a_view():
    norm = torch.ones(4)
    base = [whole(NAME, integers(1, 6, 4)), whole("model.norm.weight", norm)]
    shards = merged(base, [adapter(NAME, integers(2, 2, 4), integers(3, 6, 2), scale=1.0)])
    assert isinstance(shards[0].view, Computed)
    assert shards[1].view is norm
    assert describe(shards) == replace(describe(base), computed=(NAME,))


def test_adapters_add_up_and_are_rounded_once():
    # Each alone is less than half of bfloat16's step at one, both together are more.
    base, a, b = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1), torch.ones(1, 1)
    small = adapter(NAME, a, b, scale=0.75 * 2**-8)
    assert arrived([merged([whole(NAME, base)], [small])], NAME, (1, 1)).item() == 1.0
    assert arrived([merged([whole(NAME, base)], [small, small])], NAME, (1, 1)).item() == 1.0 + 2**-7


def test_random_weights_are_within_one_rounding_of_the_exact_sum():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(65, 130, generator=generator).to(torch.bfloat16)
    a, b = torch.randn(16, 130, generator=generator), torch.randn(65, 16, generator=generator)
    got = arrived([merged([whole(NAME, base)], [adapter(NAME, a, b, scale=2.0)])], NAME, (65, 130)).double()
    exact = base.double() + 2.0 * (b.double() @ a.double())
    assert ((got - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_how_a_matrix_is_cut_does_not_show_in_its_bits():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70, 90, generator=generator).to(torch.bfloat16)
    a, b = torch.randn(16, 90, generator=generator), torch.randn(70, 16, generator=generator)
    view = merged([whole(NAME, base)], [adapter(NAME, a, b, scale=0.3)])[0].view
    at_once = view.read(Box((0, 0), (70, 90)))
    for height, width in ((1, 1), (3, 7), (70, 1), (64, 90)):
        for row in range(0, 70, height):
            for column in range(0, 90, width):
                box = Box((row, column), (min(height, 70 - row), min(width, 90 - column)))
                assert torch.equal(view.read(box), at_once[row : row + height, column : column + width])


def test_large_boxes_are_merged_band_by_band(monkeypatch):
    monkeypatch.setattr("wavecast.runtime.layout.lora.merge._BAND", 7)
    base, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    shards = merged([whole(NAME, base)], [adapter(NAME, a, b, scale=1.0)])
    assert torch.equal(arrived([shards], NAME, (6, 4)), expected(base, (a, b, 1.0)))


def test_a_merged_base_can_take_more_adapters():
    base, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    factors = adapter(NAME, a, b, scale=1.0)
    shards = merged(merged([whole(NAME, base)], [factors]), [factors])
    assert torch.equal(arrived([shards], NAME, (6, 4)), expected(base, (a, b, 2.0)))


def test_a_destination_of_another_dtype_is_cast_after_merging():
    base, a, b = integers(1, 6, 4, dtype=torch.float32), integers(2, 2, 4), integers(3, 6, 2)
    got = arrived([merged([whole(NAME, base)], [adapter(NAME, a, b, scale=1.0)])], NAME, (6, 4))
    assert torch.equal(got, expected(base, (a, b, 1.0)).to(torch.bfloat16))


def test_an_adapter_without_a_base_is_an_error_unless_allowed():
    factors = adapter(NAME, integers(2, 2, 4), integers(3, 6, 2), scale=1.0)
    with pytest.raises(LayoutError, match=f"an adapter is on '{NAME}', of which no base shard was given") as caught:
        merged([], [factors])

    assert caught.value.tensor == NAME
    assert merged([], [factors], allow_unused=True) == []


def test_an_actor_that_lacks_a_part_is_told_which():
    base, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    factors = adapter(NAME, a, [part("b", b, (0, 3), (0, 2))], scale=1.0)
    with pytest.raises(LayoutError, match=r"lacks '.*q_proj\.lora_B\.weight' at offset \(3, 0\) with extent \(3, 2\)"):
        merged([whole(NAME, base)], [factors])

    assert merged([part(NAME, base, (0, 3), (0, 4))], [factors])
    with pytest.raises(LayoutError, match=r"lacks '.*q_proj\.lora_A\.weight' at offset \(1, 0\) with extent \(1, 4\)"):
        merged([whole(NAME, base)], [adapter(NAME, [part("a", a, (0, 1), (0, 4))], b, scale=1.0)])


def test_an_actor_without_any_part_is_told_so():
    base, a = integers(1, 6, 4), integers(2, 2, 4)
    with pytest.raises(LayoutError, match="this actor has no part of the adapter on"):
        merged([whole(NAME, base)], [adapter(NAME, [], [], scale=1.0)])

    with pytest.raises(LayoutError, match=r"lacks '.*q_proj\.lora_B\.weight' at offset \(0, 0\) with extent \(6, 2\)"):
        merged([whole(NAME, base)], [adapter(NAME, a, [], scale=1.0)])


def test_shapes_that_do_not_fit_are_refused():
    a, b = integers(2, 2, 4), integers(3, 6, 2)
    with pytest.raises(LayoutError, match=r"has the global shape \(6, 5\), which its adapter of A \[\(2, 4\)\]"):
        merged([whole(NAME, integers(1, 6, 5))], [adapter(NAME, a, b, scale=1.0)])

    with pytest.raises(LayoutError, match=r"disagree on the rank: \[2, 3\]"):
        adapter(NAME, a, integers(3, 6, 3), scale=1.0)

    with pytest.raises(LayoutError, match=r"lora_A\.weight' is not a matrix"):
        adapter(NAME, torch.ones(2), b, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_bases_are_refused(dtype):
    base = torch.zeros(6, 4).to(dtype)
    with pytest.raises(LayoutError, match="adapters are merged into floating point bases only"):
        merged([whole(NAME, base)], [adapter(NAME, integers(2, 2, 4), integers(3, 6, 2), scale=1.0)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_merges_to_the_same_bits_where_sums_are_exact():
    base, a, b = integers(1, 300, 200).cuda(), integers(2, 8, 200).cuda(), integers(3, 300, 8).cuda()
    view = merged([whole(NAME, base)], [adapter(NAME, a, b, scale=0.5)])[0].view
    assert view.device.type == "cuda"
    got = view.read(Box((100, 50), (200, 150)))
    assert torch.equal(got.cpu(), expected(base.cpu(), (a.cpu(), b.cpu(), 0.5))[100:, 50:])


# Adapters on a module's own fused weight.


def logical_name(module):
    return f"model.layers.0.self_attn.{module}.weight"


def fused(groups, heads, head_dim, columns):
    """Return a fused weight in which each group has its query heads, then a key head, then a value head; its shards."""
    each = (heads + 2) * head_dim
    weight = integers(1, groups * each, columns)
    shards = []
    for group in range(groups):
        row = group * each
        for module, count in (("q_proj", heads), ("k_proj", 1), ("v_proj", 1)):
            rows = count * head_dim
            shape = (groups * rows, columns)
            shards.append(Shard(logical_name(module), weight[row : row + rows], (group * rows, 0), shape))
            row += rows

    return weight, shards


def test_a_fused_weights_adapter_is_told_to_the_matrices_in_it():
    weight, shards = fused(groups=2, heads=3, head_dim=2, columns=5)
    a, b = integers(2, 2, 5), integers(3, weight.shape[0], 2)
    adapters = attached(shards, weight, a, b, scale=0.5)
    assert [each.name for each in adapters] == [logical_name(module) for module in ("q_proj", "k_proj", "v_proj")]
    sources = [merged(shards, adapters)]
    want = expected(weight, (a, b, 0.5)).unflatten(0, (2, 10))
    for module, rows in (("q_proj", slice(0, 6)), ("k_proj", slice(6, 8)), ("v_proj", slice(8, 10))):
        got = want[:, rows].flatten(0, 1)
        assert torch.equal(arrived(sources, logical_name(module), tuple(got.shape)), got)


def test_a_fused_adapter_can_be_sent_alone_as_that_of_each_matrix():
    weight, shards = fused(groups=2, heads=3, head_dim=2, columns=5)
    a, b = integers(2, 2, 5), integers(3, weight.shape[0], 2)
    sources = [adapter_only(attached(shards, weight, a, b, scale=0.5))]
    prefix = "base_model.model.model.layers.0.self_attn."
    assert [piece.tensor for piece in describe(sources[0]).pieces] == [
        f"{prefix}q_proj.lora_A.weight",
        f"{prefix}q_proj.lora_B.weight",
        f"{prefix}q_proj.lora_B.weight",
        f"{prefix}k_proj.lora_A.weight",
        f"{prefix}k_proj.lora_B.weight",
        f"{prefix}k_proj.lora_B.weight",
        f"{prefix}v_proj.lora_A.weight",
        f"{prefix}v_proj.lora_B.weight",
        f"{prefix}v_proj.lora_B.weight",
    ]
    assert torch.equal(arrived(sources, f"{prefix}k_proj.lora_A.weight", (2, 5)), a)
    got = b.unflatten(0, (2, 10))[:, :6].flatten(0, 1)
    assert torch.equal(arrived(sources, f"{prefix}q_proj.lora_B.weight", (12, 2)), got)


def test_a_row_parallel_weights_adapter_follows_its_own_columns():
    base, a, b = integers(1, 6, 8), integers(2, 2, 8), integers(3, 6, 2)
    sources = []
    for across in ((0, 5), (5, 8)):
        local = base[:, slice(*across)].contiguous()
        shards = [Shard(NAME, local, (0, across[0]), (6, 8))]
        sources.append(merged(shards, attached(shards, local, a[:, slice(*across)], b, scale=1.0)))

    assert torch.equal(arrived(sources, NAME, (6, 8)), expected(base, (a, b, 1.0)))


def test_evenly_spaced_rows_and_columns_are_found():
    weight, a, b = integers(1, 8, 6), integers(2, 2, 6), integers(3, 8, 2)
    shards = [whole(NAME, weight[1::2, 2::3])]
    adapters = attached(shards, weight, a, b, scale=1.0)
    want = expected(weight, (a, b, 1.0))[1::2, 2::3]
    assert torch.equal(arrived([merged(shards, adapters)], NAME, (4, 2)), want)


def test_views_of_other_weights_are_passed_over():
    buffer = integers(1, 10, 4)
    shards = [whole("other", buffer[:4]), whole(NAME, buffer[4:]), whole("far", integers(5, 6, 4))]
    adapters = attached(shards, buffer[4:], integers(2, 2, 4), integers(3, 6, 2), scale=1.0)
    assert [each.name for each in adapters] == [NAME]
    with pytest.raises(LayoutError, match=r"no base shard is a view of the adapted weight of \(6, 4\)"):
        attached(shards[2:], buffer[4:], integers(2, 2, 4), integers(3, 6, 2), scale=1.0)


def test_views_that_rows_and_columns_cannot_say_are_refused():
    weight, a, b = integers(1, 6, 4), integers(2, 2, 4), integers(3, 6, 2)
    for view in (weight.t(), weight.view(3, 8), weight.view(-1), weight.view(torch.int16)):
        with pytest.raises(LayoutError, match="does not take evenly spaced rows and columns"):
            attached([whole(NAME, view)], weight, a, b, scale=1.0)


def test_factors_that_do_not_make_the_weight_are_refused():
    with pytest.raises(LayoutError, match=r"A of \(2, 5\) and B of \(6, 2\) do not make a weight of \(6, 4\)"):
        attached([], integers(1, 6, 4), integers(2, 2, 5), integers(3, 6, 2), scale=1.0)


def test_an_adapter_of_a_transposed_base_is_kept_as_it_is():
    made = adapter(NAME, integers(2, 2, 4), integers(3, 6, 2), scale=1.0, transposed=True)
    assert isinstance(made, Adapter)
    assert [shard.box for shard in (*made.a, *made.b)] == [Box((0, 0), (2, 4)), Box((0, 0), (6, 2))]


def test_a_frozen_base_with_an_adapter_in_training_is_trainable():
    base = [
        Shard(name, integers(seed, 6, 4), (0, 0), (6, 4), trainable=False) for seed, name in enumerate([NAME, "other"])
    ]
    a, b = integers(2, 2, 4), integers(3, 6, 2)
    found = merged(base, [adapter(NAME, a, b, scale=1.0)])
    assert [shard.trainable for shard in found] == [True, False]
    assert describe(found).frozen == ("other",)
    still = [torch.nn.Parameter(factor, requires_grad=False) for factor in (a, b)]
    assert describe(merged(base, [adapter(NAME, *still, scale=1.0)])).frozen == (NAME, "other")
