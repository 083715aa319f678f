"""What one call of ``sync()`` asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wavecast.runtime.selection import Only
from wavecast.scheduler import TaskReceipt

__all__ = ("Progress", "SyncRequest")

#: Called on the event loop with the receipt of every task that has ended.
Progress = Callable[[TaskReceipt], object]


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """
    What one call of ``sync()`` asked for.

    :ivar version: ``None``: one more than the newest
    :ivar deadline: seconds for the whole call
    :ivar waited: how many of them had passed before this run of it
    :ivar from_peer: the sources are another replica's actors, whose hooks are left alone
    """

    version: int | None
    deadline: float
    only: Only
    validate: bool
    dry_run: bool
    progress: Progress | None
    waited: float = 0.0
    from_peer: bool = False

    @property
    def seconds_left(self) -> float:
        """What is left of the deadline as the run begins."""
        return max(self.deadline - self.waited, 0.001)
