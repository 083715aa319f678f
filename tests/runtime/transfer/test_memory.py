"""Local tensors found by boxes of logical ones."""

from __future__ import annotations

import pytest
import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, FixedShards, Shard
from wavecast.runtime.transfer.memory import Memory, as_bits, count_nan, dtype_of
from wavecast.runtime.transfer.program import Cut
from wavecast.runtime.transfer.snapshot import Snapshot

CPU = torch.device("cpu")


def computed(view: torch.Tensor) -> Computed:
    def read(box: Box) -> torch.Tensor:
        part = view
        for dim, (start, length) in enumerate(zip(box.offset, box.extent, strict=True)):
            part = part.narrow(dim, start, length)

        return part

    return Computed(tuple(view.shape), view.dtype, CPU, read)


def test_a_cut_is_a_view_of_the_shards_own_memory() -> None:
    whole = torch.arange(24.0).view(4, 6)
    memory = Memory([Shard("w", whole[:, 2:5], (10, 20), (100, 100))])
    found = memory.source(Cut("w", (11, 21), (2, 2), "float32"))
    assert found.tolist() == [[9, 10], [15, 16]]
    (target,) = memory.targets(Cut("w", (11, 21), (2, 2), "float32"))
    assert target.data_ptr() == found.data_ptr() == whole[1, 3].data_ptr()
    target.zero_()
    assert int((whole == 0).sum()) == 5


def test_a_scalar_has_a_cut_of_no_dims() -> None:
    value = torch.tensor(3.0)
    assert Memory([Shard("s", value, (), ())]).source(Cut("s", (), (), "float32")).item() == 3.0


def test_a_source_reads_the_first_shard_that_has_all_of_a_cut() -> None:
    memory = Memory(
        [
            Shard("w", torch.zeros(2), (0,), (9,)),
            Shard("w", torch.ones(6), (1,), (9,)),
            Shard("w", torch.full((9,), 2.0), (0,), (9,)),
        ]
    )
    assert memory.source(Cut("w", (1,), (3,), "float32")).tolist() == [1, 1, 1]
    assert memory.source(Cut("w", (0,), (2,), "float32")).tolist() == [0, 0]
    assert memory.source(Cut("w", (0,), (3,), "float32")).tolist() == [2, 2, 2]


def test_what_was_received_is_passed_on_from_where_it_was_written() -> None:
    """Not from another dtype's shard, nor from one that is only worked out, though they come first."""
    cut = Cut("w", (0,), (2,), "float32")
    held = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(3)]
    shards = [Shard("w", computed(torch.zeros(2)), (0,), (9,)), *(Shard("w", view, (0,), (9,)) for view in held)]
    memory = Memory(shards)
    assert memory.source(cut).data_ptr() not in {view.data_ptr() for view in held}
    assert [view.data_ptr() for view in memory.targets(cut)] == [held[1].data_ptr(), held[2].data_ptr()]
    assert memory.source(cut).data_ptr() == held[2].data_ptr()


def test_a_destination_is_written_wherever_it_holds_all_of_a_cut() -> None:
    memory = Memory([Shard("w", torch.zeros(size), (start,), (9,)) for start, size in ((0, 2), (1, 6), (0, 9))])
    assert [tuple(view.shape) for view in memory.targets(Cut("w", (1,), (1,), "float32"))] == [(1,), (1,), (1,)]
    assert len(memory.targets(Cut("w", (0,), (2,), "float32"))) == 2
    assert len(memory.targets(Cut("w", (0,), (9,), "float32"))) == 1


def test_a_computed_source_works_out_the_cut_when_asked() -> None:
    memory = Memory([Shard("w", computed(torch.arange(12).view(4, 3)), (5, 0), (9, 3))])
    assert memory.source(Cut("w", (6, 1), (2, 2), "int64")).tolist() == [[4, 5], [7, 8]]


def test_what_is_computed_or_of_another_dtype_cannot_be_written() -> None:
    cut = Cut("w", (0,), (2,), "float32")
    for view in (computed(torch.zeros(2)), torch.zeros(2, dtype=torch.bfloat16)):
        with pytest.raises(LayoutError, match="no shard of 'w' can take dtype float32") as caught:
            Memory([Shard("w", view, (0,), (2,))]).targets(cut)

        assert caught.value.tensor == "w"

    master = [Shard("w", torch.zeros(2, dtype=dtype), (0,), (2,)) for dtype in (torch.float64, torch.float32)]
    assert [view.dtype for view in Memory(master).targets(cut)] == [torch.float32]


