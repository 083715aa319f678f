"""
The header of a safetensors file: which tensors it holds, and where their bytes are.

The format, as its README describes it, is small enough to read here: eight bytes with a header's length (unsigned,
little-endian), the header in JSON (each tensor's dtype, shape and byte range), then the tensors' bytes, row-major and
little-endian, without gaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from wavecast.runtime.errors import CheckpointError
from wavecast.runtime.files import open_file, parse_json
from wavecast.runtime.layout.dtypes import itemsize

__all__ = ("StoredTensor", "read_header")

#: No honest header is longer; a longer one would only fill the memory before it fails.
_HEADER_LIMIT_NBYTES = 100_000_000
_MOST_DIMS = 64

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
    }
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """
    Where a tensor's bytes are.

    :ivar name: the tensor's name
    :ivar file: the file that holds it
    :ivar dtype: its dtype, by torch's name
    :ivar shape: its shape
    :ivar start: where its bytes begin, from the start of the file
    :ivar stop: where they end
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """
    Read the header of a safetensors file, and hold it against the file's size.

    :return: the tensors, in the order of the header
    :raises CheckpointError: naming the file, the tensor if it is one tensor's fault, and both values that disagree
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file")

        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _HEADER_LIMIT_NBYTES):
            raise CheckpointError(f"{file}: a header of {length} bytes does not fit in a file of {size} bytes")

        text = stream.read(length)

    header = parse_json(file, text)
    header.pop("__metadata__", None)
    tensors = tuple(_entry(file, name, entry, base=8 + length) for name, entry in header.items())
    _check_ranges(file, tensors, start=8 + length, stop=size)
    return tensors


def _entry(file: Path, name: str, entry: object, *, base: int) -> StoredTensor:
    """Check one tensor's entry in the header by itself; its offsets count from ``base``."""
    where = f"{file}: tensor {name!r}"
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{where} is described by {entry!r}, not by an object")

    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")

    shape = _sizes(where, "shape", entry.get("shape"))
    offsets = _sizes(where, "data_offsets", entry.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets}, not a start and a stop")

    # Also of an empty tensor: its strides are numbers as large as these.
    if (math.prod(size for size in shape if size) * itemsize(_DTYPES[dtype])).bit_length() > 63:
        raise CheckpointError(f"{where} has shape {shape}, larger than any tensor")

    nbytes = math.prod(shape) * itemsize(_DTYPES[dtype])
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} of shape {shape} and dtype {dtype} takes {nbytes} bytes, "
            f"but data_offsets {offsets} give it {offsets[1] - offsets[0]}"
        )

    return StoredTensor(name, file, _DTYPES[dtype], shape, base + offsets[0], base + offsets[1])


def _sizes(where: str, key: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise CheckpointError(f"{where} has {key} {value!r}, not a list of sizes")

    bits = max((item.bit_length() for item in value), default=0)
    if bits > 63 or len(value) > _MOST_DIMS:
        numbers = f"{len(value)} numbers of up to {bits} bits"
        raise CheckpointError(f"{where} has a {key} of {numbers}, more than a tensor has")

    return tuple(value)


def _check_ranges(file: Path, tensors: tuple[StoredTensor, ...], *, start: int, stop: int) -> None:
    """Raise unless the tensors cover the bytes from ``start`` to ``stop`` of the file, each byte once."""
    at, last = start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.stop > stop:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} ends at byte {tensor.stop} of a file of {stop} bytes: it is truncated"
            )

        if tensor.start != at:
            what = "overlaps" if tensor.start < at else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} starts at byte {tensor.start} "
                f"and {what} {last}, which ends at byte {at}"
            )

        at, last = tensor.stop, repr(tensor.name)

    if at != stop:
        raise CheckpointError(f"{file}: the header describes {at} bytes of a file of {stop} bytes")
