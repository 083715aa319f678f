"""Sums must tell honest mistakes of a transfer apart from a transfer that worked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.transfer.host_device import signed, weighed_sum
from wavecast.runtime.transfer.checksum import LANES, _weighed_in_parts, combine, fold

ROW = 8 * LANES


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def total(data: torch.Tensor) -> int:
    return int(fold(data.contiguous().view(-1).view(torch.uint8)))


# Less than a row, rows without a rest, rows with a rest.
sizes = pytest.mark.parametrize("nbytes", [16, 1008, 2 * ROW, 3 * ROW + 528])


@sizes
def test_a_flipped_bit_shows_wherever_it_is(nbytes: int) -> None:
    data = random_bytes(nbytes)
    before = total(data)
    for place in {0, 7, nbytes // 3, nbytes // 2, nbytes - 8, nbytes - 1}:
        for bit in range(8):
            data[place] ^= 1 << bit
            assert total(data) != before
            data[place] ^= 1 << bit

    assert total(data) == before


@sizes
def test_a_flipped_bit_shows_in_zeros_and_in_ones(nbytes: int) -> None:
    for value in (0, 255):
        data = torch.full((nbytes,), value, dtype=torch.uint8)
        before = total(data)
        sums = {before}
        for bit in range(64):
            data[nbytes // 16 * 8 + bit // 8] ^= 1 << bit % 8
            sums.add(total(data))
            data[nbytes // 16 * 8 + bit // 8] ^= 1 << bit % 8

        assert len(sums) == 65


@sizes
def test_bytes_that_were_never_written_show(nbytes: int) -> None:
    """All ones against all zeros is what a map of experts filled with -1 looks like when it does not arrive."""
    data = random_bytes(nbytes)
    known = [torch.zeros_like(data), torch.full_like(data, 255), data, ~data]
    half = data.clone()
    half[nbytes // 2 :] = 0
    tail = data.clone()
    tail[-2:] = 0
    assert len({total(each) for each in (*known, half, tail)}) == 6


@given(st.integers(0, 3 * LANES + 9), st.integers(0, 3 * LANES + 9))
def test_two_lanes_exchanged_show(first: int, second: int) -> None:
    lanes = random_bytes(3 * ROW + 80).view(torch.int64)
    before = total(lanes)
    swapped = lanes.clone()
    swapped[first], swapped[second] = lanes[second], lanes[first]
    assert (total(swapped) == before) == (first == second)


@settings(max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 4 * LANES // 61))
def test_equal_slices_exchanged_show(first: int, second: int, size: int) -> None:
    lanes = random_bytes(4 * ROW).view(torch.int64)
    step = 4 * LANES // 61
    a, b = slice(first * step, first * step + size), slice(second * step, second * step + size)
    swapped = lanes.clone()
    swapped[a], swapped[b] = lanes[b], lanes[a]
    assert (total(swapped) == total(lanes)) == (first == second)


@given(st.integers(1, 8 * LANES - 1))
def test_a_shift_by_any_number_of_lanes_shows(by: int) -> None:
    lanes = random_bytes(8 * ROW).view(torch.int64)
    assert total(lanes.roll(by)) != total(lanes)


@pytest.mark.parametrize("width", [1, 2, 4, 16, 64, 256, 1024, 4096])
def test_slices_of_any_usual_width_exchanged_two_by_two_show(width: int) -> None:
    """Random slices twice over: A B B A is told from B A A B, whose sums are the same wherever rows fall in step."""
    a, b = random_bytes(8 * width, seed=1), random_bytes(8 * width, seed=2)
    gap = random_bytes(8 * width * 6, seed=3)
    assert total(torch.cat([a, b, gap, b, a])) != total(torch.cat([b, a, gap, a, b]))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("size", [2, 16, 500])
def test_unequal_slices_in_step_with_the_sums_exchanged_show(rows: int, size: int) -> None:
    """Whole rows apart, one the other reversed: every row and every column has the lanes, or the sum, that it had."""
    lanes = random_bytes(8 * ROW).view(torch.int64)
    a, b = slice(LANES + 100, LANES + 100 + size), slice((1 + rows) * LANES + 100, (1 + rows) * LANES + 100 + size)
    lanes[b] = lanes[a].flip(0)
    # Columns keep their sums when slices trade places as they are, rows since both hold the same lanes.
    swapped = lanes.clone()
    swapped[a], swapped[b] = lanes[b], lanes[a]
    before, after = (each.view(-1, LANES) for each in (lanes, swapped))
    assert torch.equal(before.sum(dim=0), after.sum(dim=0))
    assert torch.equal(before.sum(dim=1), after.sum(dim=1))
    assert not torch.equal(before, after)
    assert total(swapped) != total(lanes)
    assert weighed_sum(swapped.numpy().tobytes()) != weighed_sum(lanes.numpy().tobytes())


@pytest.mark.parametrize("bits", range(64))
def test_four_lanes_that_keep_all_plain_sums_show_but_for_the_top_bit(bits: int) -> None:
    """Corners of a rectangle, plus, minus, minus and plus one bit: the limit of what is caught, as ``fold`` says."""
    lanes = random_bytes(4 * ROW).view(torch.int64)
    corners = lanes.clone().view(-1, LANES)
    step = signed(1 << bits)
    corners[0, 10] += step
    corners[0, 11] -= step
    corners[3, 10] -= step
    corners[3, 11] += step
    # The weights of these two columns differ by an even number that is no multiple of four.
    assert (total(corners) == total(lanes)) == (bits == 63)
    # The kernels' sum has no such case.
    assert weighed_sum(corners.numpy().tobytes()) != weighed_sum(lanes.numpy().tobytes())


#: Tables with little in them: sums by row and column of their own shape say little of what is where.
TABLES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "ones": torch.ones,
    "identity": torch.eye,
    "lower triangle": lambda rows, columns: torch.ones(rows, columns).tril(),
    "row numbers": lambda rows, columns: torch.arange(rows).view(-1, 1).expand(rows, columns),
    "column numbers": lambda rows, columns: torch.arange(columns).expand(rows, columns),
    "diagonal blocks": lambda rows, columns: torch.eye(4).kron(torch.ones(rows // 4, columns // 4)),
    "two of four quarters": lambda rows, columns: torch.eye(2).kron(torch.ones(rows // 2, columns // 2)),
    "random diagonal blocks": lambda rows, columns: torch.eye(4).kron(
        torch.arange(rows * columns // 16).view(rows // 4, columns // 4) % 97 - 48
    ),
    "tiles": lambda rows, columns: (torch.arange(rows * columns // 16).view(rows // 4, -1) % 89).repeat(4, 4),
}


def mistakes(table: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What a wrong offset, stride, order or extent makes of a table."""
    rows, columns = table.shape
    for by in (1, 2, 4, 8, rows // 2):
        yield f"rows shifted by {by}", table.roll(by, 0)

    for by in (1, 2, 4, 8, columns // 2):
        yield f"columns shifted by {by}", table.roll(by, 1)

    for by in (1, 4, columns - 1, columns + 1):
        yield f"elements shifted by {by}", table.flatten().roll(by).view(rows, columns)

    yield "transposed", table.t().reshape(rows, columns)
    yield "upside down", table.flip(0)
    yield "mirrored", table.flip(1)
    for groups in (2, 8):
        yield f"{groups} groups of rows interleaved", table.view(groups, -1, columns).transpose(0, 1)
        yield f"{groups} groups of columns interleaved", table.view(rows, groups, -1).transpose(1, 2)

    top, left = rows // 2, columns // 2
    quarters = table.clone()
    quarters[:top, :left], quarters[top:, left:] = table[top:, left:], table[:top, :left]
    yield "quarters exchanged", quarters
    yield "first half twice", table[:top].repeat(2, 1)
    lost = table.clone()
    lost[top:] = 0
    yield "second half lost", lost
    lost = table.clone()
    lost[:, left:] = 0
    yield "right half lost", lost
    yield "negated", -table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(64, 64), (128, 512)])
