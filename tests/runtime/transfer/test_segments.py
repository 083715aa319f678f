"""Segments: strided boxes as rows of bytes, whatever the strides; nothing beside them, nothing twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavecast.runtime.transfer.memory import strided
from wavecast.runtime.transfer.segments import (
    Segment,
    Strided,
    join_segments,
    pair_segments,
    split_segment,
    unit_nbytes,
)


def pair(
    extent: tuple[int, ...],
    itemsize: int,
    source: tuple[int, tuple[int, ...]],
    target: tuple[int, tuple[int, ...]],
    wire: int = 0,
) -> list[Segment]:
    return list(pair_segments(extent, itemsize, Strided(*source), Strided(*target), wire=wire))


def rows_of(segments: Iterable[Segment]) -> list[tuple[int, int, int, int]]:
    """Return (source, target, wire, bytes) of each row of each segment, by hand."""
    return [
        (
            segment.source + row * segment.source_pitch,
            segment.target + row * segment.target_pitch,
            segment.wire + row * segment.nbytes,
            segment.nbytes,
        )
        for segment in segments
        for row in range(segment.rows)
    ]


def bytes_of(segments: Iterable[Segment]) -> list[tuple[int, int, int]]:
    """Return (source, target, wire) of each single byte."""
    return [(a + i, b + i, w + i) for a, b, w, nbytes in rows_of(segments) for i in range(nbytes)]


def test_what_is_contiguous_at_both_ends_is_one_row() -> None:
    assert pair((3, 4, 5), 2, (1000, (40, 10, 2)), (5000, (40, 10, 2)), 16) == [Segment(1000, 5000, 1, 120, 0, 0, 16)]


def test_a_column_slice_is_one_segment_of_many_rows() -> None:
    """Of 4 rows of 10 float32 the columns 2 to 5, into a matrix of 3 columns."""
    assert pair((4, 3), 4, (1008, (40, 4)), (5000, (12, 4))) == [Segment(1008, 5000, 4, 12, 40, 12, 0)]


def test_dims_in_step_at_both_ends_are_one_dim() -> None:
    """Outer dims of (2, 3) step evenly through both memories: six rows of one segment."""
    assert pair((2, 3, 4), 2, (0, (300, 100, 2)), (7000, (60, 20, 2))) == [Segment(0, 7000, 6, 8, 100, 20, 0)]


def test_dims_out_of_step_are_a_segment_for_each_index() -> None:
    assert pair((2, 3, 4), 2, (0, (1000, 100, 2)), (7000, (24, 8, 2)), 32) == [
        Segment(0, 7000, 3, 8, 100, 8, 32),
        Segment(1000, 7024, 3, 8, 100, 8, 56),
    ]


def test_a_transposed_view_goes_element_by_element() -> None:
    """A (2, 3) matrix out of memory in column order: the inner dim has rows of one element."""
    assert pair((2, 3), 4, (0, (4, 8)), (100, (12, 4))) == [
        Segment(0, 100, 3, 4, 8, 4, 0),
        Segment(4, 112, 3, 4, 8, 4, 12),
    ]


def test_two_views_transposed_alike_go_in_logical_order_too() -> None:
    """The wire is in row-major order of the box, so that both ends sum up alike whatever the other's strides are."""
    assert pair((2, 3), 4, (0, (4, 8)), (100, (4, 8))) == [
        Segment(0, 100, 3, 4, 8, 8, 0),
        Segment(4, 104, 3, 4, 8, 8, 12),
    ]


def test_a_dim_of_one_has_no_say_whatever_its_stride_is() -> None:
    assert pair((3, 1, 4), 2, (0, (8, 999, 2)), (100, (8, 7, 2))) == [Segment(0, 100, 1, 24, 0, 0, 0)]
    assert pair((1, 1), 8, (16, (5, 3)), (32, (1, 1)), 48) == [Segment(16, 32, 1, 8, 0, 0, 48)]


def test_a_scalar_is_one_row_of_one_element() -> None:
    assert pair((), 2, (10, ()), (20, ()), 16) == [Segment(10, 20, 1, 2, 0, 0, 16)]


