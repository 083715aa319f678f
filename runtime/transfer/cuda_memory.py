"""The CUDA driver's calls that torch has no public face for: sharing memory between processes, copying in batches."""

from __future__ import annotations

import bisect
import ctypes
import functools
import threading
from collections.abc import Sequence

from wavecast.runtime.errors import TransportUnavailable

__all__ = (
    "CopyBatch",
    "Exporter",
    "allocation_of",
    "clear_words",
    "close_memory",
    "ensure_current",
    "identity_of",
    "make_current",
    "open_memory",
    "read_async",
    "write_word",
)

_HANDLE_NBYTES = 64
_LAZY_PEER_ACCESS = 1
_STREAM_ORDER = 1
_BUFFER_ID = 7
_OPENED: dict[bytes, tuple[int, int]] = {}
_opening = threading.Lock()


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_NBYTES),)


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


def make_current(index: int) -> None:
    """Make the primary context of visible device ``index`` current on this thread, as torch's own calls do."""
    _check(_cuda().cuCtxSetCurrent(_primary_context(index)), "cuCtxSetCurrent")


def ensure_current(index: int) -> None:
    """Make some context current on this thread, that of device ``index`` if it has none: whose it is stays as it is."""
    current = ctypes.c_void_p()
    _check(_cuda().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if not current:
        make_current(index)


class Exporter:
    """
    Turns addresses of this process into handles that other processes of the node can open.

    :ivar handles: one for each allocation met so far
    """

    def __init__(self) -> None:
        self.handles: list[bytes] = []
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, int]] = []

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where each allocation met so far starts and ends."""
        return [(start, stop) for start, stop, _ in self._ranges]

    def locate(self, address: int) -> tuple[int, int]:
        """
        Return the number of the handle of the allocation that holds ``address``, and its offset in it.

        :raises TransportUnavailable: when the allocation cannot be shared: one of expandable segments, for one
        """
        found = bisect.bisect_right(self._starts, address) - 1
        if found >= 0 and address < self._ranges[found][1]:
            start, _, number = self._ranges[found]
            return number, address - start

        first, nbytes = _range_of(address)
        handle = _Handle()
        _check(_cuda().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(first)), "cuIpcGetMemHandle")
        number = len(self.handles)
        self.handles.append(ctypes.string_at(ctypes.byref(handle), _HANDLE_NBYTES))
        place = bisect.bisect_right(self._starts, first)
        self._starts.insert(place, first)
        self._ranges.insert(place, (first, first + nbytes, number))
        return number, address - first


def allocation_of(address: int) -> int:
    """Return where the allocation starts that holds ``address``; 0 for no address, as an empty tensor has."""
    return _range_of(address)[0] if address else 0


def identity_of(address: int) -> int:
    """
    Return the number of the allocation that holds ``address``; 0 where there is none.

    No other allocation of the process ever has the same. A context must be current on this thread.
    """
    found = ctypes.c_uint64()
    failed = _cuda().cuPointerGetAttribute(ctypes.byref(found), ctypes.c_int(_BUFFER_ID), ctypes.c_uint64(address))
    return 0 if failed else found.value


def open_memory(handle: bytes) -> int:
    """
    Map another process's allocation and return its address here; to be closed as often as it was opened.

    :raises TransportUnavailable: when it cannot be mapped
    """
    with _opening:
        address, users = _OPENED.get(handle, (0, 0))
        if users == 0:
            mapped = ctypes.c_uint64()
            _check(
                _cuda().cuIpcOpenMemHandle_v2(
                    ctypes.byref(mapped), _Handle.from_buffer_copy(handle), ctypes.c_uint(_LAZY_PEER_ACCESS)
                ),
                "cuIpcOpenMemHandle",
            )
            address = mapped.value

        _OPENED[handle] = (address, users + 1)
        return address


def close_memory(handle: bytes) -> None:
    """Give back what :func:`open_memory` mapped. No work that reads it may be under way."""
    with _opening:
        address, users = _OPENED[handle]
        if users > 1:
            _OPENED[handle] = (address, users - 1)
            return

        del _OPENED[handle]
        _check(_cuda().cuIpcCloseMemHandle(ctypes.c_uint64(address)), "cuIpcCloseMemHandle")


def read_async(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy from device memory at ``source`` to page-locked host memory at ``target`` on ``stream``."""
    _check(
        _cuda().cuMemcpyDtoHAsync_v2(
            ctypes.c_void_p(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        ),
        "cuMemcpyDtoHAsync",
    )


def write_word(address: int, value: int, stream: int) -> None:
    """
    Queue the write of a signed 64-bit word to device memory on ``stream``, whose earlier writes all GPUs see before it.

    No kernel: it waits for no multiprocessor, and there is nothing to load the first time.
    """
    _check(
        _cuda().cuStreamWriteValue64_v2(
            ctypes.c_void_p(stream), ctypes.c_uint64(address), ctypes.c_uint64(value), ctypes.c_uint(0)
        ),
        "cuStreamWriteValue64",
    )


def clear_words(address: int, count: int, stream: int) -> None:
    """Queue on ``stream`` that so many 64-bit words of device memory are made 0."""
    _check(
        _cuda().cuMemsetD32Async(
            ctypes.c_uint64(address), ctypes.c_uint(0), ctypes.c_size_t(2 * count), ctypes.c_void_p(stream)
        ),
        "cuMemsetD32Async",
    )


class CopyBatch:
    """
    Contiguous copies for the device's copy engines, started by one call.

    :param copies: address to write, address to read and bytes of each
    """

    def __init__(self, copies: Sequence[tuple[int, int, int]]) -> None:
        count = len(copies)
        self.nbytes = sum(nbytes for _, _, nbytes in copies)
        self._count = count
        self._targets = (ctypes.c_uint64 * count)(*(target for target, _, _ in copies))
        self._sources = (ctypes.c_uint64 * count)(*(source for _, source, _ in copies))
        self._sizes = (ctypes.c_size_t * count)(*(nbytes for _, _, nbytes in copies))
        self._attributes = _CopyAttributes(_STREAM_ORDER, _Location(0, 0), _Location(0, 0), 0)
        self._first = (ctypes.c_size_t * 1)(0)

    def start(self, stream: int) -> None:
        """Queue the copies on ``stream`` (a raw handle, not the default stream), in any order among themselves."""
        batch = getattr(_cuda(), "cuMemcpyBatchAsync_v2", None)
        if batch is not None and self._count > 1:
            result = batch(
                self._targets,
                self._sources,
                self._sizes,
                ctypes.c_size_t(self._count),
                ctypes.byref(self._attributes),
                self._first,
                ctypes.c_size_t(1),
                ctypes.c_void_p(stream),
            )
            _check(result, "cuMemcpyBatchAsync")
            return

        for target, source, nbytes in zip(self._targets, self._sources, self._sizes, strict=True):
            _check(
                _cuda().cuMemcpyDtoDAsync_v2(
                    ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
                ),
                "cuMemcpyDtoDAsync",
            )


def _range_of(address: int) -> tuple[int, int]:
    """Return where an allocation starts, and its bytes."""
    first, size = ctypes.c_uint64(), ctypes.c_size_t()
    _check(
        _cuda().cuMemGetAddressRange_v2(ctypes.byref(first), ctypes.byref(size), ctypes.c_uint64(address)),
        "cuMemGetAddressRange",
    )
    return first.value, size.value


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """Retain a device's primary context, for good: torch never lets go of it either."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_cuda().cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)), "cuDeviceGet")
    _check(_cuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


@functools.cache
def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
    # Harmless when torch has done it already; what fails here fails in the first call that matters.
    library.cuInit(ctypes.c_uint(0))
    return library


def _check(result: int, call: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _cuda().cuGetErrorName(ctypes.c_int(result), ctypes.byref(name))
        raise TransportUnavailable(f"{call} failed with {(name.value or b'an unknown error').decode()} ({result})")
