"""Buckets, and programs: what each actor does, in which order, and how many bytes it takes to say so."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import build_tasks
from wavecast.runtime.transfer import program as program_module
from wavecast.runtime.transfer.program import (
    ALIGNMENT,
    Bucket,
    Cut,
    Program,
    Step,
    compile_programs,
    fill_buckets,
    pack_programs,
)
from wavecast.scheduler import Schedule, Task, Wave, plan_waves

Place = tuple[str, tuple[int, ...], tuple[int, ...], int]


def places(buckets: Sequence[Bucket]) -> list[list[Place]]:
    """What lies where, bucket by bucket: tensor, offset, extent, first byte."""
    return [
        [(item.cut.tensor, item.cut.offset, item.cut.extent, item.start) for item in bucket.items] for bucket in buckets
    ]


def test_each_cut_starts_at_a_multiple_of_sixteen_and_the_bucket_counts_the_padding() -> None:
    cuts = [
        Cut("a", (0,), (3,), "uint8"),
        Cut("b", (0, 0), (3, 3), "bfloat16"),
        Cut("c", (), (), "float32"),
        Cut("d", (4,), (2,), "float64"),
    ]
    (bucket,) = fill_buckets(cuts, bucket_bytes=1024)
    assert [item.start for item in bucket.items] == [0, 16, 48, 64]
    assert bucket.nbytes == 80
    assert [item.cut for item in bucket.items] == cuts


def test_cuts_that_fill_a_bucket_to_its_edge_share_it() -> None:
    cuts = [Cut("a", (0,), (32,), "uint8"), Cut("b", (0,), (17,), "uint8")]
    assert places(fill_buckets(cuts, bucket_bytes=64)) == [[("a", (0,), (32,), 0), ("b", (0,), (17,), 32)]]
    assert places(fill_buckets(cuts, bucket_bytes=48)) == [[("a", (0,), (32,), 0)], [("b", (0,), (17,), 0)]]


def test_padding_never_leads_over_the_edge_of_an_odd_bucket() -> None:
    cuts = [Cut("a", (0,), (32,), "uint8"), Cut("b", (0,), (17,), "uint8")]
    assert [bucket.nbytes for bucket in fill_buckets(cuts, bucket_bytes=50)] == [32, 32]


def test_a_cut_as_large_as_a_bucket_stays_whole() -> None:
    assert places(fill_buckets([Cut("a", (5, 0), (4, 8), "bfloat16")], bucket_bytes=64)) == [[("a", (5, 0), (4, 8), 0)]]


def test_a_cut_larger_than_a_bucket_is_cut_between_rows() -> None:
    """Rows of 24 bytes, buckets of 64: two rows each, and one is left."""
    assert places(fill_buckets([Cut("a", (10, 20), (5, 6), "int32")], bucket_bytes=64)) == [
        [("a", (10, 20), (2, 6), 0)],
        [("a", (12, 20), (2, 6), 0)],
        [("a", (14, 20), (1, 6), 0)],
    ]


def test_a_row_larger_than_a_bucket_is_cut_itself() -> None:
    """Rows of 2 x 20 x 2 bytes, buckets of 32: 16 elements, and the 4 that are left share the next one's bucket."""
    assert places(fill_buckets([Cut("a", (7, 0, 0), (1, 2, 20), "bfloat16")], bucket_bytes=32)) == [
        [("a", (7, 0, 0), (1, 1, 16), 0)],
        [("a", (7, 0, 16), (1, 1, 4), 0)],
        [("a", (7, 1, 0), (1, 1, 16), 0)],
        [("a", (7, 1, 16), (1, 1, 4), 0)],
    ]


