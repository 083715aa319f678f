"""Two buckets of extra memory: one is filled or emptied while the other travels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from wavecast.runtime.transfer.comm import Communicator, Deadline, Fence, Move
from wavecast.runtime.transfer.copying import Copier
from wavecast.runtime.transfer.program import Bucket

__all__ = ("Leg", "Staging")


@dataclass(frozen=True, slots=True)
class Leg:
    """
    One actor's part in one step.

    :ivar buckets: what travels, in order; the same on all members
    :ivar ahead: what this actor sends first in its next step, if it does: it can be packed while this step travels
    :ivar step: the step's position in the actor's program
    :ivar forwards: this actor sends on what it received in the same run
    :ivar meet: called before a bucket is sent or received; blocks until the other members have begun the run too
    :ivar check: called before memory is read or written; raises once the run has been given up
    """

    step: int
    sender: int
    receivers: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    ahead: Bucket | None
    forwards: bool
    copier: Copier
    deadline: Deadline
    meet: Callable[[], None]
    check: Callable[[], None]


class _Slot:
    """One bucket of memory, and on CUDA a stream on which all that concerns it runs in order."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        #: Orders what follows after the move under way; ``None`` when there is none.
        self.settle: Callable[[], Fence] | None = None
        #: The bucket that is packed, maybe ahead of its step, and what is to be sent of it.
        self.packed: Bucket | None = None
        self.window = self.buffer

    @contextlib.contextmanager
    def in_order(self) -> Iterator[None]:
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield


class Staging:
    """
    The slots of one actor, on its communicator's device.

    A step is queued as far as the transport lets it: on CUDA nothing here waits for the device, and the fences that a
    step returns tell when its bytes have left or arrived. What remains to be done with them (unpacking, summing up)
    goes on while the next step travels. :meth:`finish` waits for that too.

    :param bucket_bytes: bytes of each of the two slots
    :ivar nbytes: all the memory held
    """

    def __init__(self, bucket_bytes: int, communicator: Communicator) -> None:
        self.nbytes = 2 * bucket_bytes
        self._communicator = communicator
        self._slots = (_Slot(bucket_bytes, communicator.device), _Slot(bucket_bytes, communicator.device))
        self._turn = 0

    def begin(self, ready: torch.cuda.Event | None) -> None:
        """Start a run: nothing is packed, and device work waits for ``ready``."""
        self._turn = 0
        for slot in self._slots:
            slot.settle = None
            slot.packed = None
            if slot.stream is not None and ready is not None:
                slot.stream.wait_event(ready)

    def send(self, leg: Leg) -> list[Fence]:
        """
        Pack and send the leg's buckets in order; return the fences after which they have left.

        While one bucket travels the next one is packed, that of the next step included.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """
        if leg.forwards:
            self._join_streams()

        for bucket in leg.buckets:
            slot = self._next_slot()
            self._pack(slot, bucket, leg.step, leg)
            slot.packed = None
            leg.meet()
            with slot.in_order():
                move = self._communicator.start(
                    slot.window, sender=leg.sender, receivers=leg.receivers, deadline=leg.deadline
                )
                leg.copier.packed(leg.step, bucket, slot.window)

            def settle(move: Move = move, slot: _Slot = slot) -> Fence:
                move.finish(leg.deadline)
                # What was sent in place is its owner's alone again.
                slot.window = slot.buffer
                return self._communicator.fence()

            slot.settle = settle

        if leg.ahead is not None:
            self._pack(self._slots[self._turn], leg.ahead, leg.step + 1, leg)

        return self._arrive()

    def receive(self, leg: Leg) -> list[Fence]:
        """
        Receive and unpack the leg's buckets in order; return the fences after which they have arrived.

        While one bucket travels the one before is unpacked and what was written is summed up.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """

        def unpack(bucket: Bucket, window: torch.Tensor) -> None:
            leg.copier.unpack(leg.step, bucket, window, leg.check)

        return self._take(leg, unpack)

    def carry(self, leg: Leg) -> list[Fence]:
        """
        Let the leg's buckets go through here, from or to others on this GPU; return the fences after which they have.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """
        return self._take(leg, lambda bucket, window: leg.check())

    def finish(self, deadline: Deadline) -> None:
        """
        Block until all device work of the run is through.

        :raises CommunicatorError: when the transport failed, was aborted or was too slow
        """
        for slot in self._slots:
            with slot.in_order():
                self._communicator.fence().wait(deadline)

    def streams(self) -> tuple[torch.cuda.Stream, ...]:
        """Return the slots' streams."""
        return tuple(slot.stream for slot in self._slots if slot.stream is not None)

    def _take(self, leg: Leg, use: Callable[[Bucket, torch.Tensor], None]) -> list[Fence]:
        for bucket in leg.buckets:
            slot = self._next_slot()
            self._settle(slot)
            slot.packed = None
            leg.meet()
            with slot.in_order():
                window = slot.buffer[: bucket.nbytes]
                move = self._communicator.start(
                    window, sender=leg.sender, receivers=leg.receivers, deadline=leg.deadline
                )

            def settle(move: Move = move, bucket: Bucket = bucket, window: torch.Tensor = window) -> Fence:
                move.finish(leg.deadline)
                arrived = self._communicator.fence()
                use(bucket, window)
                return arrived

            slot.settle = settle

        return self._arrive()

    def _join_streams(self) -> None:
        """Let what follows on either slot come after what both have unpacked."""
        first, second = self._slots
        if first.stream is not None and second.stream is not None:
            first.stream.wait_stream(second.stream)
            second.stream.wait_stream(first.stream)

    def _next_slot(self) -> _Slot:
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        return slot

    def _pack(self, slot: _Slot, bucket: Bucket, step: int, leg: Leg) -> None:
        if slot.packed is bucket:
            return

        self._settle(slot)
        leg.check()
        with slot.in_order():
            window = slot.buffer[: bucket.nbytes]
            slot.window = leg.copier.pack(step, bucket, window, in_place=not self._communicator.exports)

        slot.packed = bucket

    def _settle(self, slot: _Slot) -> Fence | None:
        settle, slot.settle = slot.settle, None
        if settle is None:
            return None

        with slot.in_order():
            return settle()

    def _arrive(self) -> list[Fence]:
        """Settle both slots in the order of their use: what travelled has a fence, what follows it here has not."""
        fences = [self._settle(self._slots[turn]) for turn in (self._turn, 1 - self._turn)]
        return [fence for fence in fences if fence is not None]
