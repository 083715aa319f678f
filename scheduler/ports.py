"""What conflicts: tasks as hyperedges over the ports of their actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Literal, get_args

from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.task import Task, check_integers

if TYPE_CHECKING:
    from wavecast.scheduler.bounds import Bound

__all__ = ("PortModel", "TaskGraph", "build_graph", "check_ports")

PortModel = Literal["half", "full"]
"""
``half``: an actor takes part in one task at a time. ``full``: an actor sends one task and receives one task at a time.
"""


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """
    Tasks by position, as hyperedges over densely numbered ports. All that a strategy sees.

    :ivar ports: per task, the ports it takes, each once
    :ivar nbytes: per task, its bytes
    :ivar after: per task, the positions of the tasks it comes after; empty when no task has any
    :ivar order: positions in an order that respects ``after``, otherwise as given
    :ivar port_names: per port, the actor and, in the full model, which of its ports
    """

    ports: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    after: tuple[tuple[int, ...], ...]
    order: Sequence[int]
    port_names: tuple[str, ...]
    #: What :func:`~wavecast.scheduler.bounds.lower_bound` found, once it was asked: strategies and their caller all do.
    bound_found: list[Bound] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def n_ports(self) -> int:
        """How many ports there are."""
        return len(self.port_names)

    def degrees(self) -> list[int]:
        """Return the number of tasks on each port."""
        degrees = [0] * self.n_ports
        for ports in self.ports:
            for port in ports:
                degrees[port] += 1

        return degrees

    def loads(self) -> list[int]:
        """Return the bytes through each port."""
        loads = [0] * self.n_ports
        for ports, nbytes in zip(self.ports, self.nbytes, strict=True):
            for port in ports:
                loads[port] += nbytes

        return loads

    def depths(self) -> list[int]:
        """Return for each task the number of tasks in the longest chain of ``after`` that ends before it."""
        depths = [0] * len(self.ports)
        if self.after:
            for position in self.order:
                depths[position] = max((depths[before] + 1 for before in self.after[position]), default=0)

        return depths


def check_ports(ports: str) -> None:
    """
    Check the name of a port model.

    :raises ScheduleError: when there is none of that name
    """
    if ports not in get_args(PortModel):
        raise ScheduleError(f"ports is {ports!r}: it must be one of {', '.join(get_args(PortModel))}")


def build_graph(tasks: Sequence[Task], ports: PortModel) -> TaskGraph:
    """
    Check ``tasks`` and number their ports in order of first use.

    Linear in the number of memberships; never looks at a payload.

    :raises ScheduleError: for a repeated id, no sender, no receiver, an unknown or cyclic ``after``, an id or an actor
        that is no integer, or an unknown port model
    """
    check_ports(ports)
    check_integers(tasks)
    full = ports == "full"
    positions: dict[int, int] = {}
    dense: dict[int, int] = {}
    edges: list[tuple[int, ...]] = []
    linked = False
    for position, task in enumerate(tasks):
        if positions.setdefault(task.id, position) != position:
            raise ScheduleError(
                f"task id {task.id} is used twice: by the tasks at {positions[task.id]} and {position}",
                tasks=(task.id,),
            )

        senders, receivers = task.senders, task.receivers
        if not senders or not receivers:
            _refuse(task)

        # An actor's ports are 2 * actor (the only one in the half model) and 2 * actor + 1 (its in-port).
        if full:
            names = [*(2 * actor for actor in senders), *(2 * actor + 1 for actor in receivers)]
        else:
            names = [2 * actor for actor in senders + receivers]

        edge = [dense.setdefault(name, len(dense)) for name in names]
        edges.append(tuple(edge) if len(set(edge)) == len(edge) else tuple(dict.fromkeys(edge)))
        linked = linked or bool(task.after)

    after = _link(tasks, positions) if linked else ()
    return TaskGraph(
        ports=tuple(edges),
        nbytes=tuple(task.nbytes for task in tasks),
        after=after,
        order=_topological(tasks, after) if linked else range(len(tasks)),
        port_names=tuple(_name(name, full) for name in dense),
    )


def _refuse(task: Task) -> None:
    if not task.senders:
        raise ScheduleError(f"task {task.id} has no sender (its receivers: {task.receivers})", tasks=(task.id,))

    raise ScheduleError(f"task {task.id} has no receiver (its senders: {task.senders})", tasks=(task.id,))


def _name(name: int, full: bool) -> str:
    side = ("out-port of ", "in-port of ")[name & 1] if full else ""
    return f"{side}actor {name >> 1}"


def _link(tasks: Sequence[Task], positions: dict[int, int]) -> tuple[tuple[int, ...], ...]:
    links: list[tuple[int, ...]] = []
    for task in tasks:
        for before in task.after:
            if before not in positions:
                raise ScheduleError(
                    f"task {task.id} comes after task {before}, which does not exist", tasks=(task.id, before)
                )

        links.append(tuple(dict.fromkeys(positions[before] for before in task.after)))

    return tuple(links)


def _topological(tasks: Sequence[Task], after: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Kahn's order, the lowest position first among those that are free."""
    waiting = [len(before) for before in after]
    followers: list[list[int]] = [[] for _ in after]
    for position, before in enumerate(after):
        for earlier in before:
            followers[earlier].append(position)

    free = [position for position, count in enumerate(waiting) if count == 0]
    heapify(free)
    order: list[int] = []
    while free:
        position = heappop(free)
        order.append(position)
        for follower in followers[position]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heappush(free, follower)

    if len(order) < len(after):
        cycle = tuple(tasks[position].id for position in _find_cycle(after, waiting))
        raise ScheduleError(
            f"tasks come after each other in a circle: {' after '.join(map(str, (*cycle, cycle[0])))}", tasks=cycle
        )

    return tuple(order)


def _find_cycle(after: tuple[tuple[int, ...], ...], waiting: list[int]) -> list[int]:
    # Every task still waiting waits for another such task: following them must come back somewhere.
    position = next(position for position, count in enumerate(waiting) if count)
    seen: dict[int, int] = {}
    path: list[int] = []
    while position not in seen:
        seen[position] = len(path)
        path.append(position)
        position = next(before for before in after[position] if waiting[before])

    return path[seen[position] :]
