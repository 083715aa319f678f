"""Sums that tell whether bytes arrived: cheap on any device, and blind to how they travelled."""

from __future__ import annotations

import torch

__all__ = ("fold", "combine", "LANES")

#: Eight-byte lanes a row. A row is summed up as a whole, and so is every column.
LANES = 1024

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


def fold(data: torch.Tensor) -> torch.Tensor:
    """
    Sum up ``data`` (1-d, uint8, a multiple of 16 bytes) into one int64 scalar on its device.

    The bytes are read as a matrix of 64-bit lanes. Rows and columns are summed modulo 2**64 and every sum is weighed by
    its place, so that a changed lane, two lanes exchanged and slices exchanged all show. Two reads of the data, no
    temporary of its size.
    """
    lanes = data.view(torch.int64)
    whole = lanes.numel() // LANES * LANES
    matrix = lanes[:whole].view(-1, LANES)
    rest = lanes[whole:]
    total = _weighed(matrix.sum(dim=1), salt=1) + _weighed(matrix.sum(dim=0), salt=2)
    return total + _weighed(rest, salt=3)


def combine(sums: list[int]) -> int:
    """Return one number for the sums of a step's buckets, in order."""
    total = len(sums)
    for value in sums:
        total = ((total ^ (value & _MASK)) * _ODD + 1) & _MASK
        total ^= total >> 29

    return total


def _weighed(values: torch.Tensor, *, salt: int) -> torch.Tensor:
    index = torch.arange(values.numel(), dtype=torch.int64, device=values.device)
    weights = (index * 2 + 1) * -7046029254386353131 + salt * 2
    mixed = (values ^ (values >> 31)) * weights
    return (mixed ^ (mixed >> 29)).sum()
