"""First fit, and what colourings cost."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.ports import TaskGraph

__all__ = ("greedy", "first_wave", "span", "close_gaps")


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
            wave = first_wave(graph, waves, position, taken)
            bit = 1 << wave
        else:
            bit = ~taken & (taken + 1)
            wave = bit.bit_length() - 1

        for port in ports:
            busy[port] |= bit

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
