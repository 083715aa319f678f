"""
A GPU made of host memory: streams, events, copies and kernels, for what only ever ran on a device.

Work that is queued on a stream is kept until somebody drains the device, and then done in the most awkward order that
the events allow: what was not ordered runs in the wrong one. The kernels are read off their tables by plain Python and
numpy, which share no code with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from wavecast.runtime.transfer import arrivals, board, fused, lending, mapped, pull, tables
from wavecast.runtime.transfer.tables import Table

#: Small, so that small tensors take several tiles.
UNITS_PER_TILE = 24


class Stream:
    def __init__(self, device: object = None) -> None:
        self.work: list[Callable[[], bool]] = []
        self.cuda_stream = id(self)
        DEVICE.streams.append(self)

    def put(self, job: Callable[[], object]) -> None:
        def run() -> bool:
            job()
            return True

        self.work.append(run)

    def wait_event(self, event: Event) -> None:
        ticket = event.ticket
        self.work.append(lambda: ticket is None or ticket[0])

    def wait_stream(self, other: Stream) -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        DEVICE.drain()


class Event:
    """Without a record it holds nobody up."""

    def __init__(self) -> None:
        self.ticket: list[bool] | None = None

    def record(self, stream: Stream) -> None:
        ticket = self.ticket = [False]

        def done() -> None:
            ticket[0] = True

        stream.put(done)

    def query(self) -> bool:
        return self.ticket is None or self.ticket[0]


class Device:
    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.current: Stream | None = None
        self.default: Stream | None = None
        #: Of the streams that may go on, which goes on: first to last made, or the other way round.
        self.backwards = False

    def clear(self, *, backwards: bool) -> None:
        self.streams.clear()
        self.backwards = backwards
        self.default = self.current = Stream()

    def drain(self) -> None:
        """Do all that is queued; one job of one stream at a time."""
        while any(stream.work for stream in self.streams):
            order = reversed(self.streams) if self.backwards else iter(self.streams)
            for stream in order:
                done = False
                while stream.work and stream.work[0]():
                    stream.work.pop(0)
                    done = True

                if done:
                    break
            else:
                raise AssertionError("the streams wait for each other")

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


DEVICE = Device()


class HostTorch:
    """torch, but for its CUDA."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            stream=DEVICE.stream,
            current_stream=lambda device=None: DEVICE.current,
            current_device=lambda: 0,
        )

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def zeros(*sizes: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        found: torch.Tensor = torch.zeros(*sizes, **options)  # type: ignore[call-overload]
        found.record_stream = lambda stream: None  # type: ignore[method-assign]
        return found


class CopyBatch:
    """:cvar started: bytes of each copy that a copy engine made"""

    started: ClassVar[list[int]] = []

    def __init__(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self.copies = list(copies)

    def start(self, stream: int) -> None:
        found = stream_of(stream)
        for target, source, nbytes in self.copies:
            self.started.append(nbytes)
            found.put(functools.partial(ctypes.memmove, target, source, nbytes))


class Exporter:
    """Memory is shared in pages of 64 KiB, so that a tensor of some size lies in several."""

    def __init__(self) -> None:
        self.handles: list[bytes] = []

    def locate(self, address: int) -> tuple[int, int]:
        handle = self.handle_of(address >> 16)
        if handle not in self.handles:
            self.handles.append(handle)

        return self.handles.index(handle), address & 0xFFFF

    @property
    def ranges(self) -> list[tuple[int, int]]:
        starts = [int.from_bytes(handle[:8], "little") << 16 for handle in self.handles]
        return [(start, start + 0x10000) for start in starts]

    def handle_of(self, page: int) -> bytes:
        return page.to_bytes(8, "little")


def allocation_of(address: int) -> int:
    return address & ~0xFFFF


#: How often each handle is open now.
OPENED: dict[bytes, int] = {}


def open_memory(handle: bytes) -> int:
    OPENED[handle] = OPENED.get(handle, 0) + 1
    return int.from_bytes(handle, "little") << 16


def close_memory(handle: bytes) -> None:
    OPENED[handle] -= 1
    assert OPENED[handle] >= 0


def read_async(target: int, source: int, nbytes: int, stream: int) -> None:
    ctypes.memmove(target, source, nbytes)


def fetch(target: int, source: int, nbytes: int, stream: int) -> None:
    stream_of(stream).put(functools.partial(ctypes.memmove, target, source, nbytes))


def stream_of(number: int) -> Stream:
    (found,) = [each for each in DEVICE.streams if each.cuda_stream == number]
    return found


def write_word(address: int, value: int, stream: int) -> None:
    ctypes.c_int64.from_address(address).value = value


def clear_words(address: int, count: int, stream: int) -> None:
    ctypes.memset(address, 0, 8 * count)


def launch(
    table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str, warps: int, programs: int
) -> None:
    assert DEVICE.current is not None
    DEVICE.current.put(lambda: walk(table, source_base, target_base, total, mode))


def walk(table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str) -> None:
    """Work off a table as its columns say, tile by tile."""
    unit = table.unit
    for tile, number in enumerate(table.tiles.tolist()):
        source, target, rows, width, source_pitch, target_pitch, wire, first = table.rows[number].tolist()
        start = (tile - first) * UNITS_PER_TILE
        stop = min(start + UNITS_PER_TILE, rows * width)
        assert 0 <= start < stop
        while start < stop:
            row, column = divmod(start, width)
            count = min(stop - start, width - column)
            read = source_base + source + (row * source_pitch + column) * unit
            write = target_base + target + (row * target_pitch + column) * unit
            if unit == 8:
                # Read 16 bytes at a time, wherever a row starts.
                assert (source_base + source + row * source_pitch * unit) % 16 == 0 or mode == "SUM_TARGET"
                assert (target_base + target + row * target_pitch * unit) % 16 == 0 or mode == "SUM_SOURCE"
                assert width % 2 == 0

            data = ctypes.string_at(write if mode == "SUM_TARGET" else read, count * unit)
            if mode.startswith("COPY"):
                ctypes.memmove(write, data, len(data))

            if mode != "COPY":
                value = int(total) + weighed_sum(data, (wire + start) * unit)
                total.fill_(signed(value))

            start += count


def weighed_sum(data: bytes, first: int = 0) -> int:
    """Return the sum of the wire's 32-bit words, each times its weight; ``data`` is what follows its byte ``first``."""
    values = np.frombuffer(data, np.uint8).astype(np.uint64)
    place = np.arange(first, first + len(data), dtype=np.uint64)
    lane = (place // np.uint64(8)).astype(np.uint32)
    mixed = lane * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x85EBCA77)
    low = (mixed ^ (mixed >> np.uint32(13))) | np.uint32(1)
    high = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x27D4EB2F) | np.uint32(1)
    weight = np.where(place % np.uint64(8) < 4, low, high).astype(np.uint64)
    words = values << (np.uint64(8) * (place % np.uint64(4)))
    return int((words * weight).sum(dtype=np.uint64))


def signed(value: int) -> int:
    """Return the int64 of the same bits as ``value`` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def install(monkeypatch: pytest.MonkeyPatch, *, backwards: bool = False) -> Device:
    """Put the host's memory in the place of a GPU's."""
    DEVICE.clear(backwards=backwards)
    OPENED.clear()
    CopyBatch.started = []
    # The kernels' own module needs Triton.
    stand_in = SimpleNamespace(UNITS_PER_TILE=UNITS_PER_TILE)
    monkeypatch.setitem(sys.modules, "wavecast.runtime.transfer.kernels", stand_in)
    monkeypatch.setattr(tables, "_launch", launch)
    monkeypatch.setattr(fused, "torch", HostTorch())
    monkeypatch.setattr(fused, "read_async", fetch)
    for module in (board, pull):
        monkeypatch.setattr(module, "torch", HostTorch())

    for module in (board, lending, pull):
        monkeypatch.setattr(module, "make_current", lambda index: None)

    for name in ("read_async", "write_word", "clear_words"):
        monkeypatch.setattr(board, name, globals()[name])

    monkeypatch.setattr(lending, "Exporter", Exporter)
    for name in ("CopyBatch", "allocation_of"):
        monkeypatch.setattr(arrivals, name, globals()[name])

    monkeypatch.setattr(mapped, "identity_of", lambda address: 1)
    monkeypatch.setattr(mapped, "ensure_current", lambda index: None)
    for name in ("open_memory", "close_memory"):
        monkeypatch.setattr(pull, name, globals()[name])

    return DEVICE
