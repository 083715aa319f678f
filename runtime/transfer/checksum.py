"""Sums that tell whether bytes arrived: cheap on any device, and blind to how they travelled."""

from __future__ import annotations

import functools

import torch

__all__ = ("fold", "combine", "LANES")

#: Eight-byte lanes a row. A prime, so that no matrix of the model has rows that fall in step with these: what moves in
#: such a matrix by rows or columns would leave all sums as they are.
LANES = 4093

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


def fold(data: torch.Tensor) -> torch.Tensor:
    """
    Sum up ``data`` (1-d, uint8, a multiple of 16 bytes) into one int64 scalar on its device.

    The bytes are read as a matrix of 64-bit lanes. Rows and columns are summed modulo 2**64 and every sum is weighed by
    its place, so that a changed lane, lanes exchanged, slices shifted or exchanged all show. Two reads of the data, no
    temporary of its size, and few operations: on a GPU each costs the host a launch.
    """
    lanes = data.view(torch.int64)
    whole = lanes.numel() // LANES * LANES
    matrix = lanes[:whole].view(-1, LANES)
    sums = torch.cat((matrix.sum(dim=0), lanes[whole:], matrix.sum(dim=1)))
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


@functools.cache
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Return odd pseudo-random numbers. Kept for good: no stream can then see them unfinished or given back."""
    mixed = torch.arange(1, count + 1, dtype=torch.int64) * (_ODD - (1 << 64))
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687

    # From pageable host memory this copy is over when it returns.
    return ((mixed ^ (mixed >> 32)) | 1).to(device)
