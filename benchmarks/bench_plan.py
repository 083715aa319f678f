"""
How long planning takes, phase by phase, and how it grows.

    python benchmarks/bench_plan.py            # a table
    python benchmarks/bench_plan.py --json     # one JSON object
    python benchmarks/bench_plan.py qwen3-235b --repeat 5

Each case runs in a process of its own, on one core, so that its peak memory is its own. Layouts come from published
model configurations; nothing is allocated for the weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.tasks import group_routes
from wavecast.runtime.plan.timetable import make_timetable
from wavecast.runtime.presets import preset
from wavecast.runtime.transfer.program import compile_programs, pack_programs

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Case:
    """
    A model, how each side holds it, and what planning may take at most.

    :ivar limit_seconds: from layouts to schedule
    :ivar limit_nbytes: of memory, at the peak
    :ivar limit_program_nbytes: of the largest program, as it is sent to its actor
    """

    preset: str
    src: str
    dst: str
    replicas: int
    layers: int | None = None
    limit_seconds: float | None = None
    limit_nbytes: int | None = None
    limit_program_nbytes: int | None = None


_MEGATRON = "tp=4,pp=4,dp=4,ep=8,etp=2"

CASES = {
    "qwen2.5-7b": Case("qwen2.5-7b", "tp=2,pp=2,dp=2", "tp=4", 3),
    "qwen3-30b": Case("qwen3-30b-a3b", "tp=4,pp=2,ep=4", "tp=8", 2),
    "growth-24": Case("qwen3-235b-a22b", _MEGATRON, "tp=8", 8, layers=24),
    "growth-48": Case("qwen3-235b-a22b", _MEGATRON, "tp=8", 8, layers=48),
    "growth-92": Case("qwen3-235b-a22b", _MEGATRON, "tp=8", 8, layers=92),
    "qwen3-235b": Case("qwen3-235b-a22b", _MEGATRON, "tp=8", 8, limit_seconds=3.0, limit_program_nbytes=5 << 20),
    "kimi-k2": Case("kimi-k2", "tp=8,pp=8,dp=4,ep=32,etp=1", "tp=16", 8, limit_seconds=10.0, limit_nbytes=2 << 30),
    "kimi-k2-ep": Case(
        "kimi-k2", "tp=8,pp=8,dp=4,ep=32,etp=1", "tp=8,dp=16,ep=128,etp=1", 1, limit_seconds=10.0, limit_nbytes=2 << 30
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure planning.")
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=3, help="runs of a case; the fastest by total is reported")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--here", action="store_true", help="run the one case in this process")
    options = parser.parse_args(argv)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")

    if options.repeat < 1:
        parser.error(f"--repeat is {options.repeat}: it must be 1 or more")

    if options.here:
        print(json.dumps(measure(CASES[options.cases[0]])))
        return 0

    results = {name: best_of(name, repeat=options.repeat) for name in options.cases}
    report = {"environment": environment(), "repeat": options.repeat, "cases": results}
    print(json.dumps(report, indent=2) if options.json else table(report["environment"], results))
    return 0 if all(result["within_limits"] for result in results.values()) else 1


def measure(case: Case) -> dict[str, object]:
    """Plan ``case`` once, from configuration to schedule."""
    config = preset(case.preset)
    if case.layers is not None:
        config = config.with_layers(case.layers)

    seconds: dict[str, float] = {}
    src, dst = _timed(
        seconds,
        "describe",
        lambda: (layouts(config, MeshSpec.parse(case.src)), layouts(config, MeshSpec.parse(case.dst))),
    )
    described_nbytes = peak_nbytes()
    plan = _timed(seconds, "reshard", lambda: plan_reshard(src, dst * case.replicas))
    schedule = _timed(seconds, "schedule", lambda: make_timetable(plan))
    planning = seconds["reshard"] + seconds["schedule"]
    peak = peak_nbytes()
    packed = _timed(
        seconds,
        "programs",
        lambda: pack_programs(
            compile_programs(schedule, actors=plan.actors, digest=plan.digest, bucket_bytes=1 << 29, checksum=True)
        ),
    )
    program_nbytes = max(sum(len(step) for step in program.steps) for program in packed)
    sent = plan.sent_nbytes()
    return {
        **asdict(case),
        "actors": plan.actors,
        "pieces": plan.pieces,
        "routes": len(plan.routes),
        "groups": len(group_routes(plan.routes)),
        "tasks": sum(len(wave.tasks) for wave in schedule.waves),
        "waves": len(schedule.waves),
        "gap": round(schedule.gap, 4),
        "nbytes": plan.nbytes,
        "sent_max_over_mean": round(max(sent) * len(sent) / max(1, sum(sent)), 4),
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        "planning_seconds": round(planning, 4),
        "planning_microseconds_a_route": round(planning * 1e6 / len(plan.routes), 3),
        "described_nbytes": described_nbytes,
        "peak_nbytes": peak,
        "program_nbytes": program_nbytes,
        "peak_nbytes_with_programs": peak_nbytes(),
        "within_limits": (
            planning <= (case.limit_seconds or planning)
            and peak <= (case.limit_nbytes or peak)
            and program_nbytes <= (case.limit_program_nbytes or program_nbytes)
        ),
        "digest": plan.digest,
    }


def best_of(name: str, *, repeat: int) -> dict[str, object]:
    """Run a case ``repeat`` times in fresh processes and return the one that planned fastest."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here", name]
    results = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(repeat)
    ]
    best: dict[str, object] = min(results, key=lambda result: float(str(result["planning_seconds"])))
    return best


def peak_nbytes() -> int:
    """Return the most memory this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment() -> dict[str, object]:
    """Return what a figure means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    model = platform.processor()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)

    try:
        version = importlib.metadata.version("wavecast")
    except importlib.metadata.PackageNotFoundError:
        version = "source tree"

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "wavecast": version,
    }


def table(environment: dict[str, object], results: dict[str, dict[str, object]]) -> str:
    """Return the results for a person."""
    titles = (
        "case",
        "actors",
        "pieces",
        "routes",
        "tasks",
        "waves",
        "describe",
        "reshard",
        "schedule",
        "programs",
        "us/route",
    )
    rows: list[tuple[str, ...]] = [(*titles, "peak MiB", "program KiB", "max/mean", "gap", "limits")]
    for name, result in results.items():
        seconds = result["seconds"]
        assert isinstance(seconds, dict)
        rows.append(
            (
                name,
                *(f"{result[key]:,}" for key in ("actors", "pieces", "routes", "tasks", "waves")),
                *(f"{seconds[phase]:.3f}" for phase in ("describe", "reshard", "schedule", "programs")),
                f"{result['planning_microseconds_a_route']:.2f}",
                f"{int(str(result['peak_nbytes'])) >> 20}",
                f"{int(str(result['program_nbytes'])) >> 10}",
                f"{result['sent_max_over_mean']:.3f}",
                f"{result['gap']:.3f}",
                "ok" if result["within_limits"] else "OVER",
            )
        )

    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head = ", ".join(f"{key} {value}" for key, value in environment.items())
    return "\n".join([head, *("  ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)) for row in rows)])


def _timed(seconds: dict[str, float], phase: str, work: Callable[[], _T]) -> _T:
    start = time.perf_counter()
    result = work()
    seconds[phase] = time.perf_counter() - start
    return result


if __name__ == "__main__":
    sys.exit(main())
