"""Actors as threads of one process: the communicator for tests and for trying out programs."""

from __future__ import annotations

import threading
from collections import Counter

import torch

from wavecast.runtime.transfer.comm import PASSED, CommunicatorError, Deadline, Fence, MoveTimeout

__all__ = ("FakeFabric", "FakeCommunicator")


class FakeFabric:
    """What connects the fake communicators of one group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Condition()
        self._mail: dict[tuple[int, int, int], torch.Tensor] = {}
        self._posted: Counter[tuple[int, int]] = Counter()
        self._awaited: Counter[tuple[int, int]] = Counter()
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
                self._mail[sender, receiver, self._posted[sender, receiver]] = data.clone()
                self._posted[sender, receiver] += 1
                self.log.append((sender, receiver, data.numel()))

            self._lock.notify_all()

    def expect(self, sender: int, receiver: int) -> int:
        """Return the number of the next message from ``sender`` to ``receiver``: it is theirs who asked first."""
        with self._lock:
            self._check()
            self._awaited[sender, receiver] += 1
            return self._awaited[sender, receiver] - 1

    def take(self, sender: int, receiver: int, number: int, deadline: Deadline) -> torch.Tensor:
        """Wait for a message from ``sender`` to ``receiver``."""
        with self._lock:
            while True:
                self._check()
                found = self._mail.pop((sender, receiver, number), None)
                if found is not None:
                    return found

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
        self._number = fabric.expect(sender, receiver)

    def finish(self, deadline: Deadline) -> None:
        data = self._fabric.take(self._sender, self._receiver, self._number, deadline)
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
        self.exports = False
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
