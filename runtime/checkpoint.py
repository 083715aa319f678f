"""A Hugging Face checkpoint directory, read slice by slice."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from wavecast.runtime.errors import CheckpointError, ConfigError
from wavecast.runtime.files import map_file, read_json
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.hf import LogicalTensor
from wavecast.runtime.safetensors import StoredTensor, read_header

if TYPE_CHECKING:
    import torch

__all__ = ("Checkpoint",)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


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
            config = ModelConfig.from_dict(read_json(config_file))
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
            mapped = self._maps[tensor.file] = map_file(tensor.file)

        count = tensor.stop - tensor.start
        import torch

        return torch.frombuffer(mapped, dtype=torch.uint8, offset=tensor.start, count=count).view(*tensor.shape, width)


def _stored(directory: Path) -> tuple[StoredTensor, ...]:
    """Return the tensors of a directory's weight files."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)

    index_file = directory / _INDEX
    if not index_file.exists():
        raise CheckpointError(f"checkpoint {str(directory)!r} has neither {_SINGLE} nor {_INDEX}")

    weight_map = read_json(index_file).get("weight_map")
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


def _slices(box: Box) -> list[slice]:
    return [slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True)]
