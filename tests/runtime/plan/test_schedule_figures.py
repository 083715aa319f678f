"""The published figures of schedules are those of the code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.parametrize(
    "name",
    ["7b tp2 to tp2", "7b tp3 to tp2", "7b tp4,pp2 to tp6", "70b tp8,pp4 to tp8 x4", "world 32: pp4 to pp1"],
)
def test_presets_make_as_many_tasks_and_waves_as_the_results_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from schedule_workloads import WORKLOADS  # type: ignore[import-not-found]

    from wavecast.scheduler import plan_waves

    (results,) = (BENCHMARKS / "results").glob("schedule_*.json")
    rows = json.loads(results.read_text(encoding="utf-8"))["workloads"]
    (row,) = (row for row in rows if (row["workload"], row["way"]) == (name, "auto"))
    (workload,) = (workload for workload in WORKLOADS if workload.name == name)
    tasks = workload.build()

    assert (len(tasks), len(plan_waves(tasks, ports=workload.ports).waves)) == (row["tasks"], row["waves"])
