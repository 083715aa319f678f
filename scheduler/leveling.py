"""Tasks cut into rounds, the longest that is left first: for tasks of any number of ports."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from wavecast.scheduler.ports import TaskGraph

__all__ = ("level_rounds", "StepBudget")


@dataclass(slots=True)
class StepBudget:
    """
    What a search may still take: a measure of time that is the same everywhere.

    :ivar left: steps; below 0 when it is spent
    """

    left: int


def level_rounds(
    graph: TaskGraph, lengths: Sequence[int], *, parts: int, budget: StepBudget | None = None
) -> list[tuple[int, tuple[int, ...]]]:
    """
    Cut tasks into rounds in which no two share a port, by what is left of them.

    Each round serves the ports in order of what they have left. A port takes, of its tasks whose ports are all free,
    the one with the most left, times the square root of its number of ports. Then it looks again after a part of what
    the fullest port has left: ever more often towards the end, where a wrong choice costs most. So tasks in each
    other's way shrink together, and none is left over that nothing fits beside. The rule is longest remaining time
    first (Muntz and Coffman 1969, optimal on equal machines); for hyperedges no bound is known.

    Without dependencies only. O(memberships) a round, about ``parts * log(load / parts)`` rounds.

    :param lengths: of each task, in whole units; 0 leaves a task out
    :param parts: look again after one in so many parts of the fullest port's rest
    :param budget: of tasks looked at; none for no limit
    :return: nothing when the budget was spent before all were placed; else rounds, as their length and their tasks in
        rising order, no two of the same tasks; a task that is over before the last of its rounds has no part in the
        rest of them
    """
    left = list(lengths)
    on_port: list[list[int]] = [[] for _ in range(graph.n_ports)]
    load = [0] * graph.n_ports
    for task, ports in enumerate(graph.ports):
        for port in ports if left[task] else ():
            on_port[port].append(task)
            load[port] += left[task]

    budget = budget or StepBudget(sys.maxsize)
    rounds: dict[tuple[int, ...], int] = {}
    while full := sorted((port for port, rest in enumerate(load) if rest), key=lambda port: -load[port]):
        chosen = _choose(graph, full, on_port, left, budget)
        if budget.left < 0:
            return []

        length = min(max(1, load[full[0]] // parts), max(left[task] for task in chosen))
        for task in chosen:
            moved = min(length, left[task])
            left[task] -= moved
            for port in graph.ports[task]:
                load[port] -= moved

        members = tuple(sorted(chosen))
        rounds[members] = rounds.get(members, 0) + length

    return [(length, members) for members, length in rounds.items()]


def _choose(
    graph: TaskGraph, full: list[int], on_port: list[list[int]], left: list[int], budget: StepBudget
) -> list[int]:
    used = bytearray(graph.n_ports)
    chosen: list[int] = []
    for port in full:
        if used[port]:
            continue

        budget.left -= len(on_port[port])
        waiting = on_port[port] = [task for task in on_port[port] if left[task]]
        best, most = -1, 0
        for task in waiting:
            ports = graph.ports[task]
            urgency = left[task] * left[task] * len(ports)
            if urgency > most and not any(used[other] for other in ports):
                best, most = task, urgency

        if best >= 0:
            chosen.append(best)
            for other in graph.ports[best]:
                used[other] = 1

    return chosen
