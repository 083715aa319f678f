"""The soak, for a moment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.faults.local_cells import cancel_later_if_stopped


def benchmark() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.anyio
async def test_a_hundred_syncs_with_faults_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cancel", cancel_later_if_stopped)
    before = len(os.listdir("/proc/self/task"))
    found = await benchmark().soak(100, seed=1)
    assert (found.syncs, found.wrong) == (100, 0)
    assert sum(found.errors.values()) == 33
    assert found.end.open_files <= found.warm.open_files
    # The groups are closed: what their actors had running is gone but for threads that are on their way out.
    assert found.end.threads <= before + 2
