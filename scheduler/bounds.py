"""What no schedule can go below."""

from __future__ import annotations

from dataclasses import dataclass

from wavecast.scheduler.ports import TaskGraph

__all__ = ("Bound", "lower_bound")


@dataclass(frozen=True, slots=True)
class Bound:
    """
    Lower bounds of a set of tasks.

    :ivar waves: no schedule has fewer waves; at least the number of tasks on the busiest port
    :ivar nbytes: bytes through the busiest port
    """

    waves: int
    nbytes: int


def lower_bound(graph: TaskGraph) -> Bound:
    """Return the bounds of ``graph``."""
    return Bound(
        waves=max(max(graph.degrees(), default=0), max(graph.depths(), default=-1) + 1),
        nbytes=max(graph.loads(), default=0),
    )
