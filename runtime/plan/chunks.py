"""Byte runs cut into equal chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.dtypes import ITEMSIZE
from wavecast.runtime.plan.route import Route

__all__ = (
    "cut_run",
    "choose_chunk_bytes",
    "start_nbytes",
    "MIN_CHUNK_BYTES",
    "MAX_CHUNK_BYTES",
    "LARGEST_ELEMENT",
)

#: Below this a link is far from its speed: NCCL reaches 138 GB/s at 16 MiB, 349 at 1 GiB.
MIN_CHUNK_BYTES = 16 << 20
#: A task is one call of each of its actors: a failure is noticed, and a deadline kept, within its time.
MAX_CHUNK_BYTES = 256 << 30

_FINEST = 32  # the search goes down to one part in so many of the busiest port's bytes
_START_NBYTES = 64 << 20  # what a link could have moved while a call reaches an actor and its answer the driver
_KINDS, _COUNTS, _SIZES = 8, 24, 256  # how far the search looks
_EVEN = 256  # chunks may differ by one part in so many where that spares cutting a row
#: The least that a chunk may be.
LARGEST_ELEMENT = max(ITEMSIZE.values())


def choose_chunk_bytes(
    port_nbytes: int, run_nbytes: Iterable[int] = (), *, min_chunk_bytes: int = MIN_CHUNK_BYTES
) -> int:
    """
    Return the chunk size for runs of ``run_nbytes`` bytes each, when the busiest port moves ``port_nbytes``.

    Between a thirty-second and all of the busiest port's bytes, between ``min_chunk_bytes`` and 256 GiB. Within that
    the size that makes chunks of different runs most alike, since a wave lasts as long as its largest task: runs of
    600 and 900 MB are best cut in 300 MB. Each chunk is charged its start, so coarse wins where it is as good: where
    all runs are of one size none is cut. (Tasks need not be small for packing to overlap the wire: their buckets are.)
    """
    most = max(min_chunk_bytes, min(MAX_CHUNK_BYTES, port_nbytes))
    least = max(min_chunk_bytes, most // _FINEST)
    start = start_nbytes(port_nbytes)
    runs = Counter(run_nbytes)
    heaviest = sorted(runs, key=lambda nbytes: (-nbytes * runs[nbytes], nbytes))[:_SIZES]
    candidates = {most}
    for nbytes in heaviest[:_KINDS]:
        fewest = -(-nbytes // most)
        for count in range(fewest, min(nbytes // least, fewest + _COUNTS) + 1):
            candidates.add(-(-nbytes // count))

    def cost(chunk_bytes: int) -> float:
        cut = [(nbytes, -(-nbytes // chunk_bytes), runs[nbytes]) for nbytes in heaviest]
        largest = max((nbytes / count for nbytes, count, _ in cut), default=0.0)
        # A task more than half as long as the longest shares a wave with one of that length, as a rule.
        return sum(
            times * count * (start + (largest if 2 * nbytes > largest * count else nbytes / count))
            for nbytes, count, times in cut
        )

    return min(sorted(candidates, reverse=True), key=cost)


def start_nbytes(port_nbytes: int) -> int:
    """Return what to charge a task or a wave for its start, in bytes, when the busiest port moves ``port_nbytes``."""
    return min(_START_NBYTES, max(port_nbytes // _FINEST, 1))


def cut_run(routes: Sequence[Route], *, chunk_bytes: int) -> tuple[tuple[Route, ...], ...]:
    """
    Cut ``routes``, taken as one run of bytes in their order, into the fewest equal chunks of at most ``chunk_bytes``.

    A border inside a route falls between two rows (indices of its first dim) where chunks stay within one part in 256
    of equal, else between any two elements: the route is then cut by its row-major range, at most ``2 n - 1`` boxes a
    part.

    :raises ConfigError: when ``chunk_bytes`` is less than the largest element (16 bytes)
    """
    if chunk_bytes < LARGEST_ELEMENT:
        raise ConfigError(f"chunk_bytes is {chunk_bytes}; an element may need {LARGEST_ELEMENT}")

    total = sum(route.nbytes for route in routes)
    count = -(-total // chunk_bytes)
    if count <= 1:
        return (tuple(routes),) if total else ()

    # Elements do not always end where a chunk should: then it takes a chunk more.
    while True:
        borders = _place_borders(routes, total, count, chunk_bytes)
        if all(stop - start <= chunk_bytes for start, stop in pairwise(borders)):
            return tuple(_slice(routes, borders))

        count += max(1, count // 8)


def _place_borders(routes: Sequence[Route], total: int, count: int, chunk_bytes: int) -> list[int]:
    """Return ascending positions from 0 to ``total``, each between two elements."""
    tolerance = total // count // (2 * _EVEN)
    borders = [0]
    walk = iter(routes)
    route, start = next(walk), 0
    for number in range(1, count):
        ideal = number * total // count
        while start + route.nbytes <= ideal:
            start += route.nbytes
            route = next(walk)

        row = route.nbytes // route.extent[0] if route.extent else route.nbytes
        by_row = start + (ideal - start + row // 2) // row * row
        fits = by_row - borders[-1] <= chunk_bytes and total - by_row <= (count - number) * chunk_bytes
        if fits and abs(by_row - ideal) <= tolerance:
            position = by_row
        else:
            size = ITEMSIZE[route.dtype]
            position = start + (ideal - start) // size * size

        if position > borders[-1]:
            borders.append(position)

    borders.append(total)
    return borders


def _slice(routes: Sequence[Route], borders: Sequence[int]) -> list[tuple[Route, ...]]:
    chunks: list[tuple[Route, ...]] = []
    chunk: list[Route] = []
    start, number = 0, 1
    for route in routes:
        stop, done = start + route.nbytes, 0
        while borders[number] < stop:
            part = borders[number] - start
            chunk.extend(_cut_bytes(route, done, part))
            chunks.append(tuple(chunk))
            chunk, done, number = [], part, number + 1

        chunk.extend(_cut_bytes(route, done, route.nbytes))
        start = stop
        if borders[number] == stop:
            chunks.append(tuple(chunk))
            chunk, number = [], number + 1

    return chunks


def _cut_bytes(route: Route, start: int, stop: int) -> tuple[Route, ...]:
    if start == 0 and stop == route.nbytes:
        return (route,)

    size = ITEMSIZE[route.dtype]
    return tuple(route.cut(box) for box in route.box.split_flat(start // size, stop // size))
