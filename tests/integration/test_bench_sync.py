"""The sync benchmark as a user starts it: one small case on real actors, its ceiling, and all baselines beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "bench_sync.py")]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=280, check=False, env=environment, cwd=ROOT
    )


def test_a_case_its_ceiling_and_all_baselines_come_out_right(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run("--suite", "cpu", "--case", "cpu-across-7b-layouts", "--repeat", "2", "--baselines", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    (row,) = report["cases"]
    assert (row["status"], row["verified"], row["differing"]) == ("ok", True, {})
    assert (row["transport"], row["device"], row["warm"]["count"]) == ("gloo", "cpu", 2)
    assert (row["nbytes"], row["port_bytes"], row["local_bytes"]) == (24_783_616, 24_783_616, 0)
    assert row["warm"]["wall"]["p50"] >= row["warm"]["transfer"]["min"] > 0
    assert [found["pattern"] for found in report["ceilings"]] == ["sendrecv 0>1"]
    assert row["share_of_ceiling"] == pytest.approx(
        row["port_gigabytes_per_second"] / report["ceilings"][0]["gigabytes_per_second"]
    )
    assert [found["name"] for found in report["baselines"]] == [
        "seed",
        "packed_broadcast",
        "per_tensor",
        "object_store",
    ]
    assert [found.get("verified") for found in report["baselines"]] == [True] * 4, report["baselines"]
    assert all(found["share_of_ceiling"] > 0 for found in report["baselines"])


def test_a_case_that_cannot_run_here_is_skipped_and_nothing_fails(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    done = run("--case", "a-tp2-to-tp2", "--json", str(path))
    if json.loads(path.read_text(encoding="utf-8"))["hardware"]["gpus"][3:]:
        pytest.skip("this machine has the GPUs for it")

    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert row["status"] == "skipped"
    assert row["reason"].startswith("needs 4 GPUs")
