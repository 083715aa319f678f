"""The whole check: every byte a destination holds against the source, over another road than the transfer's."""

from __future__ import annotations

import ctypes

import torch

from wavecast.runtime.transfer.copying import pack
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.program import Bucket

__all__ = ("read_step", "compare_step")


def read_step(buckets: tuple[Bucket, ...], memory: Memory) -> bytes:
    """Return the bytes of a step as its sender holds them now, one bucket after the other."""
    parts: list[bytes] = []
    for bucket in buckets:
        window = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        pack(bucket, memory, window)
        parts.append(ctypes.string_at(window.data_ptr(), bucket.nbytes))

    return b"".join(parts)


def compare_step(buckets: tuple[Bucket, ...], memory: Memory, expected: bytes) -> tuple[str, ...]:
    """
    Return a line for each cut of a step of which a receiver's memory differs from ``expected``.

    Where a cut is held in several views each of them is compared.

    :raises ValueError: when ``expected`` has not the size of the step
    """
    nbytes = sum(bucket.nbytes for bucket in buckets)
    if len(expected) != nbytes:
        raise ValueError(f"the step has {nbytes} bytes, the sender's excerpt {len(expected)}")

    differing: list[str] = []
    start = 0
    for bucket in buckets:
        for cut, first in bucket.items:
            wanted = torch.frombuffer(
                bytearray(expected[start + first : start + first + cut.nbytes]), dtype=torch.uint8
            )
            count = sum(int((_bytes_of(view) != wanted).sum()) for view in memory.targets(cut))
            if count:
                differing.append(f"{count} bytes of {cut.tensor!r} at offset {cut.offset} with extent {cut.extent}")

        start += bucket.nbytes

    return tuple(differing)


def _bytes_of(view: torch.Tensor) -> torch.Tensor:
    """Return a view's bytes on the host, in row-major order."""
    return as_bits(view).contiguous().cpu().view(-1).view(torch.uint8)
