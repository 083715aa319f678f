"""Which waves the ports of a plan have a task in: bitmasks, in rows."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ("TakenWaves", "ROW_WAVES", "FULL_ROW")

ROW_WAVES = 4096
"""Waves in a row. A whole mask of a port with 100,000 tasks would be copied with each of them."""

FULL_ROW = (1 << ROW_WAVES) - 1


class _Row(dict[int, int]):
    """Masks of the ports that have a task in these waves: far rows are mostly empty."""

    def __missing__(self, port: int) -> int:
        return 0


class TakenWaves:
    """
    The waves that each port has a task in, without end.

    A bit a wave, in rows of :data:`ROW_WAVES`: an operation costs no more than a row, however many waves there are.
    Memory in proportion to the memberships.

    :ivar low: the first row, by port: all there is for plans of no more waves, and open to be changed in place
    """

    __slots__ = ("_full", "_rows", "low")

    def __init__(self, n_ports: int) -> None:
        self.low = [0] * n_ports
        self._rows: list[list[int] | _Row] = [self.low]
        self._full = [0] * n_ports  # per port: no row before this one has a free wave

    def first(self, ports: tuple[int, ...], least: int = 0) -> int:
        """Return the first wave, from ``least`` on, that all of ``ports`` have free."""
        row, offset = divmod(least, ROW_WAVES)
        taken = (1 << offset) - 1
        for port in ports:
            if (skipped := self._skip_full(port)) > row:
                row, taken = skipped, 0

        while row < len(self._rows):
            masks = self._rows[row]
            for port in ports:
                taken |= masks[port]

            if taken != FULL_ROW:
                break

            row, taken = row + 1, 0

        return row * ROW_WAVES + (~taken & (taken + 1)).bit_length() - 1

    def take(self, ports: Iterable[int], wave: int) -> None:
        """Note that ``ports`` have a task in ``wave``, which they had free."""
        row, offset = divmod(wave, ROW_WAVES)
        while row >= len(self._rows):
            self._rows.append(_Row())

        masks, bit = self._rows[row], 1 << offset
        for port in ports:
            masks[port] |= bit

    def free(self, port: int, wave: int) -> None:
        """Note that ``port`` has no task in ``wave`` any more."""
        row, offset = divmod(wave, ROW_WAVES)
        self._rows[row][port] ^= 1 << offset
        self._full[port] = min(self._full[port], row)

    def _skip_full(self, port: int) -> int:
        row = self._full[port]
        while row < len(self._rows) and self._rows[row][port] == FULL_ROW:
            row += 1

        self._full[port] = row
        return row
