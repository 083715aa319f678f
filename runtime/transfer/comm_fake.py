"""Actors as threads of one process: the communicator for tests and for trying out programs."""

from __future__ import annotations

import threading
from collections import deque

import torch

from wavecast.runtime.transfer.comm import PASSED, CommunicatorError, Deadline, Fence, MoveTimeout

__all__ = ("FakeFabric", "FakeCommunicator")


class FakeFabric:
    """What connects the fake communicators of one group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Condition()
        self._mail: dict[tuple[int, int], deque[torch.Tensor]] = {}
        self._aborted = False
        self.log: list[tuple[int, int, int]] = []

    def communicator(self, rank: int) -> FakeCommunicator:
        """Return the end of actor ``rank``."""
        if not 0 <= rank < self.size:
            raise CommunicatorError(f"rank {rank} is not in a group of {self.size}")

        return FakeCommunicator(self, rank)

    def post(self, sender: int, receivers: tuple[int, ...], data: torch.Tensor) -> None:
        """Put a copy of ``data`` in each receiver's mailbox."""
        with self._lock:
            self._check()
            for receiver in receivers:
                self._mail.setdefault((sender, receiver), deque()).append(data.clone())
                self.log.append((sender, receiver, data.numel()))

            self._lock.notify_all()

    def take(self, sender: int, receiver: int, deadline: Deadline) -> torch.Tensor:
        """Wait for the next message from ``sender`` to ``receiver``."""
        with self._lock:
            while True:
                self._check()
                box = self._mail.get((sender, receiver))
                if box:
                    return box.popleft()

                if deadline.passed:
                    raise MoveTimeout(f"nothing came from actor {sender} to actor {receiver} before the deadline")

                self._lock.wait(deadline.left)

    def abort(self) -> None:
        """Fail every wait and every later use."""
        with self._lock:
            self._aborted = True
            self._lock.notify_all()

    def _check(self) -> None:
        if self._aborted:
            raise CommunicatorError("the communicator was aborted")


class _Sent:
    def finish(self, deadline: Deadline) -> None:
        pass


class _Expected:
    def __init__(self, fabric: FakeFabric, sender: int, receiver: int, buffer: torch.Tensor) -> None:
        self._fabric = fabric
        self._sender = sender
        self._receiver = receiver
        self._buffer = buffer

    def finish(self, deadline: Deadline) -> None:
        data = self._fabric.take(self._sender, self._receiver, deadline)
        if data.numel() != self._buffer.numel():
            self._fabric.abort()
            raise CommunicatorError(
                f"actor {self._receiver} expected {self._buffer.numel()} bytes from actor {self._sender}, "
                f"which sent {data.numel()}"
            )

        self._buffer.copy_(data)


class FakeCommunicator:
    """A :class:`~wavecast.runtime.transfer.comm.Communicator` whose wire is a dictionary of queues."""

    def __init__(self, fabric: FakeFabric, rank: int) -> None:
        self._fabric = fabric
        self.rank = rank
        self.device = torch.device("cpu")
        self.device_bytes = 0

    def start(
        self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline
    ) -> _Sent | _Expected:
        if self.rank == sender:
            self._fabric.post(sender, receivers, buffer)
            return _Sent()

        if self.rank not in receivers:
            raise CommunicatorError(f"actor {self.rank} takes no part in a move from {sender} to {receivers}")

        return _Expected(self._fabric, sender, self.rank, buffer)

    def fence(self) -> Fence:
        return PASSED

    def abort(self) -> None:
        self._fabric.abort()

    def close(self) -> None:
        self._fabric.abort()
