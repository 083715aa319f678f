"""Replay a schedule against a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from wavecast.scheduler.cost import TaskCost
from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.release import ReleaseState
from wavecast.scheduler.schedule import Schedule

__all__ = ("Simulation", "simulate")


@dataclass(frozen=True, slots=True)
class Simulation:
    """
    What a run would look like if every task took as long as its cost says.

    :ivar seconds: end of the last task
    :ivar started: per task, in schedule order, seconds from the start of the run
    :ivar finished: per task, in schedule order, seconds from the start of the run
    :ivar busy: per actor, in rising order, (actor, seconds it takes part in at least one task)
    :ivar critical_path: ids of tasks, each of which set the next one free, up to the one that ends last
    """

    seconds: float
    started: tuple[float, ...]
    finished: tuple[float, ...]
    busy: tuple[tuple[int, float], ...]
    critical_path: tuple[int, ...]


def simulate(
    schedule: Schedule, cost: TaskCost, *, barrier: bool = False, lookahead: int | None = None, in_flight: int = 1
) -> Simulation:
    """
    Run ``schedule`` on a virtual clock, by the very rules of :func:`~wavecast.scheduler.run`.

    With more than one task in flight an actor still works them one after the other: a task begins when it is dispatched
    and the task before it on each of its ports has ended.

    :param cost: seconds a task takes once its members are free, such as a :class:`~wavecast.scheduler.LinkCost`
    :param barrier: no task starts before the wave before it is over; the same as ``lookahead=0``
    :param lookahead: waves past the oldest unfinished one that may start
    :param in_flight: unfinished tasks an actor may have
    :raises ValueError: for a ``lookahead`` or ``in_flight`` that cannot be, and for a cost that is no number from 0
    :raises ScheduleError: when a task has no sender or receiver, or comes after one that is in no earlier wave, and
        when tasks of a wave wait for each other
    """
    tasks = schedule.tasks
    state = ReleaseState(schedule.order, lookahead=0 if barrier else lookahead, in_flight=in_flight)
    started = [0.0] * len(tasks)
    finished = [0.0] * len(tasks)
    cause = [-1] * len(tasks)
    port_free: list[tuple[float, int]] = [(0.0, -1)] * len(schedule.order.queues)
    running: list[tuple[float, int]] = []

    def begin(positions: list[int], now: float, by: int) -> None:
        for position in positions:
            start, cause[position] = max([(now, by), *(port_free[port] for port in schedule.order.ports[position])])
            started[position] = start
            seconds = cost(tasks[position])
            if not (hasattr(seconds, "__float__") and seconds >= 0):
                raise ValueError(f"task {tasks[position].id} costs {seconds!r} seconds: it must be 0 or more")

            finished[position] = start + seconds
            for port in schedule.order.ports[position]:
                port_free[port] = (finished[position], position)

            heappush(running, (finished[position], position))

    begin(state.start(), 0.0, -1)
    last = -1
    while running:
        now, last = heappop(running)
        begin(state.finish(last), now, last)

    if state.unfinished:
        raise ScheduleError(f"{state.unfinished} of {len(tasks)} tasks were never set free")

    path: list[int] = []
    while last >= 0:
        path.append(tasks[last].id)
        last = cause[last]

    return Simulation(
        seconds=max(finished, default=0.0),
        started=tuple(started),
        finished=tuple(finished),
        busy=_busy(schedule, started, finished),
        critical_path=tuple(reversed(path)),
    )


def _busy(schedule: Schedule, started: list[float], finished: list[float]) -> tuple[tuple[int, float], ...]:
    total: dict[int, float] = {}
    until: dict[int, float] = {}
    tasks = schedule.tasks
    for position in sorted(range(len(tasks)), key=started.__getitem__):
        start, stop = started[position], finished[position]
        for actor in tasks[position].members:
            # An actor that sends and receives at the same time is not twice as busy.
            begin = max(start, until.get(actor, 0.0))
            total[actor] = total.get(actor, 0.0) + max(stop - begin, 0.0)
            until[actor] = max(stop, until.get(actor, 0.0))

    return tuple(sorted(total.items()))
