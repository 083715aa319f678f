"""Between an actor's tensors and a bucket's bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wavecast.runtime.transfer.memory import Memory, as_bits, dtype_of
from wavecast.runtime.transfer.program import ALIGNMENT, Bucket, Placed

__all__ = ("pack", "unpack", "gather")


def pack(bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
    """Copy the bucket's cuts from local memory into ``buffer``, cast to the dtype in which they travel."""
    for item in bucket.items:
        window = _window(item, buffer)
        view = memory.source(item.cut)
        if view.dtype == window.dtype:
            as_bits(window).copy_(as_bits(view), non_blocking=buffer.is_cuda)
        else:
            window.copy_(view, non_blocking=buffer.is_cuda)

        _clear_padding(item, buffer)


def unpack(bucket: Bucket, memory: Memory, buffer: torch.Tensor, *, check: Callable[[], None]) -> None:
    """
    Copy the bucket's cuts from ``buffer`` into local memory, bit for bit.

    A cut held in several views is copied from view to view, so that the last one tells of all.

    :param check: called before each cut is written; raises to write no more
    """
    for item in bucket.items:
        check()
        latest = as_bits(_window(item, buffer))
        for view in memory.targets(item.cut):
            latest = as_bits(view).copy_(latest, non_blocking=buffer.is_cuda)


def gather(bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
    """
    Fill ``buffer`` with what the destination's memory holds now; nothing of its former content is left.

    Of a cut held in several views the one that was written last is read.
    """
    buffer.zero_()
    for item in bucket.items:
        as_bits(_window(item, buffer)).copy_(as_bits(memory.targets(item.cut)[-1]), non_blocking=buffer.is_cuda)


def _window(item: Placed, buffer: torch.Tensor) -> torch.Tensor:
    cut = item.cut
    return buffer[item.start : item.start + cut.nbytes].view(dtype_of(cut.dtype)).view(cut.extent)


def _clear_padding(item: Placed, buffer: torch.Tensor) -> None:
    """Both ends sum up whole buckets, so the bytes between cuts must be known."""
    stop = item.start + item.cut.nbytes
    over = -stop % ALIGNMENT
    if over:
        buffer[stop : stop + over].zero_()
