"""Boxes, held against numpy's own idea of a region."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.layout.box import Box

SIDES = (4, 3, 5)


@st.composite
def boxes(draw, dims=3):
    runs = [sorted(draw(st.tuples(st.integers(0, side), st.integers(0, side)))) for side in SIDES[:dims]]
    return Box(tuple(start for start, _ in runs), tuple(stop - start for start, stop in runs))


def mask(box):
    region = np.zeros(SIDES[: len(box.offset)], bool)
    region[tuple(slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True))] = True
    return region


@given(boxes(), boxes())
def test_an_intersection_is_what_both_hold(a, b):
    both = mask(a) & mask(b)
    common = a.intersect(b)
    if common is None:
        assert not both.any()
    else:
        assert common.numel == both.sum()
        np.testing.assert_array_equal(mask(common), both)


@given(boxes(), boxes())
def test_a_box_contains_another_when_all_its_elements_are_inside(a, b):
    if b.numel:
        assert a.contains(b) == bool(mask(a)[mask(b)].all())


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        (Box((30,), (30,)), Box((40,), (20,)), Box((40,), (20,))),
        (Box((0, 0), (4, 2)), Box((2, 1), (4, 2)), Box((2, 1), (2, 1))),
        (Box((0,), (3,)), Box((3,), (3,)), None),
        (Box((), ()), Box((), ()), Box((), ())),
    ],
)
def test_known_intersections(a, b, common):
    assert a.intersect(b) == common
    assert b.intersect(a) == common


def test_a_scalars_box_has_one_element():
    assert Box((), ()).numel == 1


def test_boxes_of_different_dims_do_not_mix():
    with pytest.raises(ValueError, match="zip"):
        Box((0,), (2,)).intersect(Box((0, 0), (2, 2)))
