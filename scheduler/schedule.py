"""Waves in order, with the lower bounds they are measured against."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from wavecast.scheduler.bounds import Bound, lower_bound
from wavecast.scheduler.coloring import Strategy
from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.order import PortOrder, order_ports
from wavecast.scheduler.ports import PortModel, build_graph
from wavecast.scheduler.strategies import STRATEGIES, choose
from wavecast.scheduler.task import Task

__all__ = ("Wave", "Schedule", "check_strategy", "gather", "plan_waves")

_NO_BOUND = Bound(0, 0)


@dataclass(frozen=True, slots=True)
class Wave:
    """
    Tasks that share no port.

    :ivar tasks: in the order they were given to the planner
    """

    tasks: tuple[Task, ...]

    @property
    def nbytes(self) -> int:
        """Sum of its tasks' bytes."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def longest_nbytes(self) -> int:
        """Bytes of its largest task: what the wave costs when others wait for it."""
        return max((task.nbytes for task in self.tasks), default=0)


@dataclass(frozen=True, slots=True)
class Schedule:
    """
    Waves in the order they run.

    :ivar waves: every task once; no port twice in a wave; dependencies in earlier waves
    :ivar bound: what no schedule of these tasks can go below; zeros when it was not worked out
    :ivar ports: the port model the waves keep to
    :ivar strategy: the strategy that made them; never ``auto``
    :ivar reason: why that one, when it was ``auto`` that chose
    """

    waves: tuple[Wave, ...]
    bound: Bound = _NO_BOUND
    ports: PortModel = "half"
    strategy: str = "given"
    reason: str = ""
    _digest: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _order: list[PortOrder] = field(default_factory=list, init=False, repr=False, compare=False)

    def __reduce__(self) -> tuple[object, ...]:
        # What was worked out stays behind when a schedule travels.
        return type(self), (self.waves, self.bound, self.ports, self.strategy, self.reason)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, wave by wave."""
        return tuple(task for wave in self.waves for task in wave.tasks)

    @property
    def nbytes(self) -> int:
        """Sum of all tasks' bytes."""
        return sum(wave.nbytes for wave in self.waves)

    @property
    def makespan_bytes(self) -> int:
        """Sum over the waves of the largest task: bytes one port moves while all waves pass with a barrier between."""
        return sum(wave.longest_nbytes for wave in self.waves)

    @property
    def gap(self) -> float:
        """
        Makespan over its lower bound, both in bytes: 1.0 is optimal, and what a schedule without bytes has.

        Not a number where there are bytes and no bound was given.
        """
        if self.bound.nbytes:
            return self.makespan_bytes / self.bound.nbytes

        return math.nan if self.makespan_bytes else 1.0

    @property
    def digest(self) -> str:
        """Sha256, in hex, over the waves in order: ids, members, bytes and dependencies of tasks. Never payloads."""
        if not self._digest:
            sha = hashlib.sha256(self.ports.encode())
            for wave in self.waves:
                lines = (f"{t.id} {t.senders} {t.receivers} {t.nbytes} {t.after}\n" for t in wave.tasks)
                sha.update(f"wave {len(wave.tasks)}\n{''.join(lines)}".encode())

            self._digest.append(sha.hexdigest())

        return self._digest[0]

    @property
    def order(self) -> PortOrder:
        """
        The queue of tasks at each port, which :func:`~wavecast.scheduler.run` goes by.

        Worked out at the first access, in a few microseconds a task: ask for it off the event loop if that is too long.

        :raises ScheduleError: when a task comes after one that is in no earlier wave
        """
        if not self._order:
            self._order.append(order_ports([wave.tasks for wave in self.waves], self.ports))

        return self._order[0]


def plan_waves(tasks: Iterable[Task], *, strategy: str = "auto", ports: PortModel = "half") -> Schedule:
    """
    Sort ``tasks`` into waves.

    :param tasks: in any order; their payloads are carried along and never looked at
    :param strategy: a key of :data:`~wavecast.scheduler.STRATEGIES`
    :param ports: ``half``: an actor is in one task a wave; ``full``: it sends one and receives one
    :return: the same schedule for the same tasks, on any machine
    :raises ScheduleError: for an unknown strategy or port model, a repeated id, a task without sender or receiver,
        and for an unknown or cyclic dependency
    """
    tasks = tuple(tasks)
    chosen = check_strategy(strategy)
    graph = build_graph(tasks, ports)
    reason = ""
    if strategy == "auto":
        strategy, waves, reason = choose(graph)
    else:
        waves = chosen(graph)

    return Schedule(gather(tasks, waves), lower_bound(graph), ports, strategy, reason)


def check_strategy(name: str) -> Strategy:
    """
    Return the strategy of that name.

    :raises ScheduleError: when there is none
    """
    chosen = STRATEGIES.get(name) if isinstance(name, str) else None
    if chosen is None:
        raise ScheduleError(f"strategy is {name!r}: it must be one of {', '.join(STRATEGIES)}")

    return chosen


def gather(tasks: Sequence[Task], waves: Sequence[int]) -> tuple[Wave, ...]:
    """Return the waves, empty ones left out, from the wave index of each task."""
    members: list[list[Task]] = [[] for _ in range(max(waves, default=-1) + 1)]
    for task, wave in zip(tasks, waves, strict=True):
        members[wave].append(task)

    return tuple(Wave(tuple(member)) for member in members if member)
