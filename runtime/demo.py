"""Actors for the command line: trainers and engines whose every element is known in advance, and so can be checked."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wavecast.runtime.checkpoint import Checkpoint
from wavecast.runtime.demo_memory import DemoMemory, SeparateMemory
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Shard, describe
from wavecast.runtime.transfer.memory import as_bits, dtype_of
from wavecast.runtime.transfer.worker import TransferWorker

__all__ = ("Weights", "DemoActor")

#: Elements worked out at a time: bounds the temporary memory.
_BLOCK = 1 << 22

#: By element size: bits that may be random without making a NaN or an infinity, and the lowest few of a mantissa.
_RANDOM = {1: 0x3F, 2: 0x3FFF, 4: 0x3FFFFFFF, 8: 0x3FFFFFFFFFFFFFFF}
_LOW = {1: 0x1, 2: 0x7, 4: 0xFFF, 8: 0xFFFFFFF}


@dataclass(frozen=True, slots=True)
class Weights:
    """
    What every element of every logical tensor is, step by step, whoever asks.

    :ivar seed: of the pseudo-random bits
    :ivar directory: a checkpoint: step 0 has its values as they are, later steps change low mantissa bits. ``None``:
        every step has random values of its own
    """

    seed: int
    directory: str | None = None

    def write(self, piece: Piece, step: int, view: torch.Tensor, checkpoint: Checkpoint | None) -> None:
        """Fill ``view`` with the elements of ``piece`` at ``step``."""
        for box, window in _blocks(piece.box, view):
            window.copy_(self._values(piece, box, step, window.device, checkpoint))

    def differing(self, piece: Piece, step: int, view: torch.Tensor, checkpoint: Checkpoint | None) -> int:
        """Return how many elements of ``view`` are not, bit for bit, those of ``piece`` at ``step``."""
        return int(self.count_differing(piece, step, view, checkpoint))

    def count_differing(
        self, piece: Piece, step: int, view: torch.Tensor, checkpoint: Checkpoint | None
    ) -> torch.Tensor:
        """Return what :meth:`differing` does as a number on the view's device, without waiting for it."""
        count = torch.zeros((), dtype=torch.int64, device=view.device)
        for box, window in _blocks(piece.box, view):
            wanted = self._values(piece, box, step, window.device, checkpoint)
            count += (as_bits(window) != as_bits(wanted)).sum()

        return count

    def _values(
        self, piece: Piece, box: Box, step: int, device: torch.device, checkpoint: Checkpoint | None
    ) -> torch.Tensor:
        dtype = dtype_of(piece.dtype)
        bits = self._bits(piece, box, step, device)
        lanes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        if checkpoint is None:
            return (bits & _RANDOM[dtype.itemsize]).to(lanes).view(dtype)

        stored = checkpoint.read(piece.tensor, box).to(device=device, dtype=dtype)
        if step == 0:
            return stored

        held = stored.view(lanes)
        flips = (bits & _LOW[dtype.itemsize]).to(lanes)
        # A NaN comes right after the largest float8: where the next bit is set as well, the lowest one stays.
        return (held ^ (flips & ~(held >> 1) if dtype.itemsize == 1 else flips)).view(dtype)

    def _bits(self, piece: Piece, box: Box, step: int, device: torch.device) -> torch.Tensor:
        """Return a pseudo-random int64 for each element, from its place in the logical tensor alone."""
        index = torch.zeros((), dtype=torch.int64, device=device)
        for dim, (start, length) in enumerate(zip(box.offset, box.extent, strict=True)):
            stride = math.prod(piece.global_shape[dim + 1 :])
            line = torch.arange(start, start + length, dtype=torch.int64, device=device) * stride
            index = index.unsqueeze(-1) + line

        name = f"{self.seed}/{step}/{piece.tensor}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
        # In place: billions of elements go through here, and each pass is one over memory.
        mixed = (index + key).mul_(-7046029254386353131)
        mixed = mixed.bitwise_xor_(mixed >> 29).mul_(-4658895280553007687)
        return mixed.bitwise_xor_(mixed >> 32)


class DemoActor(TransferWorker):
    """
    A trainer or an engine without a model: tensors whose every element is known.

    :param memory: what it holds; a layout gives each piece a tensor of its own
    :param weights: what the elements are
    :param device: ``"cpu"``, ``"cuda"``, or ``"cuda:1"`` where the actor sees several GPUs
    """

    def __init__(self, memory: Layout | DemoMemory, weights: Weights, device: str) -> None:
        self._weights = weights
        self._checkpoint = Checkpoint.open(weights.directory) if weights.directory is not None else None
        self._device = torch.device(device)
        if self._device.index is not None:
            torch.cuda.set_device(self._device)

        made = SeparateMemory(memory) if isinstance(memory, Layout) else memory
        shards = made.allocate(device)
        pieces = describe(shards).pieces
        self._held = [(piece, view) for piece, shard in zip(pieces, shards, strict=True) for view in _views(shard)]
        self._shards: list[Shard] = []
        self._shards_of: object = None

    def transfer_shards(self) -> list[Shard]:
        """Return one shard a piece: the same list again for as long as the tensors are the same."""
        if self._shards_of is not self._held:
            self._shards = [
                Shard(piece.tensor, view, piece.box.offset, piece.global_shape) for piece, view in self._held
            ]
            self._shards_of = self._held

        return self._shards

    def fill(self, step: int) -> None:
        """Take on the weights of ``step``, as a trainer does by training."""
        for piece, view in self._held:
            self._weights.write(piece, step, view, self._checkpoint)

        self._finish()

    def spoil(self) -> None:
        """Take on weights that are those of no step."""
        for _, view in self._held:
            as_bits(view).fill_(-1 if view.element_size() > 1 else 255)

        self._finish()

    def differing(self, step: int) -> dict[str, int]:
        """Compare every element held with the weights of ``step``; return the names of tensors that differ."""
        found = [self._weights.count_differing(piece, step, view, self._checkpoint) for piece, view in self._held]
        counts: dict[str, int] = {}
        # Fetched at once: to wait for the device after each of many thousand tensors takes longer than to compare them.
        for (piece, _), count in zip(self._held, torch.stack(found).tolist() if found else (), strict=True):
            if count:
                counts[piece.tensor] = counts.get(piece.tensor, 0) + count

        return counts

    def process_id(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()

    def device_bytes(self) -> int:
        """Return the bytes in use on the actor's GPU, whoever's they are, without what is only cached; 0 on a CPU."""
        if self._device.type != "cuda":
            return 0

        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _views(shard: Shard) -> Iterator[torch.Tensor]:
    if isinstance(shard.view, torch.Tensor):
        yield shard.view


def _blocks(box: Box, view: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
    """Cut along the first dim into blocks of about ``_BLOCK`` elements."""
    if not box.extent:
        yield box, view
        return

    rows = max(_BLOCK // max(math.prod(box.extent[1:]), 1), 1)
    for start in range(0, box.extent[0], rows):
        length = min(rows, box.extent[0] - start)
        offset = (box.offset[0] + start, *box.offset[1:])
        yield Box(offset, (length, *box.extent[1:])), view.narrow(0, start, length)
