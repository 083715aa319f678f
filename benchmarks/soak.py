"""
Sync after sync, every third with a random fault of the fault matrix: does anything grow?

    python benchmarks/soak.py --syncs 2000             # a table
    python benchmarks/soak.py --syncs 2000 --json

Whole groups in one process, actors as threads, so that all that leaks is seen here: memory, file descriptors,
threads, tasks of the event loop. Process groups and Ray's objects are in ``soak_ray.py``. Faults that only a deadline
ends, and those that change what an actor holds, are left out; killed actors are replaced by new ones.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faults.cells import CELLS, Cell
from tests.faults.injection import Fault
from tests.faults.local_cells import LocalSides, cancel_later_if_stopped, strike

__all__ = ("Footprint", "Soak", "main", "soak")

_QUICK = ("kill", "hook", "memory", "bit", "cancel")
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the process holds."""

    resident_bytes: int
    open_files: int
    threads: int
    tasks: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            open_files=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            tasks=len(asyncio.all_tasks()),
        )


@dataclass(frozen=True, slots=True)
class Soak:
    """
    What was run and what it left.

    :ivar syncs: calls of ``sync()``, those that were struck included
    :ivar errors: what the struck ones ended in, and how often
    :ivar wrong: syncs that did not end as the matrix says, or left an element that was not the trainers'
    :ivar warm: after a tenth of the syncs
    :ivar end: after all of them
    """

    syncs: int
    errors: dict[str, int]
    wrong: int
    seconds: float
    warm: Footprint
    end: Footprint


async def soak(syncs: int, *, seed: int) -> Soak:
    """Sync ``syncs`` times, shadow and in place in turn, a new group every hundred."""
    chosen = random.Random(seed)
    places = [cell for cell in CELLS if cell.error and cell.fault in _QUICK and not _computed(cell)]
    errors: Counter[str] = Counter()
    start, wrong, done, warm = time.monotonic(), 0, 0, Footprint.now()
    while done < syncs:
        staging = "shadow" if done // 100 % 2 else "in_place"
        cells = [cell for cell in places if cell.staging == staging]
        sides = LocalSides()
        async with sides.group(staging, reconnects=True) as group:
            value = 0.0
            for _ in range(min(100, syncs - done)):
                value += 1.0
                sides.fill(value)
                if done % 3 == 2:
                    cell = chosen.choice(cells)
                    struck = sides.struck(cell.side)
                    struck.injector.arm(Fault(cell.fault, cell.phase))
                    error, _, _ = await strike(group, struck, cell, None)
                    struck.injector.arm(None)
                    errors[error] += 1
                    wrong += error != cell.error
                    if cell.fault == "kill":
                        await group.replace(struck, sides.fresh(struck))
                        struck.bury()
                else:
                    await group.sync(deadline=_SECONDS)
                    wrong += any(sides.values(index) != {value} for index in range(2))

                done += 1
                if done == max(syncs // 10, 1):
                    warm = Footprint.now()

        del sides, group

    return Soak(done, dict(sorted(errors.items())), wrong, time.monotonic() - start, warm, Footprint.now())


def _computed(cell: Cell) -> bool:
    return cell.fault == "hook" and cell.phase.endswith("wave")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.syncs < 1:
        parser.error(f"--syncs is {options.syncs}: it must be 1 or more")

    logging.disable(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.cancel", cancel_later_if_stopped)
        found = asyncio.run(soak(options.syncs, seed=options.seed))

    if options.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        print(f"{found.syncs} syncs in {found.seconds:.1f} s, {found.wrong} wrong; errors: {found.errors}")
        for name, before in asdict(found.warm).items():
            print(f"{name:>20} {before:>14,} {asdict(found.end)[name]:>14,}")

    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
