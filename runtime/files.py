"""Files that somebody else has written: read only if they are files, as JSON only if it has one meaning."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wavecast.runtime.errors import CheckpointError

__all__ = ("map_file", "open_file", "parse_json", "read_json")


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[BinaryIO]:
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


def map_file(file: Path) -> mmap.mmap:
    """Map a file. A private, writable mapping, since torch warns of buffers it could not write to."""
    with open_file(file) as stream:
        try:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{file}: cannot be mapped: {exc}") from exc


def read_json(file: Path) -> dict[str, object]:
    """Return the JSON object in ``file``."""
    with open_file(file) as stream:
        return parse_json(file, stream.read())


def parse_json(file: Path, text: bytes) -> dict[str, object]:
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
