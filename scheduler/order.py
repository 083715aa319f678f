"""The order in which the ports of a schedule meet its tasks: what a run needs to know of it, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.ports import PortModel, check_ports
from wavecast.scheduler.task import Task

__all__ = ("PortOrder", "order_ports")


@dataclass(frozen=True, slots=True)
class PortOrder:
    """
    Tasks by position, wave after wave, and the queue of tasks at each port.

    :ivar first: position of each wave's first task, and the number of tasks
    :ivar waves: per task, the index of its wave
    :ivar ports: per task, the ports it takes, densely numbered
    :ivar queues: per port, its tasks in wave order
    :ivar followers: per task, those that come after it
    :ivar conditions: per task, how many ports and tasks it waits for
    """

    first: tuple[int, ...]
    waves: tuple[int, ...]
    ports: tuple[tuple[int, ...], ...]
    queues: tuple[tuple[int, ...], ...]
    followers: tuple[tuple[int, ...], ...]
    conditions: tuple[int, ...]


def order_ports(waves: Sequence[Sequence[Task]], ports: PortModel) -> PortOrder:
    """
    Return the order of ``waves``. Linear in the number of memberships.

    :raises ScheduleError: when a task has no sender or no receiver, or comes after one that is in no earlier wave: it
        would wait for ever; and for an unknown port model
    """
    check_ports(ports)
    full = ports == "full"
    dense: dict[int, int] = {}
    queues: list[list[int]] = []
    first = [0]
    edges: list[tuple[int, ...]] = []
    linked = False
    for wave in waves:
        for task in wave:
            if not (task.senders and task.receivers):
                side = "receiver" if task.senders else "sender"
                raise ScheduleError(f"task {task.id} has no {side}: it must have 1 or more", tasks=(task.id,))

            linked = linked or bool(task.after)
            # As in the task graph: the in-port of an actor is 2 * actor + 1, any other port 2 * actor.
            if full:
                names = [*(2 * actor for actor in task.senders), *(2 * actor + 1 for actor in task.receivers)]
            else:
                names = [2 * actor for actor in task.senders + task.receivers]

            edge = tuple(dict.fromkeys([dense.setdefault(name, len(dense)) for name in names]))
            while len(queues) < len(dense):
                queues.append([])

            for port in edge:
                queues[port].append(len(edges))

            edges.append(edge)

        first.append(len(edges))

    wave_of = [index for index, wave in enumerate(waves) for _ in wave]
    followers: list[tuple[int, ...]] = [()] * len(edges)
    conditions = [len(edge) for edge in edges]
    if linked:
        _link(waves, wave_of, followers, conditions)

    return PortOrder(
        first=tuple(first),
        waves=tuple(wave_of),
        ports=tuple(edges),
        queues=tuple(map(tuple, queues)),
        followers=tuple(followers),
        conditions=tuple(conditions),
    )


def _link(
    waves: Sequence[Sequence[Task]], wave_of: list[int], followers: list[tuple[int, ...]], conditions: list[int]
) -> None:
    tasks = [task for wave in waves for task in wave]
    positions = {task.id: position for position, task in enumerate(tasks)}
    lists: dict[int, list[int]] = {}
    for position, task in enumerate(tasks):
        for before in dict.fromkeys(task.after):
            earlier = positions.get(before)
            if earlier is None or wave_of[earlier] >= wave_of[position]:
                raise ScheduleError(
                    f"task {task.id} in wave {wave_of[position]} comes after task {before}, "
                    "which is in no earlier wave",
                    tasks=(task.id, before),
                )

            lists.setdefault(earlier, []).append(position)
            conditions[position] += 1

    for earlier, later in lists.items():
        followers[earlier] = tuple(later)
