"""
Local search: fewer waves, and waves of tasks alike in size.

Without dependencies only. The same result everywhere: driven by seeded generators and bounded by counts of steps, not
by a clock. A step is a task or a port looked at; there are about two million a second.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from wavecast.scheduler.greedy import close_gaps, greedy, span
from wavecast.scheduler.ports import TaskGraph
from wavecast.scheduler.table import WaveTable

__all__ = ("reduce_waves", "repack_waves", "sort_sizes")


def reduce_waves(graph: TaskGraph, waves: list[int], *, target: int, steps: int) -> list[int]:
    """
    Look for a colouring of fewer waves.

    Drops the smallest wave and puts its tasks back one by one: where there is room, where exchanging two waves along a
    chain makes room, or else in place of the fewest tasks, which then look for a place themselves and may not come back
    to that wave for a while (a tabu search over partial colourings, after Blochliger and Zufferey 2008). Repeats for as
    long as it succeeds.

    Without dependencies only. The same result everywhere: it is driven by a seeded generator and bounded by a count,
    not by a clock.

    :param waves: a proper colouring without empty waves
    :param target: stop here, for no colouring has fewer waves
    :param steps: how many to take
    :return: ``waves`` itself when nothing better was found
    """
    rng = random.Random(len(waves))
    best = waves
    count = max(waves, default=-1) + 1
    while count > target and steps > 0:
        table = WaveTable(graph)
        sizes = [0] * count
        for wave in best:
            sizes[wave] += 1

        last = min(range(count), key=sizes.__getitem__)
        homeless: deque[int] = deque()
        for task, wave in enumerate(best):
            if wave == last:
                homeless.append(task)
            else:
                # The dropped wave's number goes to the last one, so that the numbers stay dense.
                table.place(task, last if wave == count - 1 else wave)

        steps -= len(waves)
        if not _rehouse(graph, table, homeless, palette=(1 << (count - 1)) - 1, steps=steps, rng=rng):
            break

        steps -= table.steps
        best = list(table.waves)
        count -= 1

    return best


def _rehouse(
    graph: TaskGraph, table: WaveTable, homeless: deque[int], *, palette: int, steps: int, rng: random.Random
) -> bool:
    banned: dict[tuple[int, int], int] = {}
    turn = 0
    while homeless:
        if table.steps > steps:
            return False

        turn += 1
        task = homeless.popleft()
        if table.insert(task, palette, attempts=8, limit=200):
            continue

        ports = graph.ports[task]
        fewest: list[int] = []
        chosen = -1
        for wave in range(palette.bit_length()):
            if banned.get((task, wave), 0) > turn:
                continue

            evicted = list({table.at[port][wave]: None for port in ports if wave in table.at[port]})
            if chosen < 0 or (len(evicted), rng.random()) < (len(fewest), 0.5):
                fewest, chosen = evicted, wave

        table.steps += palette.bit_length() * len(ports)
        if chosen < 0:
            homeless.append(task)
            continue

        for other in fewest:
            table.remove(other)
            banned[other, chosen] = turn + 3 + len(homeless) + rng.randrange(8)
            homeless.append(other)

        table.place(task, chosen)

    return True


def repack_waves(graph: TaskGraph, waves: list[int], *, target: tuple[int, int], steps: int) -> list[int]:
    """
    Fill waves again and again by first fit, taking the tasks wave after wave.

    Culberson's iterated greedy (1992): as the tasks of a wave come one after the other, the next filling cannot have
    more waves, whatever the order of the waves. Mostly the longest waves come first, which tends to shorten the others
    too; what is no longer than before is kept.

    :param waves: a proper colouring without empty waves
    :param target: the sum of the waves' largest tasks, and their number, to stop at
    :param steps: how many to take
    """
    rng = random.Random(len(waves))
    memberships = sum(map(len, graph.ports))
    best, figures = waves, span(graph, waves)
    while steps >= memberships and figures > target:
        steps -= memberships
        members = _members(best)
        longest = [max(graph.nbytes[task] for task in member) for member in members]
        if rng.random() < 0.4:
            keys = [-size * (0.9 + 0.2 * rng.random()) for size in longest]
        elif rng.random() < 0.8:
            keys = [-size + 0.5 * rng.random() for size in longest]
        else:
            keys = [rng.random() for _ in longest]

        order: list[int] = []
        for wave in sorted(range(len(members)), key=keys.__getitem__):
            rng.shuffle(members[wave])
            order += members[wave]

        filled = close_gaps(greedy(graph, order))
        if span(graph, filled) <= figures:
            best, figures = filled, span(graph, filled)

    return best


def sort_sizes(graph: TaskGraph, waves: list[int], *, target: int, steps: int) -> list[int]:
    """
    Make the tasks of a wave alike in size, in no more waves than before.

    Takes two waves at random and exchanges them along each of their chains on which the second has more bytes, squared
    and summed up, than the first; along even ones at random. So large tasks gather in some waves and small ones in
    others, while even exchanges keep it from getting stuck.

    :param waves: a proper colouring without empty waves
    :param target: the sum of the waves' largest tasks to stop at
    :param steps: how many to take
    :return: the colouring met with the smallest sum
    """
    rng = random.Random(len(waves))
    table = WaveTable(graph)
    for task, wave in enumerate(waves):
        table.place(task, wave)

    weights = [nbytes * nbytes for nbytes in graph.nbytes]
    members: list[set[int]] = [set(member) for member in _members(waves)]
    heavy = [sum(weights[task] for task in member) for member in members]
    longest = [max(graph.nbytes[task] for task in member) for member in members]
    best, total = waves, sum(longest)
    while len(members) > 1 and total > target and table.steps < steps:
        first, second = rng.sample(range(len(members)), 2)
        if heavy[first] < heavy[second]:
            first, second = second, first

        turned: list[int] = []
        gain = 0
        for chain in _chains(table, sorted(members[second]), second, first):
            more = sum(weights[task] if table.waves[task] == second else -weights[task] for task in chain)
            if more > 0 or (more == 0 and rng.random() < 0.5):
                turned += chain
                gain += more

        if not turned:
            continue

        table.exchange(turned, first, second)
        members[first].symmetric_difference_update(turned)
        members[second].symmetric_difference_update(turned)
        heavy[first] += gain
        heavy[second] -= gain
        for wave in (first, second):
            longest[wave] = max((graph.nbytes[task] for task in members[wave]), default=0)

        if sum(longest) < total:
            best, total = list(table.waves), sum(longest)

    return best


def _chains(table: WaveTable, tasks: list[int], wave: int, other: int) -> Iterator[list[int]]:
    """Yield the chains of two waves that hold any of ``tasks``, all of which are in ``wave``."""
    seen: set[int] = set()
    for task in tasks:
        if task not in seen:
            chain = table.chain((task,), wave, other, stop_at=frozenset(), limit=len(table.waves))
            seen.update(chain)
            yield chain


def _members(waves: list[int]) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(max(waves, default=-1) + 1)]
    for task, wave in enumerate(waves):
        members[wave].append(task)

    return members
