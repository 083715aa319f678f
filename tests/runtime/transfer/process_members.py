"""Communicators in processes of their own, used from here as if they were in this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import cast

import torch

from wavecast.runtime.transfer.comm import PASSED, Communicator, CommunicatorError, Deadline, Fence, Move, MoveTimeout

__all__ = ("Recipe", "start_members")

#: Connects one member; called in its own process with its rank.
Recipe = Callable[[int], Communicator]


class ProcessMember:
    """
    A member whose communicator lives in another process: NCCL's ranks are processes, and torch's calls take them so.

    Buffers are copied there and back; a move is over, fence and all, when it is finished.
    """

    def __init__(self, rank: int, calls: Connection, control: Connection, process: multiprocessing.Process) -> None:
        self.rank = rank
        self.device = torch.device("cpu")
        self.device_bytes = 0
        self.exports = False
        self._calls = calls
        self._control = control
        self._process = process
        self._lock = threading.Lock()

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        key = self._call("start", bytes(buffer.tolist()), sender, receivers, deadline.left)
        return _Remote(self, cast("int", key), buffer)

    def finish(self, key: int, buffer: torch.Tensor, deadline: Deadline) -> None:
        data = cast("bytes", self._call("finish", key, deadline.left))
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def fence(self) -> Fence:
        return PASSED

    def abort(self) -> None:
        self._tell("abort")

    def close(self) -> None:
        self._tell("close")

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _call(self, *request: object) -> object:
        with self._lock:
            self._calls.send(request)
            answer = self._calls.recv()

        if isinstance(answer, Exception):
            raise answer

        return answer

    def _tell(self, what: str) -> None:
        self._control.send(what)
        self._control.recv()


class _Remote:
    def __init__(self, member: ProcessMember, key: int, buffer: torch.Tensor) -> None:
        self._member = member
        self._key = key
        self._buffer = buffer

    def finish(self, deadline: Deadline) -> None:
        self._member.finish(self._key, self._buffer, deadline)


def start_members(recipe: Recipe, size: int) -> Sequence[ProcessMember]:
    """Start ``size`` processes, each with its member connected."""
    context = multiprocessing.get_context("spawn")
    members: list[ProcessMember] = []
    for rank in range(size):
        calls, their_calls = context.Pipe()
        control, their_control = context.Pipe()
        process = context.Process(target=_serve, args=(recipe, rank, their_calls, their_control), daemon=True)
        process.start()
        members.append(ProcessMember(rank, calls, control, cast("multiprocessing.Process", process)))

    for member in members:
        answer = member._calls.recv()
        if isinstance(answer, Exception):
            raise answer

    return members


def _serve(recipe: Recipe, rank: int, calls: Connection, control: Connection) -> None:
    try:
        communicator = recipe(rank)
    except Exception as error:
        calls.send(CommunicatorError(repr(error)))
        return

    threading.Thread(target=_listen, args=(communicator, control), daemon=True).start()
    if communicator.device.type == "cuda":
        torch.cuda.set_device(communicator.device)

    calls.send(None)
    moves: dict[int, tuple[Move, torch.Tensor]] = {}
    with contextlib.suppress(EOFError):
        while True:
            name, *args = calls.recv()
            try:
                calls.send(_answer(communicator, moves, name, *args))
            except (CommunicatorError, MoveTimeout) as error:
                calls.send(type(error)(str(error)))


def _answer(
    communicator: Communicator, moves: dict[int, tuple[Move, torch.Tensor]], name: str, *args: object
) -> object:
    if name == "start":
        data, sender, receivers, seconds = cast("tuple[bytes, int, tuple[int, ...], float]", args)
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(communicator.device)
        move = communicator.start(buffer, sender=sender, receivers=receivers, deadline=Deadline(seconds))
        key = len(moves)
        moves[key] = (move, buffer)
        return key

    key, seconds = cast("tuple[int, float]", args)
    move, buffer = moves[key]
    deadline = Deadline(seconds)
    move.finish(deadline)
    communicator.fence().wait(deadline)
    return bytes(buffer.cpu().tolist())


def _listen(communicator: Communicator, control: Connection) -> None:
    """Abort and close come from another thread, as they do on an actor."""
    with contextlib.suppress(EOFError):
        while True:
            getattr(communicator, control.recv())()
            control.send(None)
