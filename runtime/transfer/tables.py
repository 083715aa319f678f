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
    "copy_and_sum_table",
    "sum_source",
    "sum_target",
    "has_kernels",
    "warm_up",
)

_compiling = threading.Lock()
_compiled: set[tuple[str, int]] = set()

#: Warps a program; and programs a multiprocessor to copy, which a link or the memory limits, and to sum up.
_COPY_WARPS, _COPY_PROGRAMS = 16, 1
_SUM_WARPS, _SUM_PROGRAMS = 8, 2


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


def copy_table(table: Table, *, source_base: int = 0, target_base: int = 0) -> None:
    """Queue the copies of ``table`` on the current stream; the bases are added to its addresses."""
    _launch(table, source_base, target_base, table.rows, "COPY", _COPY_WARPS, _COPY_PROGRAMS)


def copy_and_sum_table(table: Table, total: torch.Tensor, *, source_base: int = 0, target_base: int = 0) -> None:
    """Queue the copies of ``table`` and add the weighed sum of what was read to ``total`` (one int64)."""
    _launch(table, source_base, target_base, total, "COPY_AND_SUM", _COPY_WARPS, 2 * _COPY_PROGRAMS)


def sum_source(table: Table, total: torch.Tensor, *, source_base: int = 0) -> None:
    """Queue the weighed sum of all that ``table`` reads; it is added to ``total`` (one int64)."""
    _launch(table, source_base, 0, total, "SUM_SOURCE", _SUM_WARPS, _SUM_PROGRAMS)


def sum_target(table: Table, total: torch.Tensor, *, target_base: int = 0) -> None:
    """Queue the weighed sum of all that lies where ``table`` writes; it is added to ``total`` (one int64)."""
    _launch(table, 0, target_base, total, "SUM_TARGET", _SUM_WARPS, _SUM_PROGRAMS)


def _launch(
    table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str, warps: int, programs: int
) -> None:
    key = (mode, table.unit)
    if key not in _compiled:
        # One thread compiles, another that needs the same waits for it.
        with _compiling:
            _launch_now(table, source_base, target_base, total, mode, warps, programs)
            _compiled.add(key)
    else:
        _launch_now(table, source_base, target_base, total, mode, warps, programs)


def _launch_now(
    table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str, warps: int, programs: int
) -> None:
    from wavecast.runtime.transfer import kernels

    count = table.tiles.numel()
    grid = min(count, programs * _multiprocessors(table.rows.device))
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
