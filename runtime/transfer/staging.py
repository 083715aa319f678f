"""Two buckets of extra memory: one is filled or emptied while the other travels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from wavecast.runtime.transfer.checksum import fold
from wavecast.runtime.transfer.comm import Communicator, Deadline, Move
from wavecast.runtime.transfer.copying import gather, pack, unpack
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.program import Bucket

__all__ = ("Leg", "Staging")


@dataclass(frozen=True, slots=True)
class Leg:
    """
    One actor's part in one step.

    :ivar buckets: what travels, in order; the same on all members
    :ivar check: called before memory is read or written; raises once the run has been given up
    :ivar ready: on CUDA, what the actor's own stream had to do before the run
    """

    sender: int
    receivers: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    memory: Memory
    checksum: bool
    deadline: Deadline
    check: Callable[[], None]
    ready: torch.cuda.Event | None = None


class _Slot:
    """One bucket of memory, and on CUDA a stream on which all that concerns it runs in order."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._move: Move | None = None
        self._bucket: Bucket | None = None

    @contextlib.contextmanager
    def in_order(self, ready: torch.cuda.Event | None) -> Iterator[None]:
        if self.stream is None:
            yield
            return

        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            yield

    def hold(self, move: Move, bucket: Bucket) -> None:
        """Remember what is under way."""
        self._move = move
        self._bucket = bucket

    def settle(self, deadline: Deadline) -> Bucket | None:
        """Order what follows after the move under way, if any; return its bucket."""
        move, self._move = self._move, None
        bucket, self._bucket = self._bucket, None
        if move is not None:
            move.finish(deadline)

        return bucket


class Staging:
    """
    The slots of one actor, on its communicator's device.

    :param bucket_bytes: bytes of each of the two slots
    :ivar nbytes: all the memory held
    """

    def __init__(self, bucket_bytes: int, communicator: Communicator) -> None:
        self.nbytes = 2 * bucket_bytes
        self._communicator = communicator
        self._slots = (_Slot(bucket_bytes, communicator.device), _Slot(bucket_bytes, communicator.device))

    def send(self, leg: Leg) -> list[int]:
        """
        Pack and send the leg's buckets in order, and return their sums, if asked for.

        Blocks until all is through. While one bucket travels the next one is packed.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """
        sums: list[torch.Tensor] = []
        for index, bucket in enumerate(leg.buckets):
            slot = self._slots[index % 2]
            with slot.in_order(leg.ready):
                slot.settle(leg.deadline)
                leg.check()
                window = slot.buffer[: bucket.nbytes]
                pack(bucket, leg.memory, window)
                slot.hold(self._start(window, leg), bucket)
                if leg.checksum:
                    sums.append(fold(window))

        for slot in self._in_order_of_use(leg):
            with slot.in_order(leg.ready):
                slot.settle(leg.deadline)
                self._communicator.drain(leg.deadline)

        return [int(value) for value in sums]

    def receive(self, leg: Leg) -> list[int]:
        """
        Receive and unpack the leg's buckets in order, and return the sums of what was written, if asked for.

        Blocks until all is through. While one bucket travels the one before is unpacked.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """
        sums: list[torch.Tensor] = []
        for index, bucket in enumerate(leg.buckets):
            slot = self._slots[index % 2]
            with slot.in_order(leg.ready):
                self._write(slot, leg, sums)
                slot.hold(self._start(slot.buffer[: bucket.nbytes], leg), bucket)

        for slot in self._in_order_of_use(leg):
            with slot.in_order(leg.ready):
                self._write(slot, leg, sums)
                self._communicator.drain(leg.deadline)

        return [int(value) for value in sums]

    def _start(self, window: torch.Tensor, leg: Leg) -> Move:
        return self._communicator.start(window, sender=leg.sender, receivers=leg.receivers, deadline=leg.deadline)

    def _write(self, slot: _Slot, leg: Leg, sums: list[torch.Tensor]) -> None:
        bucket = slot.settle(leg.deadline)
        if bucket is None:
            return

        leg.check()
        window = slot.buffer[: bucket.nbytes]
        unpack(bucket, leg.memory, window)
        if leg.checksum:
            gather(bucket, leg.memory, window)
            sums.append(fold(window))

    def _in_order_of_use(self, leg: Leg) -> tuple[_Slot, ...]:
        return self._slots if len(leg.buckets) % 2 == 0 else self._slots[::-1]
