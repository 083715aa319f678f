"""Edge colouring: one-to-one tasks in as few waves as the busiest port has tasks."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.ports import TaskGraph
from wavecast.scheduler.taken import ROW_WAVES, TakenWaves

__all__ = ("is_bipartite", "color_bipartite")


def is_bipartite(graph: TaskGraph) -> bool:
    """
    Tell whether every task has at most two ports, and ports fall in two sides with each two-port task across.

    So it is for every set of one-to-one tasks in the full model, where the sides are out-ports and in-ports, and in the
    half model whenever senders and receivers are disjoint. O(memberships).
    """
    neighbours: list[list[int]] = [[] for _ in range(graph.n_ports)]
    for ports in graph.ports:
        if len(ports) > 2:
            return False

        if len(ports) == 2:
            neighbours[ports[0]].append(ports[1])
            neighbours[ports[1]].append(ports[0])

    side = [-1] * graph.n_ports
    for root in range(graph.n_ports):
        if side[root] >= 0:
            continue

        side[root] = 0
        reached = [root]
        for port in reached:  # grows while it is walked
            for neighbour in neighbours[port]:
                if side[neighbour] < 0:
                    side[neighbour] = 1 - side[port]
                    reached.append(neighbour)
                elif side[neighbour] == side[port]:
                    return False

    return True


def color_bipartite(graph: TaskGraph, order: Iterable[int]) -> list[int]:
    """
    Colour a bipartite graph with as many waves as its busiest port has tasks.

    Konig's theorem by alternating paths: an edge goes to the first wave that both its ports have free. Where there is
    none, let ``a`` be free at one port and ``b`` at the other: exchanging the two along the path that leaves the other
    port by ``a`` frees ``a`` there, and as the graph has no odd cycle, that path cannot end at the first port.

    O(tasks * ports) at worst. On random plans, the hard regular ones included, paths stay so short that time grows with
    the tasks (see docs/scheduling.md).

    :param order: every position once; earlier ones get lower waves where there is a choice
    """
    edges = graph.ports
    count = max(graph.degrees(), default=0)
    waves = [-1] * len(edges)
    taken = TakenWaves(graph.n_ports)
    low = taken.low
    at: list[dict[int, int]] = [{} for _ in range(graph.n_ports)]
    single: list[int] = []
    for task in order:
        if len(edges[task]) == 1:
            single.append(task)
            continue

        left, right = edges[task]
        mask = low[left] | low[right]
        bit = ~mask & (mask + 1)
        wave = bit.bit_length() - 1
        if wave < min(count, ROW_WAVES):
            low[left] |= bit
            low[right] |= bit
        else:
            wave = taken.first(edges[task])
            if wave >= count:
                wave = taken.first((left,))
                _clear(edges, waves, taken, at, right, wave, taken.first((right,)))

            taken.take(edges[task], wave)

        waves[task] = wave
        at[left][wave] = task
        at[right][wave] = task

    for task in single:
        waves[task] = taken.first(edges[task])
        taken.take(edges[task], waves[task])

    return waves


def _clear(
    edges: tuple[tuple[int, ...], ...],
    waves: list[int],
    taken: TakenWaves,
    at: list[dict[int, int]],
    port: int,
    wave: int,
    spare: int,
) -> None:
    """Free ``wave`` at ``port``, which has ``spare`` free, along their alternating path."""
    moving = at[port].pop(wave)
    taken.free(port, wave)
    taken.take((port,), spare)
    while True:
        # ``moving`` goes from ``wave`` to ``spare`` and drives on what has ``spare`` at its other end, if anything has.
        at[port][spare] = moving
        waves[moving] = spare
        ends = edges[moving]
        port = ends[1] if ends[0] == port else ends[0]
        driven = at[port].get(spare)
        at[port][spare] = moving
        if driven is None:
            del at[port][wave]
            taken.free(port, wave)
            taken.take((port,), spare)
            return

        moving = driven
        wave, spare = spare, wave
