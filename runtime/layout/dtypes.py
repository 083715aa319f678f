"""Element sizes by dtype name, so that planning needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from wavecast.runtime.errors import ConfigError

__all__ = ("ITEMSIZE", "itemsize")

#: Bytes of one element, by the name torch gives the dtype.
ITEMSIZE: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "uint16": 2,
        "int16": 2,
        "uint32": 4,
        "int32": 4,
        "uint64": 8,
        "int64": 8,
        "float8_e4m3fn": 1,
        "float8_e4m3fnuz": 1,
        "float8_e5m2": 1,
        "float8_e5m2fnuz": 1,
        "float8_e8m0fnu": 1,
        "float16": 2,
        "bfloat16": 2,
        "float32": 4,
        "float64": 8,
        "complex64": 8,
        "complex128": 16,
    }
)


def itemsize(name: str) -> int:
    """
    Return the bytes of one element of the dtype that torch calls ``name``.

    :raises ConfigError: for a name that is not in :data:`ITEMSIZE`
    """
    try:
        return ITEMSIZE[name]
    except KeyError:
        raise ConfigError(f"unknown dtype {name!r}; known: {', '.join(ITEMSIZE)}") from None
