"""Actors as threads of one process: the communicator for tests and for trying out programs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from wavecast.runtime.transfer.comm import PASSED, CommunicatorError, Deadline, Fence, MoveTimeout

__all__ = ("FakeFabric", "FakeCommunicator")


class FakeFabric:
    """
    What connects the fake communicators of one group.

    A buffer is read as its receiver takes it, not as it is sent: who writes to it before its move is finished is found
    out, as on NCCL and CUDA IPC.

    :ivar log: sender, receiver and bytes of each message, as they were sent
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Condition()
        self._offered: dict[_Message, torch.Tensor] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._awaited: Counter[tuple[int, int]] = Counter()
        self._aborted = False
        self.log: list[tuple[int, int, int]] = []

    def communicator(self, rank: int) -> FakeCommunicator:
        """Return the end of actor ``rank``."""
        if not 0 <= rank < self.size:
            raise CommunicatorError(f"rank {rank} is not in a group of {self.size}")

        return FakeCommunicator(self, rank)

    def post(self, sender: int, receivers: tuple[int, ...], data: torch.Tensor) -> tuple[_Message, ...]:
        """Let each of ``receivers`` take ``data``."""
        with self._lock:
            self._check()
            messages = tuple(_Message(sender, receiver, self._sent[sender, receiver]) for receiver in receivers)
            for message in messages:
                self._offered[message] = data
                self._sent[sender, message.receiver] += 1
                self.log.append((sender, message.receiver, data.numel()))

            self._lock.notify_all()
            return messages

    def expect(self, sender: int, receiver: int) -> _Message:
        """Return the next message from ``sender`` to ``receiver``: it is theirs who asked first."""
        with self._lock:
            self._check()
            self._awaited[sender, receiver] += 1
            return _Message(sender, receiver, self._awaited[sender, receiver] - 1)

    def take(self, message: _Message, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Wait for ``message`` and copy it."""
        with self._lock:
            if not self._wait_for(lambda: message in self._offered, deadline):
                raise MoveTimeout(
                    f"nothing came from actor {message.sender} to actor {message.receiver} before the deadline"
                )

            data = self._offered[message]
            if data.numel() != buffer.numel():
                self.abort()
                raise CommunicatorError(
                    f"actor {message.receiver} expected {buffer.numel()} bytes from actor {message.sender}, "
                    f"which sent {data.numel()}"
                )

            buffer.copy_(data)
            del self._offered[message]
            self._lock.notify_all()

    def await_taken(self, messages: tuple[_Message, ...], deadline: Deadline) -> None:
        """Wait until all of ``messages`` have been taken."""
        with self._lock:
            if not self._wait_for(lambda: self._offered.keys().isdisjoint(messages), deadline):
                late = [message.receiver for message in messages if message in self._offered]
                raise MoveTimeout(f"actors {late} had not taken what actor {messages[0].sender} sent by the deadline")

    def abort(self) -> None:
        """Fail every wait and every later use."""
        with self._lock:
            self._aborted = True
            self._lock.notify_all()

    def _wait_for(self, condition: Callable[[], bool], deadline: Deadline) -> bool:
        while True:
            self._check()
            if condition():
                return True

            if deadline.passed:
                return False

            self._lock.wait(deadline.left)

    def _check(self) -> None:
        if self._aborted:
            raise CommunicatorError("the communicator was aborted")


class _Message(NamedTuple):
    sender: int
    receiver: int
    number: int


class _Sent:
    def __init__(self, fabric: FakeFabric, messages: tuple[_Message, ...]) -> None:
        self._fabric = fabric
        self._messages = messages

    def finish(self, deadline: Deadline) -> None:
        self._fabric.await_taken(self._messages, deadline)


class _Expected:
    def __init__(self, fabric: FakeFabric, message: _Message, buffer: torch.Tensor) -> None:
        self._fabric = fabric
        self._message = message
        self._buffer: torch.Tensor | None = buffer

    def finish(self, deadline: Deadline) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._fabric.take(self._message, buffer, deadline)


class FakeCommunicator:
    """A :class:`~wavecast.runtime.transfer.comm.Communicator` whose wire is a dictionary."""

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
            return _Sent(self._fabric, self._fabric.post(sender, receivers, buffer))

        if self.rank not in receivers:
            raise CommunicatorError(f"actor {self.rank} takes no part in a move from {sender} to {receivers}")

        return _Expected(self._fabric, self._fabric.expect(sender, self.rank), buffer)

    def fence(self) -> Fence:
        return PASSED

    def abort(self) -> None:
        self._fabric.abort()

    def close(self) -> None:
        self._fabric.abort()
