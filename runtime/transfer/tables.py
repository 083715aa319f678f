"""Segments laid down on the device, and the launches that work them off."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from wavecast.runtime.transfer.segments import Segment, split_segment, unit_nbytes

__all__ = (
    "Table",
    "build_tables",
    "copy_table",
    "stage_table",
    "stage_and_sum_table",
    "sum_source",
    "sum_target",
    "has_kernels",
    "warm_up",
)

_compiling = threading.Lock()
_compiled: set[tuple[str, int]] = set()

#: Warps a program, and how many programs: half of an H200 is enough for a link (372 GB/s with 64, 374 with 132), two a
#: multiprocessor for its own memory (1.9 TB/s); a quarter sums up several times what a link brings (1.2 TB/s with 32).
#: What copies and what sums up run side by side, so neither takes more than it needs.
_COPY_WARPS, _SUM_WARPS = 16, 8
_FAR, _NEAR, _ASIDE = 0.5, 2.0, 0.25
#: NCCL's kernels take 32 multiprocessors: one that finds none free waits for whatever has them all.
_BESIDE = 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """
    Segments of one unit, as the kernel reads them.

    :ivar rows: int64, a row a segment, on the device
    :ivar tiles: int32, the segment of each tile
    :ivar unit: bytes of a unit: 8 (taken by two), 4, 2 or 1
    """

    rows: torch.Tensor
    tiles: torch.Tensor
    unit: int


@functools.cache
def has_kernels() -> bool:
    """Tell whether this process can run the fused kernels: a CUDA device, and Triton, which comes with torch for it."""
    if not torch.cuda.is_available():
        return False

    try:
        from wavecast.runtime.transfer import kernels  # noqa: F401
    except ImportError:
        return False

    return True


def warm_up(device: torch.device) -> None:
    """Compile what pulls need on a thread of its own: that takes seconds, once on a machine."""
    thread = threading.Thread(target=_compile, args=(device,), name="wavecast-compile", daemon=True)
    thread.start()


def _compile(device: torch.device) -> None:
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        bits = torch.zeros(4, dtype=torch.int64, device=device)
        (table,) = build_tables([Segment(bits.data_ptr(), bits.data_ptr() + 16, 1, 16, 0, 0, 0)], device)
        sum_source(table, torch.zeros(1, dtype=torch.int64, device=device))
        copy_table(table)


def build_tables(segments: Iterable[Segment], device: torch.device) -> tuple[Table, ...]:
    """Lay ``segments`` down on ``device``, a table for each unit. The copy is over when this returns."""
    from wavecast.runtime.transfer.kernels import UNITS_PER_TILE

    by_unit: dict[int, list[Segment]] = {}
    for whole in segments:
        for segment in split_segment(whole):
            by_unit.setdefault(min(unit_nbytes(segment), 8), []).append(segment)

    return tuple(_table(found, unit, UNITS_PER_TILE, device) for unit, found in sorted(by_unit.items()))


def _table(segments: Sequence[Segment], unit: int, units_per_tile: int, device: torch.device) -> Table:
    columns = torch.tensor(segments, dtype=torch.int64)
    source, target, rows, nbytes, source_pitch, target_pitch, wire = columns.unbind(dim=1)
    tiles = (rows * nbytes // unit + units_per_tile - 1) // units_per_tile
    table = torch.stack(
        (
            source,
            target,
            rows,
            nbytes // unit,
            source_pitch // unit,
            target_pitch // unit,
            wire // unit,
            tiles.cumsum(0) - tiles,
        ),
        dim=1,
    )
    numbers = torch.arange(len(segments), dtype=torch.int32)
    return Table(table.to(device), torch.repeat_interleave(numbers, tiles).to(device), unit)


def copy_table(table: Table, *, source_base: int = 0, target_base: int = 0, near: bool = True) -> None:
    """
    Queue the copies of ``table`` on the current stream; the bases are added to its addresses.

    :param near: both ends are in this device's memory
    """
    _launch(table, source_base, target_base, table.rows, "COPY", _COPY_WARPS, _NEAR if near else _FAR)


def stage_table(table: Table, *, source_base: int = 0, target_base: int = 0, alone: bool = False) -> None:
    """
    Queue the copies of ``table`` to or from staging memory: beside a transport whose kernels need room as well.

    :param alone: nothing travels meanwhile: with all of the device
    """
    _launch(table, source_base, target_base, table.rows, "COPY", _COPY_WARPS, _NEAR if alone else _BESIDE)


def stage_and_sum_table(
    table: Table, total: torch.Tensor, *, source_base: int = 0, target_base: int = 0, alone: bool = False
) -> None:
    """As :func:`stage_table`; the weighed sum of what was read is added to ``total`` (one int64)."""
    _launch(table, source_base, target_base, total, "COPY_AND_SUM", _COPY_WARPS, _NEAR if alone else _BESIDE)


def sum_source(table: Table, total: torch.Tensor, *, source_base: int = 0, hurry: bool = True) -> None:
    """
    Queue the weighed sum of all that ``table`` reads; it is added to ``total`` (one int64).

    :param hurry: with all of the device: where processes share one they take turns on it, and the shortest turn is best
    """
    _launch(table, source_base, 0, total, "SUM_SOURCE", _SUM_WARPS, _NEAR if hurry else _ASIDE)


def sum_target(table: Table, total: torch.Tensor, *, target_base: int = 0, alone: bool = False) -> None:
    """
    Queue the weighed sum of all that lies where ``table`` writes; it is added to ``total`` (one int64).

    :param alone: as for :func:`stage_table`
    """
    _launch(table, 0, target_base, total, "SUM_TARGET", _SUM_WARPS, _NEAR if alone else _BESIDE)


def _launch(
    table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str, warps: int, share: float
) -> None:
    key = (mode, table.unit)
    if key not in _compiled:
        # One thread compiles, another that needs the same waits for it.
        with _compiling:
            _launch_now(table, source_base, target_base, total, mode, warps, share)
            _compiled.add(key)
    else:
        _launch_now(table, source_base, target_base, total, mode, warps, share)


def _launch_now(
    table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str, warps: int, share: float
) -> None:
    from wavecast.runtime.transfer import kernels

    count = table.tiles.numel()
    grid = min(count, max(int(share * _multiprocessors(table.rows.device)), 1))
    kernels.walk[(grid,)](
        table.rows,
        table.tiles,
        count,
        source_base,
        target_base,
        total,
        getattr(kernels, mode),
        table.unit,
        kernels.TYPES[table.unit],
        num_warps=warps,
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
