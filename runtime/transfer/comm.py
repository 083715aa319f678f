"""The contract of whatever carries bytes between actors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ("Communicator", "Move", "Fence", "CudaFence", "PASSED", "Deadline", "CommunicatorError", "MoveTimeout")


#: How long a poll of a CUDA event sleeps: well below a bucket's time on the wire, well above a spin.
_POLL_SECONDS = 20e-6


class CommunicatorError(Exception):
    """Raised when the transport failed or was aborted. The communicator must not be used again."""


class MoveTimeout(CommunicatorError):
    """Raised when a move was not over by its deadline. The communicator must not be used again."""


class Deadline:
    """A moment on this process's monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the moment; never below a millisecond, so that a wait stays a wait."""
        return max(self._end - time.monotonic(), 0.001)

    @property
    def passed(self) -> bool:
        """Whether the moment is over."""
        return time.monotonic() >= self._end


class Move(Protocol):
    """One transfer under way."""

    def finish(self, deadline: Deadline) -> None:
        """
        Order what follows after the move.

        On a CPU transport this blocks until the bytes are there. On a CUDA transport it returns at once and makes the
        *current stream* wait; a :class:`Fence` put after it can be waited for. The buffer may be reused by work that
        comes after this call (on the same stream, for CUDA). May be called again, for another stream.

        :raises MoveTimeout: when the deadline passed first
        :raises CommunicatorError: when the transport failed or was aborted
        """
        ...


class Fence(Protocol):
    """A point in the order of moves and device work."""

    def wait(self, deadline: Deadline) -> None:
        """
        Block until everything before the fence is through.

        :raises MoveTimeout: when the deadline passed first
        :raises CommunicatorError: when the transport failed or was aborted
        """
        ...


class _Passed:
    def wait(self, deadline: Deadline) -> None:
        pass


#: The fence of transports whose moves are over when they are finished.
PASSED: Fence = _Passed()


class CudaFence:
    """
    The fence of device work.

    :param event: recorded where the fence stands
    :param aborted: tells whether the work was given up
    """

    def __init__(self, event: torch.cuda.Event, aborted: Callable[[], bool]) -> None:
        self._event = event
        self._aborted = aborted

    def wait(self, deadline: Deadline) -> None:
        # Polled, not synchronised: a deadline or an abort must be able to end it.
        while not self._event.query():
            if self._aborted():
                raise CommunicatorError("the communicator was aborted")

            if deadline.passed:
                raise MoveTimeout("the device had not finished by the deadline")

            time.sleep(_POLL_SECONDS)

        if self._aborted():
            # An aborted kernel ends like any other; what it should have written may be missing.
            raise CommunicatorError("the communicator was aborted")


class Communicator(Protocol):
    """
    One actor's end of a private group of actors.

    All members of a move call :meth:`start` with the same sender, receivers and size. A member must start its moves in
    the order of the schedule; moves that share no member need no order. One thread starts and finishes moves; only
    :meth:`abort` may be called from another.
    """

    @property
    def rank(self) -> int:
        """This actor's number."""
        ...

    @property
    def device(self) -> torch.device:
        """Where buffers must be."""
        ...

    @property
    def exports(self) -> bool:
        """Whether other processes map the buffers that are sent, and keep them mapped: weights are no such."""
        ...

    @property
    def device_bytes(self) -> int:
        """Device memory the communicator itself took, as far as it can be measured."""
        ...

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        """
        Begin to move ``buffer`` (1-d, uint8, contiguous, on :attr:`device`) from ``sender`` to all ``receivers``.

        The sender's buffer is read, each receiver's is written; neither may be touched until the move is finished.
        On CUDA the move starts after what the current stream holds.

        :raises CommunicatorError: when the transport failed or was aborted
        """
        ...

    def fence(self) -> Fence:
        """Put a fence after the moves finished so far, and after what the current stream holds."""
        ...

    def abort(self) -> None:
        """Fail every move under way or still to come, here and now. May be called from any thread, and again."""
        ...

    def close(self) -> None:
        """Release everything. The communicator must not be used again. May be called again."""
        ...
