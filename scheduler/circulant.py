"""Which block each node of a circulant broadcast gets in each round of a phase."""

from __future__ import annotations

__all__ = ("receive_blocks", "skips")


def skips(nodes: int) -> tuple[int, ...]:
    """Return the distances of the graph, rising from 1, each half the next one, rounded up; then ``nodes`` itself."""
    found = [nodes]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)

    return tuple(reversed(found))


def receive_blocks(node: int, distances: tuple[int, ...]) -> tuple[int, ...]:
    """
    Return for each round of a phase the block that ``node`` receives from the node ``distances[round]`` behind it.

    Traff's schedule (2022, "(Poly)Logarithmic Time Construction of Round-optimal n-Block Broadcast Schedules"). A phase
    has a round for each distance; blocks are relative to it: the first blocks of this phase are 0 and up, one that is
    negative belongs to the phase before, and the next phase brings the same plus the number of rounds. A node gets one
    new block a phase, its base block, and all but that one of the phase before. What it sends in a round it received in
    an earlier one of this phase, or it is its base block of the phase before; node 0 sends block ``round``. Both are
    proved there.

    The block of a round comes along the path from node 0 that takes the last distances possible: paths are sought depth
    first, without distances that a round has already.

    :param node: 1 or more, below the last distance
    :param distances: what :func:`skips` returns
    """
    base = _base_block(node, distances)
    search = _PathSearch(node, distances, base)
    search.extend(0, search.head, 0)
    rounds = len(distances) - 1
    return tuple(base if index == rounds else index - rounds for index in search.found)


def _base_block(node: int, distances: tuple[int, ...]) -> int:
    """Return the smallest of the distances that sum up to ``node``, the largest taken first."""
    rest = node
    for index in reversed(range(len(distances) - 1)):
        if rest >= distances[index]:
            rest -= distances[index]
            if rest == 0:
                return index

    return len(distances) - 1


class _PathSearch:
    """Distances not used yet, as a linked list from the longest down, and what was found so far."""

    def __init__(self, node: int, distances: tuple[int, ...], base: int) -> None:
        self.found: list[int] = []  # per round so far: index of the last distance on the way to it
        self._distances = distances
        # Node 0 also stands one turn ahead, so that no distance back leads below it.
        self._target = node + distances[-1]
        self._last = 2 * distances[-1]
        indices = [index for index in reversed(range(len(distances))) if index != base]
        self.head = indices[0]
        self._next = dict(zip(indices, [*indices[1:], -1], strict=True))
        self._before = dict(zip(indices[1:], indices, strict=False))

    def extend(self, at: int, index: int, round: int) -> int:
        """Find paths through ``at`` with distances from ``index`` down, and return the first round without one."""
        distances, target = self._distances, self._target
        rounds = len(distances) - 1
        while index != -1 and round < rounds:
            reached = at + distances[index]
            if reached <= target - distances[round] and reached < self._last:
                if reached <= target - distances[round + 1]:
                    round = self.extend(reached, index, round)

                if round == rounds or at > target - distances[round + 1]:
                    return round

                self._last = reached
                self.found.append(index)
                round += 1
                self._unlink(index)

            index = self._next[index]

        return round

    def _unlink(self, index: int) -> None:
        # Its own link on stays: a search further up may stand on it.
        before, behind = self._before.get(index), self._next[index]
        if before is not None:
            self._next[before] = behind

        if behind != -1 and before is not None:
            self._before[behind] = before
        elif behind != -1:
            self._before.pop(behind, None)
