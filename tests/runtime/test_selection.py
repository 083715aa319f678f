"""What ``only=`` picks, what is refused of it, and what no cast may do on the way."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.local_actors import local
from tests.runtime.local_groups import held, sync
from wavecast.runtime import ConfigError, LayoutError, Shard, SyncOptions
from wavecast.runtime.layout import fp8
from wavecast.runtime.layout.shard import Computed
from wavecast.runtime.layout.vllm_format import EngineFormat, EngineRank
from wavecast.runtime.selection import Only

__all__ = ("local",)

pytestmark = pytest.mark.usefixtures("local")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHT = "q_proj.weight"
SCALE = WEIGHT + fp8.SCALE


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, list[Shard]]:
    weight, scale = torch.zeros(256, 256, dtype=torch.float8_e4m3fn), torch.ones(2, 2).to(dtype)
    return weight, scale, [held(WEIGHT, weight), held(SCALE, scale)]


def restored(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.float() * scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)


class Scaled(torch.Tensor):
    """A quantised tensor's subclass: what it shows is not what its memory holds."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        plain = [each.inner.float() if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass that is plain memory."""


def test_compressed_rows_are_refused_too() -> None:
    with pytest.warns(UserWarning, match="Sparse CSR"):
        view = torch.eye(4).to_sparse_csr()

    with pytest.raises(LayoutError, match=r"of layout torch\.sparse_csr, not strided"):
        sync([[held("w", view)]], [[held("w", torch.zeros(4, 4))]])


def test_a_subclass_of_plain_memory_is_sent() -> None:
    arrived = torch.zeros(4)
    sync([[held("w", torch.arange(4.0).as_subclass(Named))]], [[held("w", arrived.as_subclass(Named))]])
    assert arrived.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("picked", [EMBED, HEAD])
def test_a_predicate_is_asked_about_aliases_too(picked: str) -> None:
    embed, head = torch.zeros(4), torch.zeros(4)
    sync(
        [[held(EMBED, torch.ones(4))]],
        [[held(EMBED, embed), held(HEAD, head)]],
        options=SyncOptions(aliases=[(EMBED, HEAD)]),
        only=lambda name: name == picked,
    )
    assert (embed.tolist(), head.tolist()) == ([1] * 4, [1] * 4)


@pytest.mark.parametrize("picked", [{WEIGHT}, {SCALE}, lambda name: name == WEIGHT], ids=["weight", "scale", "asked"])
def test_a_weight_and_its_scales_are_picked_together(picked: Only) -> None:
    weight, scale, engine = pair()
    original = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    report = sync([fp8.quantised([held(WEIGHT, original)])], [engine], only=picked)
    assert report.tensors == 2
    torch.testing.assert_close(restored(weight, scale), original, atol=0.02, rtol=0.0625)


@pytest.mark.parametrize("only", [None, {WEIGHT}], ids=["all", "picked"])
def test_a_weight_is_not_written_without_its_scales(only: Only) -> None:
    weight, _, engine = pair()
    source = fp8.quantised([held(WEIGHT, torch.randn(256, 256))])
    with pytest.raises(LayoutError, match=f"'{WEIGHT}' would be written on .* without '{SCALE}'"):
        sync([source], [engine[:1]], only=only)

    with pytest.raises(LayoutError, match="which allow_missing lets pass"):
        sync([source[:1]], [engine], options=SyncOptions(allow_missing=[SCALE]), only=only)

    assert not weight.float().any()


def test_a_plain_source_is_told_to_quantise_though_scales_may_be_missing() -> None:
    _, _, engine = pair()
    with pytest.raises(LayoutError, match=r"quantise at the source, by fp8\.quantised"):
        sync([[held(WEIGHT, torch.ones(256, 256))]], [engine], options=SyncOptions(allow_missing=[SCALE]))


def test_scales_are_not_rounded_to_powers_of_two_on_the_way() -> None:
    _, scale, engine = pair(torch.float8_e8m0fnu)
    with pytest.raises(LayoutError, match=r"float32 .* float8_e8m0fnu .*: the scales .* are not cast"):
        sync([fp8.quantised([held(WEIGHT, torch.ones(256, 256))])], [engine])

    assert scale.float().unique().tolist() == [1]


