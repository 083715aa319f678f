"""Edge colouring: one-to-one tasks in as few waves as the busiest port has tasks."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.ports import TaskGraph

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
    waves = [-1] * len(edges)
    free = [(1 << max(graph.degrees(), default=0)) - 1] * graph.n_ports
    at: list[dict[int, int]] = [{} for _ in range(graph.n_ports)]
    single: list[int] = []
    for task in order:
        if len(edges[task]) == 1:
            single.append(task)
            continue

        left, right = edges[task]
        common = free[left] & free[right]
        if common:
            bit = common & -common
        else:
            bit = free[left] & -free[left]
            _clear(edges, waves, free, at, right, bit, free[right] & -free[right])

        wave = bit.bit_length() - 1
        waves[task] = wave
        free[left] ^= bit
        free[right] ^= bit
        at[left][wave] = task
        at[right][wave] = task

    for task in single:
        (port,) = edges[task]
        bit = free[port] & -free[port]
        free[port] ^= bit
        waves[task] = bit.bit_length() - 1

    return waves


def _clear(
    edges: tuple[tuple[int, ...], ...],
    waves: list[int],
    free: list[int],
    at: list[dict[int, int]],
    port: int,
    bit: int,
    spare_bit: int,
) -> None:
    """Free the wave of ``bit`` at ``port``, which has that of ``spare_bit`` free, along their alternating path."""
    both = bit | spare_bit
    wave, spare = bit.bit_length() - 1, spare_bit.bit_length() - 1
    moving = at[port].pop(wave)
    free[port] ^= both
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
            free[port] ^= both
            return

        moving = driven
        wave, spare = spare, wave
