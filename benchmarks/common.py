"""What every benchmark writes down beside its figures."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ("environment", "named_option", "quantile")

_PACKAGES = ("wavecast", "torch", "ray", "anyio")


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
    except json.JSONDecodeError:
        return name, value


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