def test_what_does_not_fit_fills_the_bucket_up_unless_little_would_go_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 32 bytes: 96 of the first bucket are taken, and two more rows fit in."""
    cuts = [Cut("a", (0, 0), (3, 8), "float32"), Cut("b", (4, 0), (6, 8), "float32")]
    whole = [[("a", (0, 0), (3, 8), 0)], [("b", (4, 0), (5, 8), 0)], [("b", (9, 0), (1, 8), 0)]]
    assert places(fill_buckets(cuts, bucket_bytes=160)) == whole
    monkeypatch.setattr(program_module, "_LEAST_PIECE_NBYTES", 64)
    filled = [[("a", (0, 0), (3, 8), 0), ("b", (4, 0), (2, 8), 96)], [("b", (6, 0), (4, 8), 0)]]
    assert places(fill_buckets(cuts, bucket_bytes=160)) == filled
    monkeypatch.setattr(program_module, "_LEAST_PIECE_NBYTES", 65)
    assert places(fill_buckets(cuts, bucket_bytes=160)) == whole


def test_of_many_buckets_the_first_and_the_last_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_LEAST_PIECE_NBYTES", 16)

    def sizes(nbytes: int) -> list[int]:
        return [bucket.nbytes for bucket in fill_buckets([Cut("a", (0,), (nbytes,), "uint8")], bucket_bytes=480)]

    assert sizes(4 * 480) == [480, 480, 480, 480]
    # 160 at both ends, and what is left of 2,000 in four that are alike.
    assert sizes(2000) == [160, 432, 432, 432, 432, 112]
    assert sizes(160 + 10 * 480 + 160) == [160, *[480] * 10, 160]
    # A third of a bucket that is less than what is worth a piece: all alike.
    monkeypatch.setattr(program_module, "_LEAST_PIECE_NBYTES", 161)
    assert sizes(2000) == [480, 480, 480, 480, 80]


def test_empty_cuts_take_no_bucket() -> None:
    assert fill_buckets([Cut("a", (0, 3), (4, 0), "float32")], bucket_bytes=64) == ()
    assert fill_buckets([], bucket_bytes=64) == ()


def test_a_bucket_too_small_for_an_element_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes is 15, it must be at least 16"):
        fill_buckets([Cut("a", (0,), (4,), "uint8")], bucket_bytes=15)


dtypes = st.sampled_from(["uint8", "bool", "bfloat16", "float8_e4m3fn", "int16", "float32", "int64", "complex128"])
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
a_cut = st.builds(
    lambda shape, starts, dtype: Cut("t", tuple(starts[: len(shape)]), shape, dtype),
    shapes,
    st.lists(st.integers(0, 50), min_size=4, max_size=4),
    dtypes,
)


def elements(cut: Cut) -> list[tuple[int, ...]]:
    """The indices of a cut in row-major order, worked out one by one."""
    found: list[tuple[int, ...]] = []
    for number in range(prod(cut.extent)):
        index: list[int] = []
        rest = number
        for start, size in zip(reversed(cut.offset), reversed(cut.extent), strict=True):
            rest, place = divmod(rest, size)
            index.append(start + place)

        found.append(tuple(reversed(index)))

    return found


@given(st.lists(a_cut, max_size=8), st.integers(16, 400), st.sampled_from([1 << 20, 1, 16, 48]))
def test_buckets_hold_every_element_once_in_order_without_overlap_and_within_their_size(
    cuts: list[Cut], bucket_bytes: int, least_piece: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program_module, "_LEAST_PIECE_NBYTES", least_piece)
        check_buckets(cuts, bucket_bytes)


def check_buckets(cuts: list[Cut], bucket_bytes: int) -> None:
    buckets = fill_buckets(cuts, bucket_bytes=bucket_bytes)
    laid = [item.cut for bucket in buckets for item in bucket.items]
    assert [(cut.dtype, index) for cut in laid for index in elements(cut)] == [
        (cut.dtype, index) for cut in cuts for index in elements(cut)
    ]
    for bucket in buckets:
        end = 0
        for item in bucket.items:
            assert item.start % ALIGNMENT == 0
            assert end <= item.start < end + ALIGNMENT
            end = item.start + prod(item.cut.extent) * itemsize(item.cut.dtype)

        assert end <= bucket.nbytes <= bucket_bytes
        assert bucket.nbytes % ALIGNMENT == 0

    # A receiver that was sent the same program finds the same buckets.
    assert fill_buckets(pickle.loads(pickle.dumps(cuts)), bucket_bytes=bucket_bytes) == buckets


def route(sender: int, *receivers: int, start: int = 0) -> Route:
    return Route(sender, receivers, "w", (start,), (8,), "float32", 32)


def task(id: int, sender: int, *receivers: int) -> Task:
    return Task(id, (sender,), receivers, 32, payload=(route(sender, *receivers, start=8 * id),))


def test_programs_list_each_actors_own_steps_in_wave_order() -> None:
    """Ids run against the waves on purpose: the order is that of the waves."""
    schedule = Schedule((Wave((task(3, 0, 2), task(1, 1, 3))), Wave((task(0, 0, 3), task(2, 1, 2))), Wave(())))
    programs = compile_programs(schedule, actors=5, digest="d", bucket_bytes=64, checksum=True)
    assert [[step.task for step in program.steps] for program in programs] == [[3, 0], [1, 2], [3, 2], [1, 0], []]
    assert [program.actor for program in programs] == [0, 1, 2, 3, 4]
    assert all((program.digest, program.bucket_bytes, program.checksum) == ("d", 64, True) for program in programs)
    assert programs[0].steps[0] == Step(3, 0, (2,), (Cut("w", (24,), (8,), "float32"),))


def test_all_members_of_a_broadcast_and_a_relay_hold_equal_steps() -> None:
    first, second = task(0, 0, 1, 2), task(1, 2, 3, 4)
    schedule = Schedule((Wave((first,)), Wave((second,))))
    programs = compile_programs(schedule, actors=5, digest="d", bucket_bytes=64, checksum=False)
    assert programs[0].steps == programs[1].steps == programs[2].steps[:1]
    assert programs[2].steps[1:] == programs[3].steps == programs[4].steps
    assert programs[2].steps[1].sender == 2


def test_a_task_without_routes_is_no_program() -> None:
    with pytest.raises(TypeError, match="task 7 carries no routes"):
        compile_programs(
            Schedule((Wave((Task(7, (0,), (1,), 8),)),)), actors=2, digest="", bucket_bytes=64, checksum=True
        )


def test_a_planned_program_has_every_byte_of_its_actor() -> None:
    """3 rows of sources to 2 of destinations: 6 rows of 5 float32."""

    def side(parts: int) -> list[Layout]:
        size = 6 // parts
        return [Layout((Piece("w", Box((size * i, 0), (size, 5)), (6, 5), "float32"),)) for i in range(parts)]

    schedule = plan_waves(build_tasks(plan_reshard(side(3), side(2))))
    programs = compile_programs(schedule, actors=5, digest="d", bucket_bytes=64, checksum=True)
    moved = [sum(cut.nbytes for step in program.steps for cut in step.cuts) for program in programs]
    assert moved == [40, 40, 40, 60, 60]


def wide_program(cuts: int) -> Program:
    """A program as a mixture of experts makes it: three tensors an expert, each name of its own, few shapes."""
    matrices = [("gate_proj", (192, 4096)), ("up_proj", (192, 4096)), ("down_proj", (4096, 192))]
    own = tuple(
        Cut(f"model.layers.{i // 384}.mlp.experts.{i // 3 % 128}.{name}.weight", (0, 0), shape, "bfloat16")
        for i in range(cuts)
        for name, shape in [matrices[i % 3]]
    )
    steps = tuple(Step(i, 0, (i + 1,), own[100 * i : 100 * i + 100]) for i in range(cuts // 100))
    return Program("0" * 64, 0, 1 << 29, True, False, steps)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_program_survives_pickling(protocol: int) -> None:
    program = wide_program(600)
    again = pickle.loads(pickle.dumps(program, protocol))
    assert again == program
    assert type(again.steps[0].cuts[0]) is Cut


def test_a_program_of_ten_thousand_cuts_takes_less_than_a_hundred_bytes_a_cut() -> None:
    program = wide_program(10_000)
    assert len(pickle.dumps(program)) < 100 * 10_000
    (packed,) = pack_programs([program])
    assert sum(len(step) for step in packed.steps) < 100 * 10_000
    assert pickle.loads(pickle.dumps(packed)).unpack() == program


def test_a_step_is_pickled_once_for_all_its_members() -> None:
    programs = compile_programs(
        Schedule((Wave((task(0, 0, 1, 2),)),)), actors=3, digest="d", bucket_bytes=64, checksum=True
    )
    packed = pack_programs(programs)
    assert packed[0].steps[0] is packed[1].steps[0] is packed[2].steps[0]
    assert [each.unpack() for each in packed] == list(programs)
