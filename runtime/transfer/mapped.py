"""The allocations that others have mapped, and whether they still are what they were."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from wavecast.runtime.transfer.cuda_memory import ensure_current, identity_of

__all__ = ("Mapped",)


class Mapped:
    """
    Allocations of which others have been told how to map them, by where they start.

    One that was freed and made anew may lie where the old one did: tensors look as they did before, but what others
    have mapped is the old memory. CUDA numbers all allocations of a process, and uses no number twice.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._starts: list[int] = []
        self._index = 0

    def note(self, ranges: Iterable[tuple[int, int]], index: int) -> None:
        """
        Note what others are told of.

        :param ranges: where each allocation starts and ends
        :param index: the number of the GPU whose memory it is
        """
        self._index = index
        self._known.update((start, (stop, identity_of(start))) for start, stop in ranges)
        self._starts = sorted(self._known)

    def holding(self, addresses: Iterable[int]) -> tuple[int, ...]:
        """Return which allocations hold ``addresses``, each once, as far as others were told of them."""
        found: dict[int, None] = {}
        for address in addresses:
            place = bisect.bisect_right(self._starts, address) - 1
            if place >= 0 and address < self._known[self._starts[place]][0]:
                found[self._starts[place]] = None

        return tuple(found)

    def changed(self, starts: Sequence[int] | None = None) -> range | None:
        """
        Return the addresses of an allocation that is not what it was; ``None``: there is none.

        :param starts: of those to look at, a microsecond each; ``None``: all
        """
        chosen = self._starts if starts is None else starts
        if chosen:
            ensure_current(self._index)

        for start in chosen:
            stop, identity = self._known[start]
            if identity_of(start) != identity:
                return range(start, stop)

        return None
