"""First fit, and what colourings cost."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.ports import TaskGraph
from wavecast.scheduler.taken import FULL_ROW, ROW_WAVES, TakenWaves

__all__ = ("greedy", "first_wave", "span", "close_gaps")


def greedy(graph: TaskGraph, order: Iterable[int]) -> list[int]:
    """
    Put each task, in ``order``, in the first wave that has its ports free and comes after those it depends on.

    O(memberships) operations on rows of 4,096 bits, one a wave; each steps over the rows in which its ports leave no
    wave free in common, of which there are at most waves / 4,096.

    :param order: every position once, dependencies first
    """
    taken = TakenWaves(graph.n_ports)
    low = taken.low
    waves = [0] * len(graph.ports)
    for position in order:
        ports = graph.ports[position]
        least = 0
        if graph.after and graph.after[position]:
            least = max([waves[earlier] for earlier in graph.after[position]]) + 1

        if least < ROW_WAVES:
            mask = (1 << least) - 1
            for port in ports:
                mask |= low[port]

            if mask != FULL_ROW:
                bit = ~mask & (mask + 1)
                for port in ports:
                    low[port] |= bit

                waves[position] = bit.bit_length() - 1
                continue

        wave = taken.first(ports, least)
        taken.take(ports, wave)
        waves[position] = wave

    return waves


def span(graph: TaskGraph, waves: list[int]) -> tuple[int, int]:
    """Return the sum over the waves of their largest task's bytes, and the number of waves."""
    longest: dict[int, int] = {}
    for wave, nbytes in zip(waves, graph.nbytes, strict=True):
        if nbytes > longest.get(wave, -1):
            longest[wave] = nbytes

    return sum(longest.values()), len(longest)


def close_gaps(waves: list[int]) -> list[int]:
    """Renumber waves without the empty ones, in the same order."""
    number = {wave: index for index, wave in enumerate(sorted(set(waves)))}
    return [number[wave] for wave in waves]


def first_wave(graph: TaskGraph, waves: list[int], position: int, taken: int) -> int:
    """Return the first wave not in the bitmask ``taken`` that comes after those of the tasks it depends on."""
    if graph.after and graph.after[position]:
        taken |= (2 << max(waves[before] for before in graph.after[position])) - 1

    return (~taken & (taken + 1)).bit_length() - 1
