"""
Colouring: which wave each task goes to.

Tasks are hyperedges over ports and a wave is a matching, so sorting tasks into waves is edge colouring. ``D`` is the
number of tasks on the busiest port: no colouring has fewer waves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from wavecast.scheduler.bounds import least_span, lower_bound
from wavecast.scheduler.greedy import close_gaps, first_wave, greedy, span
from wavecast.scheduler.konig import color_bipartite, is_bipartite
from wavecast.scheduler.ports import TaskGraph
from wavecast.scheduler.search import reduce_waves, repack_waves, sort_sizes
from wavecast.scheduler.table import WaveTable

__all__ = ("Strategy", "first_fit", "largest_first", "dsatur", "edge_coloring", "balanced")

Strategy = Callable[[TaskGraph], list[int]]
"""
Return the wave of each task, by position: no port twice in a wave, and every task in a later wave than those it comes
after. Waves may be left empty; the caller closes the gaps.
"""

# Steps of local search that a strategy may take: about half a second each.
_REDUCE_STEPS = 1_000_000
_SORT_STEPS = 500_000
# Up to so many tasks more than one order of placing them is tried, and sizes are sorted.
_SEARCH_TASKS = 20_000
# Above so many tasks, some of them one-to-many, exchanges gain too little for their time.
_EXCHANGE_TASKS = 50_000


def first_fit(graph: TaskGraph) -> list[int]:
    """
    Put each task, in the order given, in the first wave that has its ports free.

    What a first-in-first-out pass per wave over actor sets gives, which is how ChatLearn schedules its groups: the
    baseline. Without dependencies one-to-one tasks get at most ``2 * D - 1`` waves, tasks of r ports at most
    ``r * (D - 1) + 1``; with dependencies there is no such bound. O(memberships) operations on bitmasks of a bit a
    wave, in rows (see :func:`~wavecast.scheduler.greedy.greedy`).
    """
    return greedy(graph, graph.order)


def largest_first(graph: TaskGraph) -> list[int]:
    """
    First fit in order of falling bytes, then of falling number of ports, then of falling degree of the busiest one.

    Tasks of like size meet in a wave, so that it waits less for its longest one. Bound of :func:`first_fit`; its cost
    and a sort. With dependencies, tasks at the head of longer chains go first.
    """
    if graph.after:
        return greedy(graph, _chains_first(graph))

    degrees = graph.degrees()
    nbytes = graph.nbytes
    return greedy(
        graph,
        sorted(
            range(len(graph.ports)),
            key=lambda position: (
                -nbytes[position],
                -len(graph.ports[position]),
                -max(degrees[port] for port in graph.ports[position]),
            ),
        ),
    )


def dsatur(graph: TaskGraph) -> list[int]:
    """
    First fit, always of the task that has the fewest waves left to choose from.

    Brelaz 1979, on the conflict graph without building it: a task's saturation is the number of waves that are taken at
    any of its ports. Ties go to the task with more memberships in busy ports, then the earlier one. Bound of
    :func:`first_fit`. O(sum over ports of degree squared) heap operations: for up to some ten thousand tasks.
    """
    degrees = graph.degrees()
    weights = [sum(degrees[port] for port in ports) for ports in graph.ports]
    waiting = [len(before) for before in graph.after] or [0] * len(graph.ports)
    followers = _followers(graph)
    on_port: list[list[int]] = [[] for _ in range(graph.n_ports)]
    for task, ports in enumerate(graph.ports):
        for port in ports:
            on_port[port].append(task)

    taken = [0] * len(graph.ports)  # per task: bitmask of the waves taken at any of its ports
    waves = [-1] * len(graph.ports)
    heap = [(0, -weights[task], task) for task, count in enumerate(waiting) if count == 0]
    heapify(heap)
    while heap:
        saturation, _, task = heappop(heap)
        if waves[task] >= 0 or -saturation != taken[task].bit_count():
            continue  # placed already, or listed again since with more waves taken

        wave = first_wave(graph, waves, task, taken[task])
        waves[task] = wave
        bit = 1 << wave
        for port in graph.ports[task]:
            for other in on_port[port]:
                if waves[other] < 0 and not taken[other] & bit:
                    taken[other] |= bit
                    if not waiting[other]:
                        heappush(heap, (-taken[other].bit_count(), -weights[other], other))

        for follower in followers[task]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heappush(heap, (-taken[follower].bit_count(), -weights[follower], follower))

    return waves


def edge_coloring(graph: TaskGraph) -> list[int]:
    """
    As few waves as possible: exactly ``D`` where the tasks are the edges of a bipartite graph, without dependencies.

    That is every set of one-to-one tasks in the full model, and in the half model every one with disjoint senders and
    receivers. Konig 1916, see :func:`~wavecast.scheduler.konig.color_bipartite`: near-linear.

    Elsewhere (one-to-many tasks; actors that both send and receive in the half model) that many waves may not exist,
    and finding the fewest is NP-hard. Tasks are then placed with exchanges of two waves along Kempe chains, and a local
    search of at most about half a second tries to do with fewer. Never more than first fit by falling number of ports.

    With dependencies no bound is claimed: the best of :func:`first_fit`, which keeps a relay's rounds,
    :func:`largest_first`, and colouring all tasks of equal depth together, one depth after another; the second up to
    50,000 tasks, the third where the depths' busiest ports leave a chance. The depths share the time for local search
    among them, by their number of tasks.
    """
    if graph.after:
        return _color_in_order(graph)

    return _color_freely(graph, len(graph.ports))


def balanced(graph: TaskGraph) -> list[int]:
    """
    As few waves as :func:`edge_coloring`, of tasks alike in size, the longest first.

    Tasks are coloured in order of falling bytes, each in the first wave it can go to; where that is too many waves, by
    exchanges. Then pairs of waves exchange chains of tasks such that large ones meet
    (:func:`~wavecast.scheduler.search.sort_sizes`), until the sum of the waves' largest tasks is what no colouring is
    below (:func:`~wavecast.scheduler.bounds.least_span`) or for about half a second. To minimise that sum is NP-hard
    even on bipartite graphs. With dependencies: :func:`edge_coloring`.

    Where more waves have a smaller sum, they are preferred, except on bipartite graphs.
    """
    if graph.after:
        return edge_coloring(graph)

    order = sorted(range(len(graph.ports)), key=lambda task: (-graph.nbytes[task], -len(graph.ports[task])))
    fewest = lower_bound(graph).waves
    shortest = least_span(graph, waves=fewest)
    filled = greedy(graph, order)
    waves = filled
    if max(filled, default=-1) >= fewest:
        searched = not is_bipartite(graph)
        waves = _color_by_exchange(graph, order, len(order)) if searched else color_bipartite(graph, order)

    waves = close_gaps(waves)
    if span(graph, waves)[0] > shortest and len(waves) <= _SEARCH_TASKS:
        steps = min(_SORT_STEPS, 1000 * len(waves))
        waves = close_gaps(sort_sizes(graph, waves, target=shortest, steps=steps))

    if max(filled, default=-1) >= fewest and not is_bipartite(graph) and span(graph, filled) < span(graph, waves):
        waves = close_gaps(filled)

    longest = [0] * (max(waves, default=-1) + 1)
    for task, wave in enumerate(waves):
        longest[wave] = max(longest[wave], graph.nbytes[task])

    rank = sorted(range(len(longest)), key=lambda wave: -longest[wave])
    place = {wave: index for index, wave in enumerate(rank)}
    return [place[wave] for wave in waves]


def _color_freely(graph: TaskGraph, planned: int) -> list[int]:
    """Colour without dependencies; ``planned`` as below."""
    if is_bipartite(graph):
        return color_bipartite(graph, graph.order)

    return _color_by_exchange(graph, graph.order, planned)


def _color_by_exchange(graph: TaskGraph, order: Iterable[int], planned: int) -> list[int]:
    """
    Colour by exchanges along chains and a local search.

    :param planned: tasks of the whole plan: a part of it gets its share of what the whole may take
    """
    # Tasks of many ports first: the small ones are easier to fit in between.
    order = sorted(order, key=lambda task: -len(graph.ports[task]))
    fewest = lower_bound(graph).waves
    waves = greedy(graph, order)
    if planned > _EXCHANGE_TASKS and any(len(ports) > 2 for ports in graph.ports):
        return waves

    # Tasks often come sender by sender, which leaves the last ones no way out: in mixed order there mostly is one.
    mixed = list(order)
    random.Random(len(mixed)).shuffle(mixed)
    mixed.sort(key=lambda task: -len(graph.ports[task]))
    for ways in (mixed, order) if planned <= _SEARCH_TASKS else (mixed,):
        if max(waves, default=-1) < fewest:
            return waves

        waves = min(waves, _insert_all(graph, ways, fewest), key=lambda waves: max(waves, default=-1))

    if max(waves, default=-1) >= fewest:
        steps = min(_REDUCE_STEPS * len(waves) // planned, 2000 * len(waves))
        waves = _search(graph, close_gaps(waves), fewest, steps)

    return waves


def _search(graph: TaskGraph, waves: list[int], fewest: int, steps: int) -> list[int]:
    # Sizes are left to others here: with all of one size, a colouring's sum is its number of waves.
    alike = TaskGraph(graph.ports, (1,) * len(graph.ports), (), graph.order, graph.port_names)
    waves = repack_waves(alike, waves, target=(fewest, fewest), steps=steps)
    if max(waves) >= fewest:
        waves = reduce_waves(graph, waves, target=fewest, steps=steps)

    return waves


def _insert_all(graph: TaskGraph, order: Iterable[int], fewest: int) -> list[int]:
    """Colour by exchanges along chains, in ``order``, with ``fewest`` waves and one more each time there is no way."""
    table = WaveTable(graph)
    palette = (1 << fewest) - 1
    for task in order:
        if not table.insert(task, palette, attempts=8, limit=200):
            palette = palette << 1 | 1
            table.insert(task, palette)

    return table.waves


def _color_in_order(graph: TaskGraph) -> list[int]:
    """Colour with dependencies, until a way is as good as its bound."""
    fewest = lower_bound(graph).waves
    waves = first_fit(graph)
    count = max(waves, default=-1) + 1
    if count > fewest and len(waves) <= _EXCHANGE_TASKS:
        other = largest_first(graph)
        if max(other) + 1 < count:
            waves, count = other, max(other) + 1

    levels = _levels(graph) if count > fewest else []
    if levels and sum(_busiest(graph, level) for level in levels) < count:
        other = _by_depth(graph, levels)
        if max(other) + 1 < count:
            waves = other

    return waves


def _levels(graph: TaskGraph) -> list[list[int]]:
    """Return the tasks by depth."""
    depths = graph.depths()
    levels: list[list[int]] = [[] for _ in range(max(depths, default=-1) + 1)]
    for task, depth in enumerate(depths):
        levels[depth].append(task)

    return levels


def _busiest(graph: TaskGraph, tasks: list[int]) -> int:
    """Return how many of ``tasks`` the port with the most has."""
    counts: dict[int, int] = {}
    for task in tasks:
        for port in graph.ports[task]:
            counts[port] = counts.get(port, 0) + 1

    return max(counts.values(), default=0)


def _by_depth(graph: TaskGraph, levels: list[list[int]]) -> list[int]:
    waves = [0] * len(graph.ports)
    first = 0
    for level in levels:
        part = _part(graph, level)
        colored = close_gaps(_color_freely(part, len(graph.ports)))
        for task, wave in zip(level, colored, strict=True):
            waves[task] = first + wave

        first += max(colored) + 1

    return waves


def _part(graph: TaskGraph, tasks: list[int]) -> TaskGraph:
    """Return some of the tasks, without what they come after, over ports of their own: there may be many parts."""
    dense: dict[int, int] = {}
    ports = tuple(tuple(dense.setdefault(port, len(dense)) for port in graph.ports[task]) for task in tasks)
    return TaskGraph(
        ports=ports,
        nbytes=tuple(graph.nbytes[task] for task in tasks),
        after=(),
        order=range(len(tasks)),
        port_names=tuple(graph.port_names[port] for port in dense),
    )


def _chains_first(graph: TaskGraph) -> list[int]:
    """Order tasks such that dependencies come first, and then the heads of longer chains, then larger tasks."""
    followers = _followers(graph)
    tail = [0] * len(graph.ports)  # tasks in the longest chain that waits for this one
    for task in reversed(graph.order):
        tail[task] = max((tail[follower] + 1 for follower in followers[task]), default=0)

    waiting = [len(before) for before in graph.after]
    ready = [(-tail[task], -graph.nbytes[task], task) for task, count in enumerate(waiting) if count == 0]
    heapify(ready)
    order: list[int] = []
    while ready:
        task = heappop(ready)[2]
        order.append(task)
        for follower in followers[task]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heappush(ready, (-tail[follower], -graph.nbytes[follower], follower))

    return order


def _followers(graph: TaskGraph) -> list[list[int]]:
    followers: list[list[int]] = [[] for _ in graph.ports]
    for task, before in enumerate(graph.after):
        for earlier in before:
            followers[earlier].append(task)

    return followers
