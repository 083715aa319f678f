"""Geometry: differences and flat ranges of boxes, against numpy."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.layout.box import Box


@st.composite
def boxes(draw: st.DrawFn, ndim: int) -> Box:
    return Box(
        tuple(draw(st.integers(0, 5)) for _ in range(ndim)),
        tuple(draw(st.integers(0, 5)) for _ in range(ndim)),
    )


def paint(box: Box, ndim: int) -> np.ndarray:
    canvas = np.zeros((10,) * ndim, int)
    canvas[tuple(slice(a, a + n) for a, n in zip(box.offset, box.extent, strict=True))] += 1
    return canvas


@given(st.integers(0, 4).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim))))
def test_a_difference_holds_each_remaining_element_once(pair: tuple[Box, Box]) -> None:
    a, b = pair
    ndim = len(a.offset)
    rest = a.subtract(b)
    total = sum((paint(box, ndim) for box in rest), np.zeros((10,) * ndim, int))
    assert (total == paint(a, ndim) * (1 - paint(b, ndim))).all()
    assert len(rest) <= max(1, 2 * ndim)
    assert all(box.numel for box in rest)


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_a_flat_range_is_at_most_two_n_minus_one_boxes_in_row_major_order(
    extent: list[int], data: st.DataObject
) -> None:
    shape = tuple(extent)
    numel = prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    cut = Box((3,) * len(shape), shape).split_flat(start, stop)

    numbers = np.arange(numel).reshape(shape)
    seen: list[int] = []
    for box in cut:
        assert box.numel
        seen.extend(
            numbers[tuple(slice(a - 3, a - 3 + n) for a, n in zip(box.offset, box.extent, strict=True))]
            .ravel()
            .tolist()
        )

    assert seen == list(range(start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1)


def test_a_flat_range_of_a_matrix_is_a_tail_whole_rows_and_a_head() -> None:
    assert Box((10, 20), (5, 4)).split_flat(3, 18) == (
        Box((10, 23), (1, 1)),
        Box((11, 20), (3, 4)),
        Box((14, 20), (1, 2)),
    )


def test_a_flat_range_of_an_empty_box_is_nothing() -> None:
    assert Box((0, 0), (3, 0)).split_flat(0, 0) == ()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7)])
def test_a_range_outside_the_box_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="are not in a box of 6"):
        Box((0, 0), (2, 3)).split_flat(start, stop)

    with pytest.raises(ValueError, match="are not in a box of 6"):
        Box((0,), (6,)).rows(start, stop)


def test_rows_are_counted_from_the_box_itself() -> None:
    assert Box((10, 20), (5, 4)).rows(1, 3) == Box((11, 20), (2, 4))
    assert Box((10, 20), (5, 4)).rows(0, 2, dim=1) == Box((10, 20), (5, 2))
