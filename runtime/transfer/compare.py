"""The whole check: every byte a destination holds against the source, over another road than the transfer's."""

from __future__ import annotations

import ctypes

import torch

from wavecast.runtime.transfer.copying import gather, pack
from wavecast.runtime.transfer.memory import Memory
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
    """Return a line for each cut of a step of which a receiver's memory differs from ``expected``."""
    differing: list[str] = []
    start = 0
    for bucket in buckets:
        wanted = torch.frombuffer(bytearray(expected[start : start + bucket.nbytes]), dtype=torch.uint8)
        start += bucket.nbytes
        held = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        gather(bucket, memory, held)
        if torch.equal(wanted, held):
            continue

        for cut, first in bucket.items:
            window = slice(first, first + cut.nbytes)
            count = int((wanted[window] != held[window]).sum())
            if count:
                differing.append(f"{count} bytes of {cut.tensor!r} at offset {cut.offset} with extent {cut.extent}")

    return tuple(differing)
