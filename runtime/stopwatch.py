"""Seconds by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ("Stopwatch",)


class Stopwatch:
    """
    Measures phases one after the other.

    :ivar phase: the one under way, or the last
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self.phase = ""

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time of the block to ``phase``."""
        self.phase = phase
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def seconds(self, phase: str) -> float:
        """Return the seconds counted to ``phase``."""
        return self._seconds.get(phase, 0.0)

    @property
    def total(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._began
