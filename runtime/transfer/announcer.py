"""What an actor says of its runs to those that read its board."""

from __future__ import annotations

import contextlib

import torch

from wavecast.runtime.transfer.board import AGREED, BEGUN, SUMMED, Board
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import RunId
from wavecast.runtime.transfer.run import Run

__all__ = ("Announcer",)


class Announcer:
    """
    Says on the actor's board how its runs begin and end. An actor without a board says nothing.

    :ivar board: ``None`` where there is no GPU, or no program yet
    """

    def __init__(self) -> None:
        self.board: Board | None = None
        self._device: torch.device | None = None
        self._said_of: RunId | None = None
        self._exported: Memory | None = None

    def has_room(self, steps: int) -> bool:
        """Tell whether there is a board for so many steps."""
        return self.board is not None and self.board.steps >= steps

    def make_room(self, steps: int, device: torch.device) -> None:
        """Have a board for so many steps on ``device``, which takes 0.1 s the first time."""
        if not self.has_room(steps) or self._device != device:
            self.board = Board(steps, device)
            self._device = device

    def export(self, memory: Memory | None) -> None:
        """Note which memory others have been told the addresses of; ``None``: none any more."""
        self._exported = memory

    def begin(self, run: Run) -> None:
        """
        Say that ``run`` has begun, as soon as what the device has to do before is done.

        Nothing will be vouched for that is not, or no longer, where others believe it to be.
        """
        self._said_of = run.name
        if self.board is not None:
            self.board.begin(run.name.serial, run.ready)
            run.lends = run.memory is self._exported

    def refuse(self, run: Run) -> None:
        """Say that ``run`` will not begin here: it was planned for another layout. That stays true."""
        self._said_of = None
        if self.board is not None:
            self.board.post(BEGUN, -run.name.serial)

        self.refuse_to_close(run)

    def refuse_to_close(self, run: Run) -> None:
        """Let nobody end ``run`` before the driver does: no peer that waits for this actor is left waiting."""
        if self.board is not None:
            self.board.post(SUMMED, -run.name.serial)
            self.board.post(AGREED, -run.name.serial)

    def take_back(self, name: RunId, *, agreed: bool) -> None:
        """
        Take back what was said of a run, if it was the last one: nobody who comes late is to take it for valid.

        :param agreed: what was said of its end as well
        """
        if self.board is not None and self._said_of == name:
            # On a device that has failed there is nothing left to take back.
            with contextlib.suppress(RuntimeError):
                self.board.take_back(name.serial, agreed=agreed)
