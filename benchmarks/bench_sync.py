"""
Whole syncs through real Ray actors, beside the ceiling of the wire measured in the same run.

    python benchmarks/bench_sync.py --suite two --baselines --json sync.json     # 2 GPUs; "one", "four", "cpu" as well
    python benchmarks/bench_sync.py --case across-7b --case colocated-7b --json sync.json
    python benchmarks/bench_sync.py --preset qwen2.5-7b --src tp=1 --dst tp=1 --replicas 1 --transport nccl --json

Results are written after each case: one that fails or hangs costs the others nothing. `sync_chart.py` draws them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence

import anyio
import torch
from ceilings import CeilingBook, Row
from common import count, environment, named_option, results_file, seconds, write_results
from sync_baselines import BASELINES, run_baselines
from sync_cases import CASES, SUITES, Case, ad_hoc, find_cases
from sync_measure import case_facts, run_case
from sync_table import as_lines, one_line
from sync_traffic import plan_case

from wavecast.runtime.cluster import cluster
from wavecast.runtime.errors import ConfigError, WavecastError
from wavecast.runtime.model import DEFAULT_PRESET

_STDOUT = "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; print a table, or one JSON object. Return 0 when all that ran was right, 1 or 2 when not."""
    args = _parse(argv)
    if args.list:
        print("\n".join(f"{case.name:<28} {case.suite:<5} {case.title}" for case in CASES))
        return 0

    gpus = torch.cuda.device_count()
    try:
        cases = [case.with_options(dict(args.set)) for case in _cases(args, gpus)]
        for case in cases:
            case.sync_options()  # refuses before anything is started

        runs = any(case.reason_to_skip(gpus) is None for case in cases)
        with cluster(None) if runs else contextlib.nullcontext():
            report = anyio.run(_run, args, cases, gpus, backend="asyncio")
    except WavecastError as error:
        print(f"bench_sync: {error}", file=sys.stderr)
        return 2

    print(json.dumps(report) if args.json == _STDOUT else "\n".join(as_lines(report)))
    return 1 if any(row["status"] == "failed" for row in report["cases"]) else 0


async def _run(args: argparse.Namespace, cases: Sequence[Case], gpus: int) -> dict[str, list[Row]]:
    on_cpu = all(case.on_cpu for case in cases)
    book = CeilingBook(device="cpu" if on_cpu else "cuda", seconds=args.ceiling_seconds)
    report: dict[str, object] = {
        **environment(),
        "config": {key: value for key, value in vars(args).items() if key != "json"},
        "ceilings": book.rows,
        "cases": [],
        "baselines": [],
    }
    keep = _keeper(report, args.json)
    beside: set[tuple[object, ...]] = set()
    for case in cases:
        reason = case.reason_to_skip(gpus)
        if reason is not None:
            row: Row = {**case_facts(case), "status": "skipped", "reason": reason}
        else:
            row = await run_case(case, book, repeat=args.repeat, seconds=args.case_seconds)

        _listed(report, "cases").append(row)
        keep(one_line(row))
        # Cases that differ in the group's options alone have the same bytes to move: once is enough.
        moved = (case.preset, case.layers, case.dtype, case.src, case.dst, case.trainers, case.engines)
        if args.baselines and reason is None and moved not in beside:
            beside.add(moved)
            for found in run_baselines(case, args.baseline or tuple(BASELINES), seconds=args.baseline_seconds):
                _listed(report, "baselines").append({**found, **_beside(found, row)})
                keep(one_line(found))

    return report  # type: ignore[return-value]


def _beside(baseline: Row, case: Row) -> Row:
    """Return a baseline's share of the ceiling of the case it was run beside."""
    ceiling, nbytes = case.get("ceiling_gigabytes_per_second"), baseline.get("port_bytes")
    spread = baseline.get("seconds")
    if not (isinstance(ceiling, float) and isinstance(nbytes, int) and isinstance(spread, dict)):
        return {"share_of_ceiling": None}

    return {"share_of_ceiling": nbytes / spread["p50"] / 1e9 / ceiling}


def _listed(report: dict[str, object], name: str) -> list[Row]:
    rows = report[name]
    return rows if isinstance(rows, list) else []


def _keeper(report: dict[str, object], where: str | None) -> Callable[[str], None]:
    """Return what writes all that is known so far, and says a line of what came last."""

    def keep(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        if where is not None and where != _STDOUT:
            write_results(where, report)

    return keep


def _cases(args: argparse.Namespace, gpus: int) -> tuple[Case, ...]:
    if args.suite is not None or args.case:
        cases = find_cases(suite=args.suite, names=args.case)
        if len({case.on_cpu for case in cases}) != 1:
            raise ConfigError("cases on CPUs and on GPUs do not go into one run, and a run needs at least one")

        return cases

    options = (
        ("chunk_bytes", args.chunk_bytes),
        ("checksum", not args.no_checksum),
        ("in_flight", args.in_flight),
    )
    case = ad_hoc(
        preset=args.preset,
        layers=args.layers,
        src=args.src,
        dst=args.dst,
        replicas=args.replicas,
        dtype=args.dtype,
        transport=args.transport,
        budget_bytes=args.budget_bytes,
        gpus=gpus,
        options=options,
    )
    plan_case(case)  # refuses a model, a side or a dtype that cannot be; the others' are known to be sound
    return (case,)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, help="all cases for so many GPUs, or the small ones on CPUs")
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="only these; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument(
        "--set",
        action="append",
        type=named_option,
        default=[],
        metavar="NAME=VALUE",
        help="an option, in JSON",
    )
    parser.add_argument("--repeat", type=count, default=10, help="warm syncs; one more comes before them")
    parser.add_argument("--baselines", action="store_true", help="run other ways over the same bytes beside each case")
    parser.add_argument("--baseline", action="append", choices=tuple(BASELINES), help="only these; may be repeated")
    parser.add_argument("--case-seconds", type=seconds, default=240.0, help="for all syncs of a case")
    parser.add_argument("--ceiling-seconds", type=seconds, default=90.0, help="for the ceilings of a pattern")
    parser.add_argument("--baseline-seconds", type=seconds, default=120.0, help="for the baselines of a case")
    parser.add_argument(
        "--json", nargs="?", type=_results, const=_STDOUT, metavar="FILE", help="write the results; - is stdout"
    )

    own = parser.add_argument_group("a case of your own, where neither --suite nor --case is given")
    own.add_argument("--preset", default=DEFAULT_PRESET)
    own.add_argument("--layers", type=int)
    own.add_argument("--src", default="tp=1", help="a mesh, or fsdp2=N, flat=N, vllm=N")
    own.add_argument("--dst", default="tp=1")
    own.add_argument("--replicas", type=int, default=1)
    own.add_argument("--dtype", default="bfloat16")
    own.add_argument("--transport", default="auto", choices=("auto", "nccl", "ipc", "gloo"))
    own.add_argument("--budget-bytes", type=int, default=1 << 30)
    own.add_argument("--chunk-bytes", type=int)
    own.add_argument("--in-flight", type=int)
    own.add_argument("--no-checksum", action="store_true")
    return parser.parse_args(argv)


def _results(text: str) -> str:
    return text if text == _STDOUT else results_file(text)


if __name__ == "__main__":
    sys.exit(main())
