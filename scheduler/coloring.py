"""Colouring: which wave each task goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from wavecast.scheduler.ports import TaskGraph

__all__ = ("STRATEGIES", "Strategy", "auto", "first_fit", "largest_first")

Strategy = Callable[[TaskGraph], list[int]]
"""
Return the wave of each task, by position: no port twice in a wave, and every task in a later wave than those it comes
after. Waves may be left empty; the caller closes the gaps.
"""


def first_fit(graph: TaskGraph) -> list[int]:
    """
    Put each task, in the order given, in the first wave that has its ports free.

    What a first-in-first-out pass per wave over actor sets gives, which is how ChatLearn scheduled its groups: the
    baseline. At most ``sum over its ports of (degree - 1) + 1`` waves for a task, so ``2 * D - 1`` waves for one-to-one
    tasks where the busiest port has ``D``. O(memberships) operations on bitmasks of one bit a wave.
    """
    return greedy(graph, graph.order)


def largest_first(graph: TaskGraph) -> list[int]:
    """
    First fit in order of falling bytes, then falling degree of the busiest port.

    Tasks of like size meet in a wave, so that it waits less for its longest one. Bound and cost of :func:`first_fit`,
    and a sort. With dependencies a task is placed once all tasks before it are.
    """
    degrees = graph.degrees()
    nbytes = graph.nbytes
    order = sorted(
        range(len(graph.ports)),
        key=lambda position: (-nbytes[position], -max(degrees[port] for port in graph.ports[position])),
    )
    if graph.after:
        depths = graph.depths()
        order.sort(key=depths.__getitem__)

    return greedy(graph, order)


def greedy(graph: TaskGraph, order: Iterable[int]) -> list[int]:
    """
    Put each task, in ``order``, in the first wave that has its ports free and comes after those it depends on.

    :param order: every position once, dependencies first
    """
    busy = [0] * graph.n_ports  # bit w of busy[p]: wave w has a task on port p
    waves = [0] * len(graph.ports)
    for position in order:
        ports = graph.ports[position]
        taken = 0
        for port in ports:
            taken |= busy[port]

        if graph.after and graph.after[position]:
            taken |= (2 << max(waves[before] for before in graph.after[position])) - 1

        bit = ~taken & (taken + 1)
        for port in ports:
            busy[port] |= bit

        waves[position] = bit.bit_length() - 1

    return waves


def auto(graph: TaskGraph) -> list[int]:
    """Try the others and keep the waves that cost the fewest bytes."""
    return min((first_fit(graph), largest_first(graph)), key=lambda waves: span(graph, waves))


def span(graph: TaskGraph, waves: list[int]) -> tuple[int, int]:
    """Return the sum over the waves of their largest task's bytes, and the number of waves."""
    longest: dict[int, int] = {}
    for wave, nbytes in zip(waves, graph.nbytes, strict=True):
        if nbytes > longest.get(wave, -1):
            longest[wave] = nbytes

    return sum(longest.values()), len(longest)


STRATEGIES: dict[str, Strategy] = {
    "auto": auto,
    "first_fit": first_fit,
    "largest_first": largest_first,
}
"""Colouring strategies by name."""
