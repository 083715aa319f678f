"""Triton kernels that walk a table of segments: copy, sum up, or both. Imported on CUDA only."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ("COLUMNS", "COPY", "COPY_AND_SUM", "SUM_SOURCE", "SUM_TARGET", "TYPES", "UNITS_PER_TILE", "walk")

#: Columns of a table, all in units but for the two addresses, which are in bytes: address to read, address to write,
#: rows, units a row, units from row to row at the source, at the target, unit of the wire it starts at, its first tile.
COLUMNS = 8

COPY = 0
COPY_AND_SUM = 1
SUM_SOURCE = 2
SUM_TARGET = 3

_WIDTH = tl.constexpr(2048)
_STEPS = tl.constexpr(8)
#: Units that one turn of one program works off.
UNITS_PER_TILE = 2048 * 8

TYPES = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit(do_not_specialize=["tile_count", "source_base", "target_base", "sums"])
def walk(  # type: ignore[no-untyped-def]
    table, tiles, tile_count, source_base, target_base, sums, MODE: tl.constexpr, UNIT: tl.constexpr, TYPE: tl.constexpr
):
    """
    Work off the tiles of all segments of ``table`` (int64, rows of :data:`COLUMNS`), in any order.

    :param tiles: int32, the segment of each tile
    :param source_base: added to every address to read, and ``target_base`` to every address to write
    :param sums: one int64, to which the weighed sum is added; unused by ``COPY``
    :param UNIT: bytes of a unit: 8, 4, 2 or 1. With 8, addresses, rows and pitches are multiples of 16 bytes
    :param TYPE: the integer type of that size
    """
    total = tl.zeros((_WIDTH,), tl.uint64)
    for tile in range(tl.program_id(0), tile_count, tl.num_programs(0)):
        row = table + tl.load(tiles + tile).to(tl.int64) * 8
        source = (tl.load(row) + source_base).to(tl.pointer_type(TYPE))
        target = (tl.load(row + 1) + target_base).to(tl.pointer_type(TYPE))
        rows = tl.load(row + 2)
        width = tl.load(row + 3)
        wire = tl.load(row + 6)
        start = (tile - tl.load(row + 7)) * (_WIDTH * _STEPS)
        if UNIT == 8:
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
            width = tl.multiple_of(width, 2)

        if rows == 1:
            for step in tl.static_range(_STEPS):
                flat = start + step * _WIDTH + tl.arange(0, _WIDTH)
                inside = flat < width
                if MODE == 3:
                    value = tl.load(target + flat, mask=inside, other=0)
                else:
                    value = tl.load(source + flat, mask=inside, other=0)

                if MODE <= 1:
                    tl.store(target + flat, value, mask=inside)

                if MODE >= 1:
                    total += _weighed(value, wire + flat, UNIT)
        else:
            source_pitch = tl.load(row + 4)
            target_pitch = tl.load(row + 5)
            if UNIT == 8:
                source_pitch = tl.multiple_of(source_pitch, 2)
                target_pitch = tl.multiple_of(target_pitch, 2)

            narrow = width.to(tl.int32)
            count = (rows * width).to(tl.int32)
            for step in tl.static_range(_STEPS):
                place = start.to(tl.int32) + step * _WIDTH + tl.arange(0, _WIDTH)
                within = place < count
                if UNIT == 8:
                    # Two units side by side are of one row: said so that they are moved as one.
                    even = place // 2 * 2
                    line = even // narrow
                    column = even - line * narrow + (place - even)
                    at_source = tl.max_contiguous(tl.multiple_of(line.to(tl.int64) * source_pitch + column, 2), 2)
                    at_target = tl.max_contiguous(tl.multiple_of(line.to(tl.int64) * target_pitch + column, 2), 2)
                else:
                    line = place // narrow
                    at_source = line.to(tl.int64) * source_pitch + (place - line * narrow)
                    at_target = line.to(tl.int64) * target_pitch + (place - line * narrow)

                if MODE == 3:
                    item = tl.load(target + at_target, mask=within, other=0)
                else:
                    item = tl.load(source + at_source, mask=within, other=0)

                if MODE <= 1:
                    tl.store(target + at_target, item, mask=within)

                if MODE >= 1:
                    total += _weighed(item, wire + place, UNIT)

    if MODE >= 1:
        tl.atomic_add(sums, tl.sum(total, 0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _weighed(value, place, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return each value, as the part of its 32-bit word that it is, times the weight of that word."""
    if UNIT == 8:
        bits = value.to(tl.uint64, bitcast=True)
        low = bits & 0xFFFFFFFF
        high = bits >> 32
        lane = place
    else:
        if UNIT == 4:
            word = value.to(tl.uint32, bitcast=True).to(tl.uint64)
        elif UNIT == 2:
            word = value.to(tl.uint16, bitcast=True).to(tl.uint64)
        else:
            word = value.to(tl.uint8, bitcast=True).to(tl.uint64)

        lane = place // (8 // UNIT)
        byte = (place % (8 // UNIT)) * UNIT
        low = tl.where(byte < 4, word << ((byte % 4) * 8).to(tl.uint64), 0).to(tl.uint64)
        high = tl.where(byte >= 4, word << ((byte % 4) * 8).to(tl.uint64), 0).to(tl.uint64)

    # Odd, and so never zero: a word that changed always shows.
    mixed = lane.to(tl.uint32) * 0x9E3779B1 + 0x7F4A7C15
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    first = (mixed ^ (mixed >> 13)) | 1
    second = ((mixed ^ (mixed >> 16)) * 0x27D4EB2F) | 1
    return low * first.to(tl.uint64) + high * second.to(tl.uint64)
