"""Views on common memory are found, exactly, and interleaved ones told apart."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from wavecast.runtime.layout.sharing import NOT_SHARED, Sharing, find_sharing


def bytes_of(view: torch.Tensor) -> set[int]:
    """Every byte of a view, listed: what the module under test works out."""
    offsets = [sum(i * s for i, s in zip(at, view.stride(), strict=True)) for at in np.ndindex(*view.shape)]
    size = view.element_size()
    return {view.data_ptr() + offset * size + byte for offset in offsets for byte in range(size)}


def test_memory_of_its_own_shares_nothing() -> None:
    assert find_sharing([torch.zeros(4), torch.zeros(4), None, torch.zeros(0)]) == NOT_SHARED


def test_equal_views_are_one_group_and_overlapping_ones_pairs() -> None:
    whole = torch.zeros(6, 4)
    found = find_sharing([whole[:4], torch.zeros(2), whole[:4], whole[2:], whole.view(torch.int32)[4:]])
    assert found == Sharing(((0, 2),), ((0, 3), (3, 4)))


def test_neighbours_in_one_storage_do_not_overlap() -> None:
    fused = torch.zeros(12, 8)
    assert find_sharing([fused[:4], fused[4:8], fused[8:]]) == NOT_SHARED


def test_interleaved_columns_do_not_overlap() -> None:
    fused = torch.zeros(12, 9)
    columns = [fused[:, start : start + 3] for start in (3, 0, 6)]
    assert find_sharing(columns) == NOT_SHARED
    assert find_sharing([*columns, fused[:, 2:4]]).overlapping == ((0, 3), (1, 3))


def test_expanded_views_of_one_memory_overlap() -> None:
    one, row = torch.zeros(1), torch.zeros(1, 6)
    assert find_sharing([one.expand(4), one.expand(8)]) == Sharing((), ((0, 1),))
    assert find_sharing([row[:, :3].expand(5, 3), row[:, 3:].expand(2, 3)]) == NOT_SHARED
    assert find_sharing([row[:, ::2].expand(5, 3), row[:, 1::2].expand(2, 3), row[:, 4:5].expand(2, 1)]) == Sharing(
        (), ((0, 2),)
    )


def test_a_transposed_matrix_is_where_its_own_memory_is() -> None:
    whole = torch.zeros(5, 7)
    assert find_sharing([whole, whole.t()]) == Sharing((), ((0, 1),))
    assert find_sharing([whole[:2].t(), whole[2:].t()]) == NOT_SHARED


@pytest.mark.parametrize("seed", range(60))
def test_random_windows_overlap_where_their_bytes_do(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(2, 7, size=3))
    whole = torch.zeros(shape, dtype=torch.bfloat16)
    views = []
    for _ in range(6):
        view = whole.permute(*(int(dim) for dim in random.permutation(3)))
        for dim in range(3):
            first = int(random.integers(0, view.shape[dim]))
            last = int(random.integers(first, view.shape[dim]))
            step = int(random.integers(1, 3))
            view = view[(slice(None),) * dim + (slice(first, last + 1, step),)]
            if random.random() < 0.15:
                view = view.narrow(dim, 0, 1).expand([5 if other == dim else -1 for other in range(3)])

        views.append(view)

    held = [bytes_of(view) for view in views]
    found = find_sharing(views)
    first = {index: group[0] for group in found.same for index in group}
    for a, b in itertools.combinations(range(len(views)), 2):
        if a in first and first.get(b) == first[a]:
            assert held[a] == held[b]
        elif first.get(a, a) == a and first.get(b, b) == b:
            assert ((a, b) in found.overlapping) == bool(held[a] & held[b])


def test_many_columns_of_one_storage_cost_no_more_than_a_sort() -> None:
    """Pair by pair it would be 18 million comparisons."""
    fused = torch.zeros(3, 6000)
    columns = [fused[:, start : start + 1] for start in range(6000)]
    started = time.perf_counter()
    assert find_sharing(columns) == NOT_SHARED
    assert time.perf_counter() - started < 2
