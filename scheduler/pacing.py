"""How long to work before others on the event loop get a turn."""

from __future__ import annotations

import time

__all__ = ("TimeSlice",)


class TimeSlice:
    """
    Add up work on an event loop that has no pause in between.

    Work within a millisecond of the last counts as one stretch, whoever does it: many callbacks of one turn of the loop
    keep others waiting as much as a long one does.
    """

    def __init__(self, *, seconds: float = 0.004, pause_seconds: float = 0.001) -> None:
        self._seconds = seconds
        self._pause_seconds = pause_seconds
        self._started = self._worked_until = float("-inf")

    def is_over(self) -> bool:
        """Tell whether it is time for a pause; a stretch starts here if there was one."""
        now = time.perf_counter()
        if now - self._worked_until > self._pause_seconds:
            self._started = self._worked_until = now

        return now - self._started > self._seconds

    def worked(self) -> None:
        """Note that work was done until now."""
        self._worked_until = time.perf_counter()

    def paused(self) -> None:
        """Note that others had their turn."""
        self._worked_until = float("-inf")