def test_scales_that_are_powers_of_two_divide_the_weights_by_themselves() -> None:
    weight, scale, engine = pair()
    original = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    original[:128, :128] = 0
    original[:128, 128:] *= 448 / original[:128, 128:].abs().max()
    sync([fp8.quantised([held(WEIGHT, original)], power_of_two=True)], [engine])
    mantissa, _ = torch.frexp(scale)
    assert mantissa.unique().tolist() == [0.5]
    assert scale[0].tolist() == [1, 1]
    assert bool((weight.float().abs() <= 448).all())
    torch.testing.assert_close(restored(weight, scale), original, atol=0.02, rtol=0.0625)


def test_a_plain_cast_to_float8_is_refused_with_advice() -> None:
    weight = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(LayoutError, match=r"quantise at the source, by fp8\.quantised"):
        sync([[held("w", torch.full((4, 4), 1000.0))]], [[held("w", weight)]])


@pytest.mark.parametrize("exact_first", [True, False])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64, torch.bfloat16])
def test_sources_of_several_dtypes_send_what_is_nearest_to_the_destinations(
    wanted: torch.dtype, exact_first: bool
) -> None:
    exact = torch.full((512, 64), 1.001)
    memory = torch.zeros(512, 64, dtype=wanted)
    sources = [[held("w", exact)], [held("w", exact.bfloat16())]]
    sync(sources if exact_first else sources[::-1], [[held("w", memory)]])
    rounded = exact.bfloat16() if wanted == torch.bfloat16 else exact
    assert torch.equal(memory, rounded.to(wanted))


@pytest.mark.parametrize("edge", [8, 10])
def test_where_boxes_of_two_dtypes_overlap_in_part_every_exact_element_is_sent(edge: int) -> None:
    whole, arrived = torch.full((16, 4), 1.001), torch.zeros(16, 4)
    rounded = Shard("w", whole[:edge].bfloat16(), (0, 0), (16, 4))
    sync([[rounded], [Shard("w", whole[4:].clone(), (4, 0), (16, 4))]], [[held("w", arrived)]])
    assert torch.equal(arrived[4:], whole[4:])
    assert torch.equal(arrived[:4], whole[:4].bfloat16().float())


def test_the_report_names_what_was_left_out_whatever_left_it() -> None:
    def engine() -> list[Shard]:
        return [held("a", torch.zeros(4)), held("b", torch.zeros(4)), held("c", torch.zeros(4))]

    source = [held("a", torch.ones(4)), held("b", torch.ones(4))]
    options = SyncOptions(allow_missing=["c"])
    whole = sync([[*source, held("c", torch.ones(4))]], [engine()], only=lambda name: True)
    assert (whole.partial, whole.left_out) == (False, ())
    allowed = sync([source], [engine()], options=options)
    assert (allowed.partial, allowed.left_out) == (True, ("c",))
    picked = sync([source], [engine()], options=options, only={"b"})
    assert (picked.partial, picked.left_out) == (True, ("a", "c"))


@pytest.mark.parametrize("case", ["names", "allow_missing", "nothing held"])
def test_a_sync_that_would_send_a_replica_nothing_is_refused(case: str) -> None:
    with pytest.raises(LayoutError, match="nothing would be sent to replica 0") as caught:
        sync(
            [[held("w", torch.ones(4))]],
            [[] if case == "nothing held" else [held("x" if case == "allow_missing" else "w", torch.zeros(4))]],
            options=SyncOptions(allow_missing=["x"]),
            destination_names=(lambda name: None) if case == "names" else None,
        )

    assert caught.value.actors == (1,)


@pytest.mark.parametrize(
    ("found", "given"),
    [
        (torch.ones(1), r"\(1,\) in torch.float32"),
        (torch.ones(4, dtype=torch.float64), r"\(4,\) in torch.float64"),
        (None, "NoneType"),
    ],
)
def test_a_computed_view_that_returns_something_else_is_refused(found: object, given: str) -> None:
    computed = Computed((4,), torch.float32, torch.device("cpu"), lambda box: found)  # type: ignore[arg-type, return-value]
    with pytest.raises(LayoutError, match=f"'w' returned {given} where"):
        sync([[Shard("w", computed, (0,), (4,))]], [[held("w", torch.zeros(4))]])