@pytest.mark.parametrize("extent", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_an_empty_box_has_no_segment(extent: tuple[int, ...]) -> None:
    strides = (8,) * len(extent)
    assert pair(extent, 4, (0, strides), (100, strides)) == []


def test_an_expanded_view_is_read_again_and_again() -> None:
    assert pair((3, 2), 4, (0, (0, 4)), (100, (8, 4))) == [Segment(0, 100, 3, 8, 0, 8, 0)]


def test_strides_of_another_number_of_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        pair((2, 2), 4, (0, (8,)), (0, (8, 4)))


# Random views.

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128)


@st.composite
def views(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A view of ``shape`` in memory of its own, permuted, sliced and stepped through at random."""
    dims = len(shape)
    order = draw(st.permutations(range(dims)))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    before = [draw(st.integers(0, 2)) for _ in shape]
    after = [draw(st.integers(0, 2)) for _ in shape]
    whole = [start + size * step + end for start, size, step, end in zip(before, shape, steps, after, strict=True)]
    storage = torch.zeros([whole[dim] for dim in order], dtype=dtype)
    view = storage.permute([order.index(dim) for dim in range(dims)])
    for dim, (start, size, step) in enumerate(zip(before, shape, steps, strict=True)):
        view = view.narrow(dim, start, size * step)
        view = view[(slice(None),) * dim + (slice(None, None, step),)]

    assert tuple(view.shape) == tuple(shape)
    return view


def storage_bytes(view: torch.Tensor) -> np.ndarray:
    """The whole storage of ``view``, as bytes that can be written."""
    storage = view.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    return draw(views(shape, dtype)), draw(views(shape, dtype))


@settings(max_examples=150)
@given(pairs(), st.integers(0, 4), st.integers(0, 1 << 30))
def test_segments_move_what_a_copy_moves_and_pass_the_wire_in_row_major_order(
    ends: tuple[torch.Tensor, torch.Tensor], packed_before: int, seed: int
) -> None:
    source, target = ends
    read, written = storage_bytes(source), storage_bytes(target)
    noise = np.random.default_rng(seed)
    read[:] = noise.integers(0, 256, read.size)
    written[:] = noise.integers(0, 256, written.size)
    wire = 16 * packed_before
    expected = written.copy()
    # The oracle walks the elements by numpy's own rules.
    nbytes = source.element_size()
    places = [
        [
            view.storage_offset() * nbytes
            + sum(i * stride * nbytes for i, stride in zip(index, view.stride(), strict=True))
            for index in itertools.product(*map(range, view.shape))
        ]
        for view in ends
    ]
    packed = bytearray()
    for a, b in zip(*places, strict=True):
        expected[b : b + nbytes] = read[a : a + nbytes]
        packed += read[a : a + nbytes].tobytes()

    segments = list(pair_segments(tuple(source.shape), nbytes, strided(source), strided(target), wire=wire))
    bases = source.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()
    passed = bytearray(len(packed))
    for a, b, w in bytes_of(segments):
        written[b - bases[1]] = read[a - bases[0]]
        passed[w - wire] = read[a - bases[0]]

    assert written.tobytes() == expected.tobytes()
    assert bytes(passed) == bytes(packed)
    # Each byte once, in the order of the wire.
    assert [w - wire for _, _, w in bytes_of(segments)] == list(range(len(packed)))
    # As many segments as the outer indices at most, and none of no bytes.
    assert all(segment.rows > 0 and segment.nbytes > 0 for segment in segments)
    if segments:
        assert len(segments) * segments[0].rows * segments[0].nbytes == len(packed)


# Joining and splitting.

a_segment = st.builds(
    lambda source, target, rows, nbytes, gap_a, gap_b, wire: Segment(
        source, target, rows, nbytes, nbytes + gap_a if rows > 1 else 0, nbytes + gap_b if rows > 1 else 0, wire
    ),
    st.integers(0, 500),
    st.integers(0, 500),
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 100),
)


@given(a_segment, st.integers(1, 300))
def test_parts_of_a_segment_are_its_bytes_in_order(segment: Segment, most: int) -> None:
    parts = list(split_segment(segment, most))
    assert bytes_of(parts) == bytes_of([segment])
    assert all(part.rows * part.nbytes <= most or (part.rows == 1 and part.nbytes <= most) for part in parts)
    # A single row has no pitch to divide its unit by.
    assert all(part.source_pitch == part.target_pitch == 0 for part in parts if part.rows == 1)


def test_a_segment_is_split_between_rows_where_a_row_fits() -> None:
    assert list(split_segment(Segment(0, 1000, 5, 10, 100, 20, 7), 25)) == [
        Segment(0, 1000, 2, 10, 100, 20, 7),
        Segment(200, 1040, 2, 10, 100, 20, 27),
        Segment(400, 1080, 1, 10, 0, 0, 47),
    ]


def test_a_row_larger_than_a_part_is_split_itself() -> None:
    assert list(split_segment(Segment(0, 100, 2, 10, 50, 60, 0), 6)) == [
        Segment(0, 100, 1, 6, 0, 0, 0),
        Segment(6, 106, 1, 4, 0, 0, 6),
        Segment(50, 160, 1, 6, 0, 0, 10),
        Segment(56, 166, 1, 4, 0, 0, 16),
    ]


def test_what_fits_is_left_whole_and_by_itself_a_gibibyte_fits() -> None:
    small = Segment(0, 8, 2, 10, 50, 60, 0)
    assert list(split_segment(small, 20)) == [small]
    most = Segment(0, 8, 1 << 10, 1 << 20, 1 << 21, 1 << 20, 0)
    assert list(split_segment(most)) == [most]
    assert [part.rows for part in split_segment(most._replace(rows=(1 << 10) + 1))] == [1 << 10, 1]


def test_single_rows_that_follow_each_other_everywhere_are_joined() -> None:
    first = Segment(100, 500, 1, 16, 0, 0, 0)
    after = Segment(116, 516, 1, 8, 0, 0, 16)
    assert join_segments([first, after, Segment(124, 524, 1, 4, 0, 0, 24)]) == [Segment(100, 500, 1, 28, 0, 0, 0)]
    for other in (
        after._replace(source=117),
        after._replace(target=515),
        after._replace(wire=32),
        after._replace(rows=2, source_pitch=8, target_pitch=8),
    ):
        assert join_segments([first, other]) == [first, other]

    many = first._replace(rows=2, source_pitch=16, target_pitch=16)
    after_many = Segment(132, 532, 1, 8, 0, 0, 32)
    assert join_segments([many, after_many]) == [many, after_many]
    assert join_segments([]) == []


@given(st.lists(st.integers(1, 30), max_size=8), st.data())
def test_joining_keeps_every_byte_and_its_order(sizes: list[int], data: st.DataObject) -> None:
    segments: list[Segment] = []
    source = target = wire = 0
    for nbytes in sizes:
        gaps = [data.draw(st.sampled_from([0, 0, 0, 4])) for _ in range(3)]
        source, target, wire = source + gaps[0], target + gaps[1], wire + gaps[2]
        segments.append(Segment(source, target, 1, nbytes, 0, 0, wire))
        source, target, wire = source + nbytes, target + nbytes, wire + nbytes

    joined = join_segments(segments)
    assert bytes_of(joined) == bytes_of(segments)
    # Nothing is left to be joined.
    assert join_segments(joined) == joined


@pytest.mark.parametrize(
    ("segment", "unit"),
    [
        (Segment(32, 64, 1, 48, 0, 0, 16), 16),
        (Segment(32, 64, 1, 40, 0, 0, 16), 4),
        (Segment(40, 64, 1, 48, 0, 0, 16), 4),
        (Segment(32, 64, 2, 16, 48, 20, 16), 4),
        (Segment(32, 64, 2, 16, 18, 32, 16), 2),
        (Segment(32, 65, 1, 48, 0, 0, 16), 1),
        (Segment(32, 64, 1, 48, 0, 0, 2), 2),
        (Segment(32, 64, 1, 7, 0, 0, 16), 1),
        (Segment(0, 0, 1, 16, 0, 0, 0), 16),
    ],
)
def test_the_unit_divides_addresses_sizes_pitches_and_the_wire_but_not_the_number_of_rows(
    segment: Segment, unit: int
) -> None:
    assert unit_nbytes(segment) == unit


@given(a_segment)
def test_a_unit_is_the_largest_that_divides_all_of_a_segment(segment: Segment) -> None:
    numbers = [value for name, value in segment._asdict().items() if name != "rows"]
    fits = [size for size in (16, 8, 4, 2, 1) if not any(value % size for value in numbers)]
    # Eight is sixteen taken by two, or nothing: a kernel reads 16 bytes at a time there.
    assert unit_nbytes(segment) == next(size for size in fits if size != 8)
    assert math.gcd(*numbers, 16) >= unit_nbytes(segment)
