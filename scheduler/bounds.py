"""What no schedule can go below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wavecast.scheduler.ports import TaskGraph

__all__ = ("Bound", "lower_bound", "uncut_nbytes", "least_span", "divisible_nbytes", "chain_nbytes")

# Triangles are looked for up to so many (pairs of neighbours of a port).
_TRIANGLE_PAIRS = 2_000_000


@dataclass(frozen=True, slots=True)
class Bound:
    """
    Lower bounds of a set of tasks.

    :ivar waves: no schedule has fewer waves; at least the number of tasks on the busiest port
    :ivar nbytes: bytes through the busiest port
    """

    waves: int
    nbytes: int


def lower_bound(graph: TaskGraph) -> Bound:
    """
    Return the bounds of ``graph``.

    The bound on waves is the largest of: tasks on the busiest port; tasks in the longest chain of dependencies; in a
    connected part, tasks over the most that fit beside each other, and those that each take more than half its ports;
    and one-to-one tasks within three ports (Shannon's triangle). O(memberships) and a sort, once a graph; triangles are
    given up on graphs with too many.
    """
    if not graph.bound_found:
        graph.bound_found.append(_find_bound(graph))

    return graph.bound_found[0]


def _find_bound(graph: TaskGraph) -> Bound:
    waves = max(max(graph.degrees(), default=0), max(graph.depths(), default=-1) + 1)
    rooms = _part_room(graph)
    packed = max((-(-count // beside) for _, beside, count, _ in rooms), default=0)
    crowded = max((large for *_, large in rooms), default=0)
    return Bound(
        waves=max(waves, packed, crowded, _triangle_bound(graph, [1] * len(graph.ports))),
        nbytes=max(graph.loads(), default=0),
    )


def uncut_nbytes(graph: TaskGraph, *, chunk_bytes: int | None = None) -> int:
    """
    Return what the sum over the waves of the largest task cannot go below, as long as no task is cut.

    The k-th longest wave holds a task at least as large as the k-th largest on any port, whatever the colouring: some
    wave among the k longest, or one as long, takes the last of that port's k largest tasks. At least the busiest port's
    bytes. O(memberships) and a sort.

    :param chunk_bytes: work it out for tasks cut into as few equal chunks of at most so many bytes, rounded up
    """
    if chunk_bytes is None:
        chunks = [1] * len(graph.nbytes)
    else:
        chunks = [max(1, -(-nbytes // chunk_bytes)) for nbytes in graph.nbytes]

    sizes = [-(-nbytes // count) for nbytes, count in zip(graph.nbytes, chunks, strict=True)]
    total = met = 0
    filled = [0] * graph.n_ports
    for task in sorted(range(len(sizes)), key=lambda task: -sizes[task]):
        for port in graph.ports[task]:
            filled[port] += chunks[task]
            if filled[port] > met:
                total += sizes[task] * (filled[port] - met)
                met = filled[port]

    return total


def least_span(graph: TaskGraph, *, waves: int) -> int:
    """
    Return a lower bound on the sum over the waves of the largest task, given a lower bound on their number.

    As :func:`uncut_nbytes`, where each wave beyond the busiest port's number of tasks has at least the smallest task.
    """
    more = max(0, waves - max(graph.degrees(), default=0))
    return uncut_nbytes(graph) + more * min(graph.nbytes, default=0)


def divisible_nbytes(graph: TaskGraph) -> int:
    """
    Return what the sum over the waves of the largest task cannot go below, even if tasks may be cut anywhere.

    The busiest port's bytes; in a connected part, all its bytes over the most tasks that fit beside each other; the
    bytes of one-to-one tasks within three ports; and those of the longest chain of dependencies, as all pieces of a
    task come before those of one after it. O(memberships); triangles are given up on graphs with too many.
    """
    nbytes: dict[int, int] = {}
    for task, root in enumerate(_parts(graph)):
        nbytes[root] = nbytes.get(root, 0) + graph.nbytes[task]

    packed = max((-(-nbytes[root] // beside) for root, beside, _, _ in _part_room(graph)), default=0)
    return max(packed, _triangle_bound(graph, graph.nbytes), chain_nbytes(graph), *graph.loads(), 0)


def chain_nbytes(graph: TaskGraph) -> int:
    """Return the most bytes of tasks that come after each other: cutting does not help, a task waits for whole ones."""
    if not graph.after:
        return max(graph.nbytes, default=0)

    ends = [0] * len(graph.ports)
    for position in graph.order:
        ends[position] = graph.nbytes[position] + max((ends[before] for before in graph.after[position]), default=0)

    return max(ends, default=0)


def _parts(graph: TaskGraph) -> list[int]:
    """Return for each task a port that stands for its connected part."""
    parent = list(range(graph.n_ports))

    def find(port: int) -> int:
        while parent[port] != port:
            parent[port] = parent[parent[port]]
            port = parent[port]

        return port

    for ports in graph.ports:
        root = find(ports[0])
        for port in ports[1:]:
            parent[find(port)] = root

    return [find(ports[0]) for ports in graph.ports]


def _part_room(graph: TaskGraph) -> list[tuple[int, int, int, int]]:
    """Return (root, most tasks beside each other, tasks, tasks that take more than half the ports) of each part."""
    roots = _parts(graph)
    seen: dict[int, set[int]] = {}
    sizes: dict[int, list[int]] = {}
    for ports, root in zip(graph.ports, roots, strict=True):
        seen.setdefault(root, set()).update(ports)
        sizes.setdefault(root, []).append(len(ports))

    found: list[tuple[int, int, int, int]] = []
    for root, members in sizes.items():
        room = len(seen[root])
        members.sort()
        taken = beside = 0
        for size in members:
            taken += size
            if taken > room:
                break

            beside += 1

        found.append((root, beside, len(members), sum(2 * size > room for size in members)))

    return found


def _triangle_bound(graph: TaskGraph, weights: Sequence[int]) -> int:
    """Return the most weight of one-to-one tasks within any three ports: they all share a port with each other."""
    between: list[dict[int, int]] = [{} for _ in range(graph.n_ports)]
    for ports, weight in zip(graph.ports, weights, strict=True):
        if len(ports) == 2:
            a, b = ports
            between[a][b] = between[a].get(b, 0) + weight
            between[b][a] = between[b].get(a, 0) + weight

    if sum(len(neighbours) ** 2 for neighbours in between) > _TRIANGLE_PAIRS:
        return 0

    most = 0
    for a, neighbours in enumerate(between):
        for b, count in neighbours.items():
            if b > a:
                for c, other in between[b].items():
                    if c > b and c in neighbours:
                        most = max(most, count + other + neighbours[c])

    return most
