"""Rows of fused parameters, held against arrays laid out by reshaping."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.layout.megatron.runs import Run, gated, query_groups, window


def rows_of(runs):
    """Return (tensor, row) for every row in turn."""
    return [(run.name, run.start + index) for run in runs for index in range(run.length)]


def test_a_rank_that_holds_a_key_and_a_value_head_holds_no_query():
    whole = query_groups("q", "k", "v", heads=4, groups=2, head_dim=8)
    assert [window(whole, 16 * rank, 16 * rank + 16) for rank in range(4)] == [
        (Run("q", 0, 16),),
        (Run("k", 0, 8), Run("v", 0, 8)),
        (Run("q", 16, 16),),
        (Run("k", 8, 8), Run("v", 8, 8)),
    ]


def test_a_part_may_begin_in_the_middle_of_a_head():
    whole = query_groups("q", "k", "v", heads=4, groups=1, head_dim=6)
    assert window(whole, 18, 27) == (Run("q", 18, 6), Run("k", 0, 3))
    assert window(whole, 27, 36) == (Run("k", 3, 3), Run("v", 0, 6))


def test_gate_comes_before_up_whole_or_in_blocks():
    assert gated("g", "u", start=6, length=6) == (Run("g", 6, 6), Run("u", 6, 6))
    assert gated("g", "u", start=0, length=4, block=2) == (
        Run("g", 0, 2),
        Run("u", 0, 2),
        Run("g", 2, 2),
        Run("u", 2, 2),
    )


@given(groups=st.integers(1, 5), shared=st.integers(1, 5), head_dim=st.integers(1, 4), parts=st.integers(1, 12))
def test_parts_of_query_groups_are_the_rows_of_the_reshaped_arrays(groups, shared, head_dim, parts):
    heads = groups * shared
    q, k, v = (
        np.array([f"{name} {row}" for row in range(count * head_dim)]).reshape(groups, -1, head_dim)
        for name, count in (("q", heads), ("k", groups), ("v", groups))
    )
    fused = np.concatenate([q, k, v], axis=1).reshape(-1)
    whole = query_groups("q", "k", "v", heads=heads, groups=groups, head_dim=head_dim)
    bounds = [len(fused) * part // parts for part in range(parts + 1)]
    for start, stop in itertools.pairwise(bounds):
        found = [f"{name} {row}" for name, row in rows_of(window(whole, start, stop))]
        assert found == list(fused[start:stop])
