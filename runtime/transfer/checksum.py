"""Sums that tell whether bytes arrived: cheap on any device, and blind to how they travelled."""

from __future__ import annotations

import functools

import torch

__all__ = ("fold", "combine", "LANES")

#: Eight-byte lanes a row. A prime, so that no matrix of the model has rows that fall in step with these: what moves in
#: such a matrix by rows or columns would leave all sums as they are.
LANES = 4093

#: A power of two above it: where the weights of columns within a row start, apart from those of the sums.
_POWER = 4096
_ROWS = 256
_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


def fold(data: torch.Tensor) -> torch.Tensor:
    """
    Sum up ``data`` (1-d, uint8, a multiple of 16 bytes) into one int64 scalar on its device.

    The bytes are read as a matrix of 64-bit lanes. Columns are summed modulo 2**64, rows with a weight for each column,
    and every sum is weighed by its place, so that a changed lane, lanes exchanged, slices shifted, exchanged or
    reversed all show. Two reads of the data, no temporary of its size, and few operations.

    What does not show is an exchange that keeps every column's sum and every row's weighed one. Weights are odd, so
    their differences are even and take top bits away: four lanes at the corners of a rectangle (two rows, two columns)
    that change by plus, minus, minus and plus 2**63 are taken for what they were; by 2**62 with one pair of columns in
    two, and so on. Else it takes an accident, of about one in 2**60. The kernels, which are used where they can be,
    weigh each half of each lane by its own place and have no such case.
    """
    lanes = data.view(torch.int64)
    whole = lanes.numel() // LANES * LANES
    matrix = lanes[:whole].view(-1, LANES)
    sums = torch.cat((matrix.sum(dim=0), lanes[whole:], _weighed_rows(matrix)))
    # In a product a high bit reaches no lower one, so it is first added further down: not by 32 or 16 bits, which would
    # set the signs of neighbouring numbers off against each other.
    weights = _weights(1 << sums.numel().bit_length(), sums.device)[: sums.numel()]
    return ((sums + (sums >> 31)) * weights).sum()


def combine(sums: list[int]) -> int:
    """Return one number for the sums of a step's buckets, in order."""
    total = (len(sums) + 1) * _ODD & _MASK
    for value in sums:
        total = ((total ^ (value & _MASK)) * _ODD + 1) & _MASK
        total ^= total >> 29

    return total


def _weighed_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return each row's sum, in which each lane is weighed by its column."""
    weights = _weights(2 * _POWER, matrix.device)[_POWER : _POWER + LANES]
    return matrix @ weights if matrix.device.type == "cpu" else _weighed_in_parts(matrix, weights)


def _weighed_in_parts(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``matrix @ weights`` where torch has no product of integers: some rows at a time, in 8 MiB."""
    return torch.cat([(rows * weights).sum(dim=1) for rows in matrix.split(_ROWS)])


@functools.cache
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Return odd pseudo-random numbers. Kept for good: no stream can then see them unfinished or given back."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64) * (_ODD - (1 << 64))
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687

    # From pageable host memory this copy is over when it returns.
    return ((mixed ^ (mixed >> 32)) | 1).to(device)
