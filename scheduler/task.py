"""The unit of scheduling: bytes that must go from some actors to others."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ("Task",)


@dataclass(frozen=True, slots=True)
class Task:
    """
    Bytes that ``senders`` bring to ``receivers`` in one go.

    Actors are plain integers; what is moved is known to whoever dispatches the task, through ``payload``. An actor may
    be sender and receiver of the same task: a copy inside it.

    :ivar id: unique within a schedule
    :ivar senders: actors that hold the bytes, at least one
    :ivar receivers: actors that get them, at least one; each gets all ``nbytes``
    :ivar nbytes: bytes that leave a sender, and bytes that reach each receiver
    :ivar after: ids of tasks that must have finished first (a relay forwards what it received)
    :ivar payload: carried along untouched; takes part in equality
    """

    id: int
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    nbytes: int
    after: tuple[int, ...] = ()
    payload: Hashable = None

    @property
    def members(self) -> tuple[int, ...]:
        """The actors that take part, each once, senders first."""
        return tuple(dict.fromkeys(self.senders + self.receivers))
