"""A partial colouring that can be changed: who holds which wave at each port."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.ports import TaskGraph

__all__ = ("WaveTable",)


class WaveTable:
    """
    Tasks placed in waves so far, found by port and wave.

    Waves are bits: ``free[p]`` has bit w set when port p has no task in wave w. A *chain* of two waves is a set of
    tasks in them that is connected through shared ports (a Kempe chain; on one-to-one tasks, a path or a cycle). As a
    port has at most one task in each of the two waves, exchanging the waves of a whole chain always leaves a proper
    colouring.

    :ivar waves: per task, its wave, or -1
    :ivar free: per port, a bitmask of the waves it has no task in; without end
    :ivar at: per port, its task in each wave it is busy in
    """

    __slots__ = ("_ports", "at", "free", "steps", "waves")

    def __init__(self, graph: TaskGraph) -> None:
        self._ports = graph.ports
        self.waves = [-1] * len(graph.ports)
        self.free = [-1] * graph.n_ports
        self.at: list[dict[int, int]] = [{} for _ in range(graph.n_ports)]
        self.steps = 0  #: tasks looked at while walking chains: a measure of time that is the same everywhere

    def place(self, task: int, wave: int) -> None:
        """Put a task that is in no wave into one that its ports have free."""
        self.waves[task] = wave
        for port in self._ports[task]:
            self.free[port] ^= 1 << wave
            self.at[port][wave] = task

    def remove(self, task: int) -> None:
        """Take a task out of its wave."""
        wave = self.waves[task]
        self.waves[task] = -1
        for port in self._ports[task]:
            self.free[port] ^= 1 << wave
            del self.at[port][wave]

    def common(self, task: int) -> int:
        """Return a bitmask of the waves that all ports of a task have free."""
        free = -1
        for port in self._ports[task]:
            free &= self.free[port]

        return free

    def chain(self, starts: Iterable[int], wave: int, other: int, *, stop_at: frozenset[int], limit: int) -> list[int]:
        """
        Return the chain of ``wave`` and ``other`` that holds the tasks ``starts``.

        :param stop_at: ports at which no task of ``other`` may be part of it
        :param limit: longest chain of interest
        :return: empty when the chain is too long or meets ``stop_at``
        """
        chain = list(starts)
        seen = set(chain)
        waves, at = self.waves, self.at
        for task in chain:  # grows while it is walked
            across = other if waves[task] == wave else wave
            for port in self._ports[task]:
                if across == wave and port in stop_at:
                    self.steps += len(chain)
                    return []

                neighbour = at[port].get(across)
                if neighbour is not None and neighbour not in seen:
                    seen.add(neighbour)
                    chain.append(neighbour)

            if len(chain) > limit:
                self.steps += len(chain)
                return []

        self.steps += len(chain)
        return chain

    def exchange(self, chain: Iterable[int], wave: int, other: int) -> None:
        """Exchange the two waves of a whole chain."""
        moved = [(task, other if self.waves[task] == wave else wave) for task in chain]
        for task, _ in moved:
            self.remove(task)

        for task, target in moved:
            self.place(task, target)

    def insert(self, task: int, palette: int, *, attempts: int = 32, limit: int = 2000) -> bool:
        """
        Place a task in a wave of ``palette``, exchanging two waves along a chain if need be.

        Where one wave is taken at some of its ports, and another free at all of those, exchanging the two along the
        chain of the tasks in the way frees the first. Tries pairs in a fixed order, fewest ports in the way first.

        :param palette: bitmask of the waves allowed
        :param attempts: pairs of waves to try
        :param limit: longest chain to exchange
        :return: whether it was placed
        """
        if common := self.common(task) & palette:
            self.place(task, (common & -common).bit_length() - 1)
            return True

        ports = self._ports[task]
        for wave, blocked in self._fewest_blocked(ports, palette):
            spare = palette
            for port in blocked:
                spare &= self.free[port]

            clear = frozenset(ports).difference(blocked)
            starts = tuple(dict.fromkeys(self.at[port][wave] for port in blocked))
            while spare:
                if attempts == 0:
                    return False

                attempts -= 1
                other = (spare & -spare).bit_length() - 1
                spare &= spare - 1
                if chain := self.chain(starts, wave, other, stop_at=clear, limit=limit):
                    self.exchange(chain, wave, other)
                    self.place(task, wave)
                    return True

        return False

    def _fewest_blocked(self, ports: tuple[int, ...], palette: int) -> list[tuple[int, list[int]]]:
        found: list[tuple[int, list[int]]] = []
        rest = palette
        while rest:
            bit = rest & -rest
            rest ^= bit
            found.append((bit.bit_length() - 1, [port for port in ports if not self.free[port] & bit]))

        self.steps += len(found) * len(ports)
        found.sort(key=lambda entry: len(entry[1]))
        return found
