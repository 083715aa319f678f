"""What every benchmark writes down beside its figures, and how it reads its options."""

from __future__ import annotations

import argparse
import datetime
import errno
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ("count", "environment", "named_option", "quantile", "results_file", "seconds", "write_results")

_PACKAGES = ("wavecast", "torch", "ray", "anyio")
#: About a year: what is much longer no transport can be told.
_MOST_SECONDS = 3e7


def environment() -> dict[str, object]:
    """Return hardware, versions and date as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        },
    }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(-(-int(share * 100) * len(ordered) // 100) - 1, 0)]


def named_option(text: str) -> tuple[str, object]:
    """Read ``in_flight=3`` or ``transport=nccl``: what is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")

    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        # Not JSONDecodeError alone: of digits without end int() says ValueError.
        return name, value


def count(text: str) -> int:
    """Read how many times something is done: once at least."""
    try:
        value = int(text)
    except ValueError:
        value = 0

    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")

    return value


def seconds(text: str) -> float:
    """Read a limit of time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0

    if not 0 < value <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds, {_MOST_SECONDS:.0f} at most")

    return value


def results_file(text: str) -> str:
    """Read where results go: refused before anything is measured when they cannot be written there."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = _beside(path)
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from None

    return text


def write_results(where: str, report: object) -> None:
    """Put a report into a file at once: whoever ends this run, or reads meanwhile, finds a whole one."""
    path = Path(where)
    text = json.dumps(report, indent=1) + "\n"
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _is_special(path: Path) -> bool:
    """Tell whether ``path`` is a pipe or a device, which is written to and never replaced."""
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()

    return platform.processor()