@pytest.mark.parametrize(
    "cut",
    [Cut("v", (0,), (1,), "float32"), Cut("w", (3,), (3,), "float32"), Cut("w", (0,), (1,), "float32")],
    ids=["another name", "partly outside", "before"],
)
def test_a_cut_that_no_shard_has_is_named(cut: Cut) -> None:
    memory = Memory([Shard("w", torch.zeros(4), (1,), (9,))])
    for find in (memory.source, memory.targets):
        with pytest.raises(LayoutError, match=r"layout is not the one that was planned") as caught:
            find(cut)

        assert caught.value.tensor == cut.tensor


def test_shards_on_two_devices_are_refused() -> None:
    shards = [Shard("a", torch.zeros(1), (0,), (1,)), Shard("b", torch.zeros(1, device="meta"), (0,), (1,))]
    with pytest.raises(LayoutError, match="must be on one device, these are on cpu, meta"):
        Memory(shards)


def test_no_shards_at_all_are_in_host_memory() -> None:
    memory = Memory([])
    assert memory.device == CPU
    assert memory.signature == Memory([]).signature


def test_signatures_tell_layouts_apart_and_not_where_they_are_in_memory() -> None:
    def signature(**changes: object) -> tuple[object, ...]:
        values = {"name": "w", "view": torch.zeros(2, 3), "offset": (0, 0), "global_shape": (8, 8)} | changes
        return Memory([Shard(**values)]).signature  # type: ignore[arg-type]

    assert signature() == signature(view=torch.ones(3, 2).t())
    changed = [
        signature(name="v"),
        signature(view=torch.zeros(3, 2)),
        signature(view=torch.zeros(2, 3, dtype=torch.bfloat16)),
        signature(offset=(0, 1)),
        signature(global_shape=(8, 9)),
        signature(trainable=False),
    ]
    assert len({signature(), *changed}) == 7


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e5m2, torch.bfloat16, torch.float32, torch.complex64])
def test_bits_share_memory_and_strides(dtype: torch.dtype) -> None:
    view = torch.zeros(3, 4, dtype=dtype).t()
    bits = as_bits(view)
    assert not bits.dtype.is_floating_point
    assert (bits.data_ptr(), bits.stride(), bits.shape) == (view.data_ptr(), view.stride(), view.shape)


def test_sixteen_byte_elements_are_their_own_bits() -> None:
    view = torch.zeros(2, dtype=torch.complex128)
    assert as_bits(view) is view


def test_dtypes_are_found_by_name() -> None:
    assert dtype_of("bfloat16") is torch.bfloat16
    for name in ("float17", "Tensor", "nn"):
        with pytest.raises(LayoutError, match=name):
            dtype_of(name)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_nan_are_counted_by_tensor(dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, float("nan"), 0.0, float("nan")]).to(dtype)
    shards = [
        Shard("good", torch.ones(3).to(dtype), (0,), (3,)),
        Shard("bad", bad, (0,), (9,)),
        Shard("bad", bad[:2], (4,), (9,)),
        Shard("computed", computed(bad), (0,), (4,)),
    ]
    assert count_nan(shards) == (("bad", 3), ("computed", 2))


def test_infinities_and_integers_are_no_nan() -> None:
    shards = [
        Shard("i", torch.tensor([-1]), (0,), (1,)),
        Shard("f", torch.tensor([float("inf"), float("-inf")]), (0,), (2,)),
        Shard("e", torch.zeros(0), (0,), (2,)),
    ]
    assert count_nan(shards) == ()


def test_nan_in_complex_numbers_are_counted() -> None:
    view = torch.tensor([complex(0, float("nan")), 1j])
    assert count_nan([Shard("c", view, (0,), (2,))]) == (("c", 1),)


# What has not changed since the last time.


def a_memory() -> tuple[list[Shard], Memory]:
    shards = [
        Shard("w", torch.zeros(4, 4), (0, 0), (4, 4)),
        Shard("v", torch.zeros(6), (0,), (6,)),
        Shard("c", computed(torch.zeros(2)), (0,), (2,)),
    ]
    return shards, Memory(shards)


def test_the_same_shards_hold_still_also_in_another_list_and_with_other_elements() -> None:
    shards, memory = a_memory()
    assert memory.holds_still(shards)
    assert memory.holds_still(tuple(shards))
    assert isinstance(shards[0].view, torch.Tensor)
    shards[0].view.fill_(1)
    assert memory.holds_still(shards)


