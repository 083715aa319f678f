"""
Whole syncs through real Ray actors, beside the ceiling of the wire measured in the same run.

    python benchmarks/bench_sync.py --json
    python benchmarks/bench_sync.py --preset qwen2.5-7b --src tp=1 --dst tp=1 --replicas 1 --transport nccl --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from ceilings import ipc_pair, raw_pair
from common import environment, quantile

from wavecast.runtime.errors import WavecastError
from wavecast.runtime.model import DEFAULT_PRESET, resolve_model
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.sync_job import SyncJob, run, sync_as_json

_CEILING_LIMIT = 8 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; print a table, or one JSON object."""
    args = _parse(argv)
    options = SyncOptions(
        transport=args.transport,
        budget_bytes=args.budget_bytes,
        chunk_bytes=args.chunk_bytes,
        checksum=not args.no_checksum,
        in_flight=args.in_flight,
    )
    job = SyncJob(
        config=resolve_model(preset_name=args.preset, checkpoint=None, layers=args.layers),
        checkpoint=None,
        src=args.src,
        dst=args.dst,
        replicas=args.replicas,
        dtype=args.dtype,
        seed=0,
        repeat=args.repeat + 1,
        device="auto",
        address=None,
        options=options,
    )
    try:
        outcome = run(job)
    except WavecastError as error:
        print(f"bench_sync: {error}", file=sys.stderr)
        return 2

    result = _result(
        args,
        sync_as_json(outcome),
        [report.seconds.transfer for report in outcome.reports[1:]],
        [report.seconds.total for report in outcome.reports[1:]],
        outcome.reports[0].bound_bytes,
    )
    print(json.dumps(result) if args.json else _table(result))
    return 0 if outcome.verified else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--src", default="tp=1")
    parser.add_argument("--dst", default="tp=1")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--transport", default="auto", choices=("auto", "nccl", "ipc", "gloo"))
    parser.add_argument("--budget-bytes", type=int, default=1 << 30)
    parser.add_argument("--chunk-bytes", type=int)
    parser.add_argument("--in-flight", type=int, default=2)
    parser.add_argument("--no-checksum", action="store_true")
    parser.add_argument("--repeat", type=int, default=10, help="warm syncs; one more comes before them")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def _result(
    args: argparse.Namespace, sync: dict[str, object], transfer: list[float], total: list[float], port_bytes: int
) -> dict[str, object]:
    """Put the sync beside the time its busiest port needs for the same bytes in one message."""
    nbytes = min(port_bytes, _CEILING_LIMIT)
    gpus = torch.cuda.device_count()
    if sync["device"] == "cuda" and gpus > 1:
        ceilings = {"nccl": raw_pair(nbytes, backend="nccl"), "ipc": ipc_pair(nbytes)}
    else:
        ceilings = {"gloo": raw_pair(nbytes, backend="gloo")}

    best = max(figures["gigabytes_per_second"] for figures in ceilings.values())
    raw = next(iter(ceilings.values()))["gigabytes_per_second"]
    p50 = quantile(transfer, 0.5)
    return {
        **environment(),
        "config": {key: value for key, value in vars(args).items() if key != "json"},
        "ceilings": ceilings,
        "port_bytes": port_bytes,
        "transfer_seconds": {"p50": p50, "p95": quantile(transfer, 0.95)},
        "total_seconds": {"p50": quantile(total, 0.5), "p95": quantile(total, 0.95)},
        "port_gigabytes_per_second": port_bytes / p50 / 1e9,
        "share_of_raw": port_bytes / p50 / 1e9 / raw,
        "share_of_best_ceiling": port_bytes / p50 / 1e9 / best,
        "share_of_best_ceiling_whole_sync": port_bytes / quantile(total, 0.5) / 1e9 / best,
        "sync": sync,
    }


def _table(result: dict[str, object]) -> str:
    names = (
        "ceilings",
        "port_bytes",
        "transfer_seconds",
        "total_seconds",
        "share_of_raw",
        "share_of_best_ceiling",
        "share_of_best_ceiling_whole_sync",
    )
    return "\n".join(f"{name:<34} {result[name]}" for name in names)


if __name__ == "__main__":
    sys.exit(main())
