"""What a task costs: the time of a message as a start-up and a rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from wavecast.scheduler.task import Task

__all__ = ("LinkCost", "TaskCost")

TaskCost = Callable[[Task], float]
"""Return the seconds that a task keeps its members busy."""


@dataclass(frozen=True, slots=True)
class LinkCost:
    """
    The alpha-beta model of a link (Hockney 1994): a message takes a start-up and its bytes at a rate.

    A :data:`TaskCost`. The defaults are of NCCL between two H200 of one host.

    :ivar alpha_seconds: start-up of a task, whatever its size
    :ivar nbytes_per_second: rate of a port once it is going
    :ivar branching: how much longer a message takes for each receiver after the first, as a share of the time its bytes
        take: 0 when a switch copies it, 1 when its sender sends it once to each
    :raises ValueError: for a start-up or branching that is negative or infinite, a rate that is not positive, and for
        what is no number
    """

    alpha_seconds: float = 80e-6
    nbytes_per_second: float = 360e9
    branching: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha_seconds", "nbytes_per_second", "branching"):
            value = getattr(self, name)
            if not hasattr(value, "__float__"):
                raise ValueError(f"{name} is {value!r}: it must be a number")

        if not 0 <= self.alpha_seconds < inf:
            raise ValueError(f"alpha_seconds is {self.alpha_seconds}: it must be finite and 0 or more")

        if not self.nbytes_per_second > 0:
            raise ValueError(f"nbytes_per_second is {self.nbytes_per_second}: it must be more than 0")

        if not 0 <= self.branching < inf:
            raise ValueError(f"branching is {self.branching}: it must be finite and 0 or more")

    def seconds(self, nbytes: float, *, receivers: int = 1) -> float:
        """Return how long a message of ``nbytes`` takes to ``receivers``."""
        return self.alpha_seconds + nbytes / self.nbytes_per_second * (1 + self.branching * (receivers - 1))

    def __call__(self, task: Task) -> float:
        """Return how long ``task`` takes."""
        return self.seconds(task.nbytes, receivers=len(task.receivers))

    def allow(self, *, factor: float = 10.0, least_seconds: float = 1.0) -> TaskCost:
        """
        Return how long to let each task take: for :func:`~wavecast.scheduler.run`'s ``task_seconds``.

        :param factor: times the cost
        :param least_seconds: but not less than this
        :raises ValueError: for a factor or seconds that are no number from 0
        """
        for name, value in (("factor", factor), ("least_seconds", least_seconds)):
            if not (hasattr(value, "__float__") and value >= 0):
                raise ValueError(f"{name} is {value!r}: it must be 0 or more")

        return lambda task: max(least_seconds, factor * self(task))