def test_other_objects_fewer_more_or_in_another_order_do_not_hold_still() -> None:
    shards, memory = a_memory()
    w, v, c = shards
    for others in (
        [w, v],
        [w, v, c, c],
        [],
        [v, w, c],
        [w, Shard("v", v.view, (0,), (6,)), c],
    ):
        assert not memory.holds_still(others)


def test_storage_that_moved_under_a_tensor_does_not_hold_still() -> None:
    shards, memory = a_memory()
    view = shards[0].view
    assert isinstance(view, torch.Tensor)
    before = view.data
    view.data = torch.zeros(4, 4)
    assert not memory.holds_still(shards)
    # Where it was all along.
    view.data = before
    assert memory.holds_still(shards)


def test_a_tensor_of_another_shape_does_not_hold_still() -> None:
    shards, memory = a_memory()
    view = shards[1].view
    assert isinstance(view, torch.Tensor)
    view.data = view.data[:5]
    assert view.data_ptr() == memory.addresses()[1]
    assert not memory.holds_still(shards)


def test_a_tensor_of_other_strides_does_not_hold_still() -> None:
    """A square weight turned to column order in place: what was worked out for its rows is wrong now."""
    shards, memory = a_memory()
    view = shards[0].view
    assert isinstance(view, torch.Tensor)
    view.data = view.data.t()
    assert not memory.holds_still(shards)


def test_a_tensor_of_another_dtype_does_not_hold_still() -> None:
    shards, memory = a_memory()
    view = shards[0].view
    assert isinstance(view, torch.Tensor)
    view.data = view.data.view(torch.int32)
    assert not memory.holds_still(shards)


def test_a_signature_tells_a_view_from_what_is_worked_out() -> None:
    """A layout says which tensors are computed, and what is computed must not be pulled."""
    view = torch.zeros(2, 3)
    plain = Memory([Shard("w", view, (0, 0), (2, 3))])
    worked = Memory([Shard("w", computed(view), (0, 0), (2, 3))])
    assert plain.signature != worked.signature


# Fixed ones.


def many(count: int = 64) -> FixedShards:
    return FixedShards(Shard(f"w{number}", torch.zeros(4), (0,), (4,)) for number in range(count))


def cut_of(number: int) -> Cut:
    return Cut(f"w{number}", (0,), (4,), "float32")


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each look was at."""
    found: list[int] = []
    look = Snapshot.is_in_place

    def counted(snapshot: Snapshot) -> bool:
        found.append(len(snapshot.views))
        return look(snapshot)

    monkeypatch.setattr(Snapshot, "is_in_place", counted)
    return found


def test_of_fixed_shards_a_few_are_looked_at(looked_at: list[int]) -> None:
    shards = many()
    fixed, plain = Memory(shards), Memory(list(shards))
    for memory in (fixed, plain):
        same = shards if memory is fixed else list(shards)
        watch = memory.watch(map(cut_of, range(64)))
        looked_at.clear()
        assert memory.holds_still(same)
        assert memory.seems_still(same)
        memory.require_still()
        memory.require_in_place()
        watch.require_still()
        watch.require_in_place()
        assert looked_at == ([16, 16, 16, 16, 1, 1] if memory is fixed else [64, 16, 64, 64, 64, 64])


def test_the_promise_is_that_of_one_object() -> None:
    shards = many()
    fixed, plain = Memory(shards), Memory(list(shards))
    assert not fixed.holds_still(FixedShards(shards))
    assert not fixed.seems_still(list(shards))
    assert not plain.seems_still(shards)
    assert plain.holds_still(list(shards))


@pytest.mark.parametrize("moved", [0, 4])
def test_a_fixed_tensor_that_moved_and_is_looked_at_is_named(moved: int) -> None:
    shards = many()
    memory = Memory(shards)
    watch = memory.watch([cut_of(moved)])
    shards[moved].view.data = torch.ones(4)
    assert not memory.holds_still(shards)
    for look in (memory.require_still, memory.require_in_place, watch.require_still, watch.require_in_place):
        with pytest.raises(LayoutError, match=f"'w{moved}' was changed during the sync"):
            look()


def test_of_each_part_one_fixed_tensor_is_looked_at_which_tells_of_all() -> None:
    shards = many()
    memory = Memory(shards)
    # None of those that are looked at before a sync.
    watch, seen = memory.watch([cut_of(5), cut_of(6)]), set[int]()
    shards[5].view.data = torch.ones(4)
    assert memory.holds_still(shards)
    with pytest.raises(LayoutError, match="'w5' was changed"):
        watch.require_still()

    memory.watch([cut_of(7), cut_of(8)], seen)
    assert seen == {7, 8}
