"""Local search for fewer waves."""

from __future__ import annotations

import random
from collections import deque

from wavecast.scheduler.ports import TaskGraph
from wavecast.scheduler.table import WaveTable

__all__ = ("reduce_waves",)


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
    :param steps: tasks and ports to look at; about four million a second
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
