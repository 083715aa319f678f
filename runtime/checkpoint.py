"""
A Hugging Face checkpoint directory, read slice by slice.

The safetensors format, as its README describes it, is small enough to read here: eight bytes with a header's length
(unsigned, little-endian), the header in JSON (each tensor's dtype, shape and byte range), then the tensors' bytes,
row-major and little-endian, without gaps.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, BinaryIO

from wavecast.runtime.errors import CheckpointError, ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.hf import LogicalTensor

if TYPE_CHECKING:
    import torch

__all__ = ("Checkpoint", "StoredTensor", "read_header")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

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


class Checkpoint:
    """
    Tensors of a checkpoint directory, none of them in memory.

    Files are mapped when first read, so that a slice costs the pages it lies on. They must not be truncated meanwhile:
    the operating system answers that with a signal, not an error. Leaving the context, or :meth:`close`, unmaps them.

    :ivar directory: the directory
    :ivar config: its ``config.json``
    """

    def __init__(self, directory: Path, config: ModelConfig, tensors: Iterable[StoredTensor]) -> None:
        self.directory = directory
        self.config = config
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Checkpoint:
        """
        Read the headers of ``directory``: its ``config.json``, and ``model.safetensors`` or the files that
        ``model.safetensors.index.json`` names.

        :raises CheckpointError: when a file is missing, unreadable, truncated or at odds with itself
        :raises ConfigError: when ``config.json`` describes a model that is not known
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"checkpoint directory {str(path)!r} does not exist")

        config_file = path / "config.json"
        try:
            config = ModelConfig.from_dict(_read_json(config_file))
        except ConfigError as exc:
            raise ConfigError(f"{config_file}: {exc}") from exc

        return cls(path, config, _stored(path))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        files = len({tensor.file for tensor in self._tensors.values()})
        return f"<Checkpoint {str(self.directory)!r} [{len(self._tensors)} tensors in {files} files]>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of the index or of the single file's header."""
        return tuple(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """
        Return the shape of a tensor.

        :raises CheckpointError: when there is no such tensor
        """
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """
        Return the dtype of a tensor, by torch's name.

        :raises CheckpointError: when there is no such tensor
        """
        return self._find(name).dtype

    def check(self, tensors: Iterable[LogicalTensor]) -> None:
        """
        Make sure that ``tensors`` are here, in their shapes.

        :raises CheckpointError: naming the first that is missing, or whose shape is another
        """
        for tensor in tensors:
            stored = self._find(tensor.name)
            if stored.shape != tensor.shape:
                raise CheckpointError(
                    f"{stored.file}: tensor {tensor.name!r} has shape {stored.shape}, "
                    f"where config.json asks for {tensor.shape}"
                )

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """
        Return a slice of a tensor in fresh, contiguous memory, bit for bit.

        :param box: the elements wanted; the whole tensor by default
        :raises CheckpointError: when there is no such tensor, or ``box`` is not within it
        """
        tensor = self._find(name)
        whole = Box((0,) * len(tensor.shape), tensor.shape)
        wanted = whole if box is None else box
        inside = len(wanted.offset) == len(wanted.extent) == len(tensor.shape) and min(wanted.extent, default=0) >= 0
        if not (inside and whole.contains(wanted)):
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} of shape {tensor.shape} has no elements "
                f"at offset {wanted.offset} with extent {wanted.extent}"
            )

        import torch  # headers are read without it: a plan needs no more

        # As bytes, in a dim of their own: the file need not align an element, and a NaN keeps its bits.
        width = itemsize(tensor.dtype)
        fresh = torch.empty((*wanted.extent, width), dtype=torch.uint8)
        if fresh.numel():
            fresh.copy_(self._bytes(tensor, width)[tuple(_slices(wanted))])

        dtype: torch.dtype = getattr(torch, tensor.dtype)
        return fresh.view(dtype).squeeze(-1)

    def close(self) -> None:
        """Unmap the files; a later read maps them again."""
        maps, self._maps = self._maps, {}
        for mapped in maps.values():
            mapped.close()

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"checkpoint {str(self.directory)!r} has no tensor {name!r}") from None

    def _bytes(self, tensor: StoredTensor, width: int) -> torch.Tensor:
        """Return the tensor's bytes as they lie in the file, shape ``(*shape, width)``."""
        mapped = self._maps.get(tensor.file)
        if mapped is None:
            mapped = self._maps[tensor.file] = _map(tensor.file)

        count = tensor.stop - tensor.start
        import torch

        return torch.frombuffer(mapped, dtype=torch.uint8, offset=tensor.start, count=count).view(*tensor.shape, width)


def read_header(file: Path) -> tuple[StoredTensor, ...]:
    """
    Read the header of a safetensors file, and hold it against the file's size.

    :return: the tensors, in the order of the header
    :raises CheckpointError: naming the file, the tensor if it is one tensor's fault, and both values that disagree
    """
    with _opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{file}: {size} bytes are too few for a safetensors file")

        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, _HEADER_LIMIT_NBYTES):
            raise CheckpointError(f"{file}: a header of {length} bytes does not fit in a file of {size} bytes")

        text = stream.read(length)

    header = _parse_json(file, text)
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


def _stored(directory: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a directory's weight files."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)

    index_file = directory / _INDEX
    if not index_file.exists():
        raise CheckpointError(f"checkpoint {str(directory)!r} has neither {_SINGLE} nor {_INDEX}")

    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index_file}: weight_map is {weight_map!r}, not an object")

    headers: dict[str, dict[str, StoredTensor]] = {}
    tensors: list[StoredTensor] = []
    for name, file_name in weight_map.items():
        # A bare name: an index must not lead out of its directory.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_file}: tensor {name!r} is said to be in {file_name!r}, not the name of a file"
            )

        if file_name not in headers:
            headers[file_name] = {tensor.name: tensor for tensor in read_header(directory / file_name)}

        if name not in headers[file_name]:
            raise CheckpointError(f"{index_file}: tensor {name!r} is said to be in {file_name!r}, which lacks it")

        tensors.append(headers[file_name][name])

    return tuple(tensors)


def _read_json(file: Path) -> dict[str, object]:
    with _opened(file) as stream:
        return _parse_json(file, stream.read())


def _parse_json(file: Path, text: bytes) -> dict[str, object]:
    """Return the JSON object in ``text``; a key given twice is an error, since either could be meant."""
    try:
        value: object = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{file}: not valid JSON: {exc}") from exc

    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, not an object")

    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} is given twice")

        found[key] = value

    return found


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """
    Open a file to read, if it is one: a pipe would never come to its end.

    :raises CheckpointError: when it is none, has an impossible name, or cannot be read
    """
    try:
        # Not blocking: to open a pipe waits for somebody to write to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise CheckpointError(f"{str(file)!r} is no name of a file: {exc}") from exc

    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file}: not a regular file")

    try:
        with open(descriptor, "rb") as stream:
            yield stream
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc


def _map(file: Path) -> mmap.mmap:
    """Map a file. A private, writable mapping, since torch warns of buffers it could not write to."""
    with _opened(file) as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{file}: cannot be mapped: {exc}") from exc


def _slices(box: Box) -> list[slice]:
    return [slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True)]