def test_a_computed_shard_at_a_destination_is_refused_before_anything_is_written() -> None:
    memory = torch.zeros(4)
    computed = Computed((4,), torch.float32, torch.device("cpu"), lambda box: torch.ones(box.extent))
    engine = [held("a", memory), Shard("b", computed, (0,), (4,))]
    sources = [[held("a", torch.ones(4)), held("b", torch.ones(4))]]
    with pytest.raises(LayoutError, match="'b' is computed at a destination: it can be read only") as caught:
        sync(sources, [engine])

    assert caught.value.phase == "plan"
    assert memory.tolist() == [0] * 4
    sync(sources, [engine], only={"a"})
    assert memory.tolist() == [1] * 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"expert_placement": "round-robin"},
        {"vocab_padding": 0},
        {"vocab_padding": 1.5},
        {"scale_block": (0, 128)},
        {"scale_block": (128,)},
        {"pp_layers": (2, -1)},
        {"pp_layers": 3},
        {"pp_layers": (True, 1)},
        {"pp_layers": "12"},
        {"expert_slots": 3},
        {"expert_slots": (3,)},
        {"expert_slots": ((0, "x"),)},
        {"expert_slots": ((0, True),)},
        {"gate_first": "no"},
        {"gate_first": 0},
        {"whole_shared_experts": "x"},
        {"vocab_padding": True},
    ],
)
def test_a_format_that_no_engine_has_is_a_config_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineFormat(**wrong)  # type: ignore[arg-type]


def test_lists_are_taken_as_tuples() -> None:
    fmt = EngineFormat(pp_layers=[1, 2], expert_slots=[[0, 1], [2]], scale_block=[8, 8])  # type: ignore[arg-type]
    assert fmt == EngineFormat(pp_layers=(1, 2), expert_slots=((0, 1), (2,)), scale_block=(8, 8))
    assert (fmt.pp_layers, fmt.expert_slots, fmt.scale_block) == ((1, 2), ((0, 1), (2,)), (8, 8))


def test_a_rank_that_is_expert_parallel_in_a_way_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="expert_parallel='yes' must be True or False"):
        EngineRank(expert_parallel="yes")  # type: ignore[arg-type]


def test_a_rank_of_another_type_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="tp_size='2'"):
        EngineRank(0, "2")  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [(0, 1), (128,), (1.5, 2)])
def test_a_block_of_no_size_is_a_config_error(block: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="block="):
        fp8.quantised([held(WEIGHT, torch.ones(4, 4))], block=block)


@pytest.mark.parametrize("only", [3, {3}, lambda name: 1 / 0], ids=["number", "numbers", "raises"])
def test_a_selection_that_is_none_is_a_config_error(only: Only) -> None:
    with pytest.raises(ConfigError, match="only="):
        sync([[held("w", torch.ones(4))]], [[held("w", torch.zeros(4))]], only=only)


def test_a_name_map_that_raises_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="names= raised KeyError for 'w'"):
        sync([[held("w", torch.ones(4))]], [[held("w", torch.zeros(4))]], source_names=lambda name: {}[name])


def test_a_name_map_that_gives_a_number_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="names="):
        sync([[held("w", torch.ones(4))]], [[held("w", torch.zeros(4))]], source_names=lambda name: 3)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("view", "why"),
    [
        (torch.zeros(4, device="meta"), "meta device"),
        (torch.zeros(1).expand(4), "expanded"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "conjugated"),
        (torch.eye(4).to_sparse(), "of layout torch.sparse_coo, not strided"),
        (Scaled(torch.ones(4, dtype=torch.int8)), "is a Scaled, which wraps other tensors"),
    ],
)
def test_a_view_without_plain_memory_is_refused(view: torch.Tensor, why: str) -> None:
    with pytest.raises(LayoutError, match=f"the view of 'w' .*{why}"):
        sync([[held("w", torch.zeros(4, dtype=view.dtype))]], [[held("w", view)]])


@pytest.mark.parametrize(
    ("name", "view", "offset", "why"),
    [
        (3, torch.ones(3), (0,), "name is 3"),
        ("w", "tensor", (0,), "type str"),
        ("w", torch.ones(3), (0.5,), "must be integers"),
        ("w", torch.ones(3), 0, "must be integers"),
    ],
)
def test_a_shard_of_other_types_is_a_layout_error(name: str, view: torch.Tensor, offset: tuple[int], why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        Shard(name, view, offset, (4,))
