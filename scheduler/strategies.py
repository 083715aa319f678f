"""The strategies by name, and the one that picks among them."""

from __future__ import annotations

from wavecast.scheduler.bounds import least_span, lower_bound
from wavecast.scheduler.coloring import Strategy, balanced, dsatur, edge_coloring, first_fit, largest_first
from wavecast.scheduler.greedy import span
from wavecast.scheduler.konig import is_bipartite
from wavecast.scheduler.ports import TaskGraph

__all__ = ("STRATEGIES", "auto", "choose")

# DSATUR is worth its time up to about this many (pairs of tasks at a port).
_DSATUR_PAIRS = 300_000
# Above so many tasks only one strategy is tried.
_TRIED_TASKS = 50_000


def choose(graph: TaskGraph) -> tuple[str, list[int], str]:
    """
    Pick a strategy for ``graph``.

    :return: its name, the waves it gave, and why it was picked
    """
    alike = len(set(graph.nbytes)) <= 1
    if not graph.after and is_bipartite(graph):
        why = "one-to-one tasks over a bipartite graph: as many waves as the busiest port has tasks"
        if alike:
            return "edge_coloring", edge_coloring(graph), f"{why}, and all of one size"

        return "balanced", balanced(graph), f"{why}, and of several sizes"

    candidates: list[Strategy] = [edge_coloring if alike or graph.after else balanced, largest_first, first_fit]
    if len(graph.ports) > _TRIED_TASKS:
        del candidates[1:]
    elif sum(degree * degree for degree in graph.degrees()) <= _DSATUR_PAIRS:
        candidates.append(dsatur)

    fewest = lower_bound(graph).waves
    shortest = least_span(graph, waves=fewest)
    spans: dict[str, tuple[int, int]] = {}
    name, waves = "", list[int]()
    for strategy in candidates:
        found = strategy(graph)
        spans[strategy.__name__] = span(graph, found)
        if not name or spans[strategy.__name__] < spans[name]:
            name, waves = strategy.__name__, found

        if spans[name] <= (shortest, fewest):
            break

    kind = "tasks with dependencies" if graph.after else "conflicts that are not bipartite"
    figures = ", ".join(f"{other} {nbytes} bytes in {count} waves" for other, (nbytes, count) in spans.items())
    if spans[name] <= (shortest, fewest):
        figures = f"{spans[name][0]} bytes in {spans[name][1]} waves meet the bounds"
    else:
        figures = f"the shortest of {figures}"

    return name, waves, f"{kind}: {figures}"


def auto(graph: TaskGraph) -> list[int]:
    """
    Pick by what the tasks are, else by trying.

    One-to-one tasks over a bipartite graph go to :func:`edge_coloring`, or to :func:`balanced` when they differ in
    size: both have the fewest waves there are. For anything else several are tried, until one meets its bounds; the
    result with the smallest sum of largest tasks is kept, then with the fewest waves. The schedule tells which strategy
    it was and why.
    """
    return choose(graph)[1]


STRATEGIES: dict[str, Strategy] = {
    "auto": auto,
    "first_fit": first_fit,
    "largest_first": largest_first,
    "dsatur": dsatur,
    "edge_coloring": edge_coloring,
    "balanced": balanced,
}
"""Strategies by name. Each function's documentation gives its bound, its cost and where it comes from."""
