"""Between an actor's tensors and a bucket's bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from wavecast.runtime.transfer.checksum import combine, fold
from wavecast.runtime.transfer.memory import Memory, as_bits, dtype_of
from wavecast.runtime.transfer.program import ALIGNMENT, Bucket, Placed

__all__ = ("Copier", "TensorCopier", "bytes_of", "is_held_as_sent", "pack", "unpack", "gather", "window_of")


class Copier(Protocol):
    """
    Moves a step's buckets between local memory and staging, and sums up both. On CUDA all work goes to the current
    stream and nothing waits for it.
    """

    def pack(self, step: int, bucket: Bucket, window: torch.Tensor, *, in_place: bool = True) -> torch.Tensor:
        """
        Copy the bucket's cuts into ``window``, cast to the dtype in which they travel, and return it.

        :param in_place: where the only cut lies in memory as it is to travel, return that, and copy nothing
        """
        ...

    def packed(self, step: int, bucket: Bucket, sent: torch.Tensor) -> None:
        """Sum up what :meth:`pack` returned, as it is being sent: not what is packed ahead and never sent."""
        ...

    def unpack(self, step: int, bucket: Bucket, window: torch.Tensor, check: Callable[[], None]) -> None:
        """
        Copy the bucket's cuts out of ``window``, and sum up what local memory holds then. ``window`` is used up.

        :param check: called before memory is written; raises to write no more
        """
        ...

    def sums(self, steps: int) -> list[int]:
        """Return the sum of each step so far, 0 where it has none. The device must be through with its work."""
        ...


class TensorCopier:
    """
    Copies tensor by tensor, on any device.

    :param checksum: sum up at all
    """

    def __init__(self, memory: Memory, *, checksum: bool) -> None:
        self._memory = memory
        self._checksum = checksum
        self._folds: dict[int, list[torch.Tensor]] = {}

    def pack(self, step: int, bucket: Bucket, window: torch.Tensor, *, in_place: bool = True) -> torch.Tensor:
        if in_place and is_held_as_sent(bucket, self._memory, window.device):
            return bytes_of(self._memory.source(bucket.items[0].cut))

        pack(bucket, self._memory, window)
        return window

    def packed(self, step: int, bucket: Bucket, sent: torch.Tensor) -> None:
        if self._checksum:
            self._folds.setdefault(step, []).append(fold(sent))

    def unpack(self, step: int, bucket: Bucket, window: torch.Tensor, check: Callable[[], None]) -> None:
        unpack(bucket, self._memory, window, check=check)
        if self._checksum:
            gather(bucket, self._memory, window)
            self._folds.setdefault(step, []).append(fold(window))

    def sums(self, steps: int) -> list[int]:
        return [
            combine([int(value) for value in self._folds[step]]) if step in self._folds else 0 for step in range(steps)
        ]


def is_held_as_sent(bucket: Bucket, memory: Memory, device: torch.device) -> bool:
    """Tell whether the bucket's only cut lies in memory as it is to be sent from ``device``."""
    if len(bucket.items) != 1 or memory.device != device:
        return False

    cut = bucket.items[0].cut
    if cut.nbytes != bucket.nbytes or not memory.holds_as_is(cut):
        return False

    view = memory.source(cut)
    first = view.storage_offset() * view.itemsize
    return view.is_contiguous() and not (view.data_ptr() % ALIGNMENT or first % ALIGNMENT)


def bytes_of(view: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as bytes."""
    return view.detach().view(-1).view(torch.uint8)


def pack(bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
    """Copy the bucket's cuts from local memory into ``buffer``, cast to the dtype in which they travel."""
    for item in bucket.items:
        window = window_of(item, buffer)
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
        latest = as_bits(window_of(item, buffer))
        for view in memory.targets(item.cut):
            latest = as_bits(view).copy_(latest, non_blocking=buffer.is_cuda)


def gather(bucket: Bucket, memory: Memory, buffer: torch.Tensor) -> None:
    """
    Fill ``buffer`` with what the destination's memory holds now; nothing of its former content is left.

    Of a cut held in several views the one that was written last is read.
    """
    buffer.zero_()
    for item in bucket.items:
        as_bits(window_of(item, buffer)).copy_(as_bits(memory.targets(item.cut)[-1]), non_blocking=buffer.is_cuda)


def window_of(item: Placed, buffer: torch.Tensor) -> torch.Tensor:
    """Return the part of ``buffer`` in which a cut travels, as a tensor of its shape and dtype."""
    cut = item.cut
    return buffer[item.start : item.start + cut.nbytes].view(dtype_of(cut.dtype)).view(cut.extent)


def _clear_padding(item: Placed, buffer: torch.Tensor) -> None:
    """Both ends sum up whole buckets, so the bytes between cuts must be known."""
    stop = item.start + item.cut.nbytes
    over = -stop % ALIGNMENT
    if over:
        buffer[stop : stop + over].zero_()