@pytest.mark.parametrize("name", TABLES)
def test_what_goes_wrong_with_a_structured_table_shows(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    table = TABLES[name](*shape).to(dtype).contiguous()
    before = total(table)
    bits = table.view(-1).view(torch.uint8)
    for mistake, wrong in mistakes(table):
        same = torch.equal(wrong.reshape(-1).view(torch.uint8), bits)
        assert (total(wrong) == before) == same, mistake


def reference(data: bytes) -> int:
    """The sum in Python's own integers."""
    lanes = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    rows = len(lanes) // LANES
    matrix, rest = [lanes[LANES * row : LANES * (row + 1)] for row in range(rows)], lanes[LANES * rows :]

    def weight(index: int) -> int:
        mixed = signed((index + 1) * 0x9E3779B97F4A7C15)
        for _ in range(2):
            mixed = signed((mixed ^ (mixed >> 29)) * -4658895280553007687)

        return (mixed ^ (mixed >> 32)) | 1

    within = [weight(4096 + column) for column in range(LANES)]
    sums = [sum(row[column] for row in matrix) for column in range(LANES)] + rest
    sums += [sum(lane * each for lane, each in zip(row, within, strict=True)) for row in matrix]
    return signed(sum((signed(value) + (signed(value) >> 31)) * weight(index) for index, value in enumerate(sums)))


@pytest.mark.parametrize("nbytes", [0, 16, 4096, ROW, 2 * ROW + 24])
def test_the_sum_is_a_fixed_function_of_the_bytes(nbytes: int) -> None:
    """Both ends may run other versions of torch, on other devices: the sum is that of this arithmetic."""
    data = random_bytes(nbytes)
    assert total(data) == reference(bytes(data.tolist()))


@pytest.mark.parametrize("rows", [0, 1, 256, 700])
def test_rows_are_weighed_alike_where_torch_has_no_product_of_integers(rows: int) -> None:
    matrix = random_bytes(rows * ROW).view(torch.int64).view(-1, LANES)
    weights = random_bytes(ROW, seed=1).view(torch.int64)
    assert torch.equal(_weighed_in_parts(matrix, weights), matrix @ weights)


def test_a_window_of_a_larger_buffer_sums_up_alike() -> None:
    data = random_bytes(4 * ROW)
    assert int(fold(data[16 : 16 + 2 * ROW])) == total(data[16 : 16 + 2 * ROW].clone())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("nbytes", [16, 2 * ROW, 300 * ROW + 528])
def test_a_gpu_finds_the_same_sum(nbytes: int) -> None:
    data = random_bytes(nbytes)
    assert int(fold(data.cuda())) == total(data)


def test_a_steps_sum_tells_the_order_and_the_number_of_its_buckets() -> None:
    seen = {
        combine(sums) for sums in ([], [0], [0, 0], [1], [1, 2], [2, 1], [1, 2, 3], [3, 2, 1], [2, 3, 1], [-1], [-1, 0])
    }
    assert len(seen) == 11
    assert combine([5, -7]) == combine([5, -7])


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=6), st.data())
def test_one_buckets_changed_sum_changes_the_steps(sums: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(sums) - 1))
    changed = [*sums]
    changed[place] ^= 1 << data.draw(st.integers(0, 62))
    assert combine(changed) != combine(sums)
