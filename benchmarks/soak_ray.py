"""
The soak on real Ray actors: processes, gloo over sockets, Ray's own objects. Does anything grow, in any of them?

    python benchmarks/soak_ray.py --syncs 2000             # a table
    python benchmarks/soak_ray.py --syncs 2000 --json

Two trainers and two replicas of two engines; every third sync is struck by a random fault of the matrix that needs no
deadline to end, and every hundred syncs one of them kills a process, which is replaced. A new group every hundred,
staged in place and in shadow by turns; every other one gives its communicators back after each sync.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import anyio
import ray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment
from benchmarks.soak_actor import Footprint, SoakActor
from tests.faults.cells import CELLS, Cell
from tests.faults.injection import Fault
from tests.faults.ray_cells import cancelling, counting_steps, failing, mend
from tests.integration.conftest import Pool, Sides, sides_of, start_ray
from wavecast.runtime import ParameterSyncGroup, SyncOptions

__all__ = ("Soak", "main", "soak")

_QUICK = ("hook", "shape", "dtype", "memory", "bit", "cancel")
_GROUP = 100
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Reading:
    """
    What is held while no group is open.

    :ivar actors: the most of each that any actor holds that has lived from the start
    :ivar groups_open: the fewest process groups that one of those held while a group was open that keeps them
    :ivar objects: that Ray counts references to, in the driver
    :ivar shared_memory_files: of the machine
    """

    driver: Footprint
    actors: Footprint
    groups_open: int
    objects: int
    shared_memory_files: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Soak:
    """
    What was run and what it left.

    :ivar syncs: calls of ``sync()``, those that were struck included
    :ivar errors: what the struck ones ended in, and how often
    :ivar wrong: struck syncs that did not end as the matrix says, and syncs after them that left an element wrong
    :ivar readings: by the number of syncs, each after a group was closed
    """

    syncs: int
    errors: dict[str, int]
    wrong: int
    seconds: float
    readings: dict[int, Reading]


async def soak(syncs: int, *, seed: int) -> Soak:
    """Sync ``syncs`` times, in groups of a hundred. Ray must be running."""
    chosen, pool = random.Random(seed), Pool()
    sides = sides_of(pool, "tp=2", "tp=2", replicas=2, layers=1, kind=SoakActor)
    layouts = {actor: await actor.held_layout.remote() for actor in _actors(sides)}
    steadfast = [sides.sources[0], sides.replicas[0][0], *sides.replicas[1]]
    errors: Counter[str] = Counter()
    start, wrong, done = time.monotonic(), 0, 0
    readings: dict[int, Reading] = {}
    groups_open = 0
    while done < syncs:
        number = done // _GROUP
        options = SyncOptions(
            transport="gloo",
            chunk_bytes=1 << 20,
            in_flight=1,
            lookahead=0,
            staging="shadow" if number % 2 else "in_place",
            release_communicators=number % 4 < 2,
        )
        async with ParameterSyncGroup(*sides.groups(), options) as group:
            with counting_steps(sides.sources[1]) as steps:
                await group.sync(deadline=_SECONDS)

            count = min(_GROUP, syncs - done)
            struck = {index: _choose(chosen, options, index + 3 >= count) for index in range(2, count, 3)}
            for index in range(count):
                sides.fill(done)
                cell = struck.get(index)
                if cell is None:
                    await group.sync(deadline=_SECONDS)
                    wrong += index - 1 in struck and bool(sides.differing(done))
                else:
                    error = await _strike(group, sides, cell, len(steps), layouts, pool)
                    errors[error] += 1
                    wrong += error != cell.error

                done += 1

            if not options.release_communicators:
                # By now the communicators may have been lost with the last fault.
                await group.sync(deadline=_SECONDS)
                groups_open = min([await actor.groups_seen.remote() for actor in steadfast])

        del group
        readings[done] = await _read(steadfast, groups_open)

    return Soak(done, dict(sorted(errors.items())), wrong, time.monotonic() - start, readings)


def _actors(sides: Sides) -> Sequence[object]:
    return [*sides.sources, *sides.destinations]


def _choose(chosen: random.Random, options: SyncOptions, last: bool) -> Cell:
    """Return a cell that this group can be struck by; the last of a group kills."""
    kinds = ("kill",) if last else _QUICK
    cells = [
        cell
        for cell in CELLS
        if cell.error
        and cell.fault in kinds
        and cell.staging == options.staging
        and not (cell.fault == "hook" and cell.phase.endswith("wave"))
        and (cell.phase != "connect" or options.release_communicators)
    ]
    return chosen.choice(cells)


async def _strike(
    group: ParameterSyncGroup,
    sides: Sides,
    cell: Cell,
    steps: int,
    layouts: dict[object, object],
    pool: Pool,
) -> str:
    """Let a sync fail as ``cell`` says, mend what the fault broke, and return the error's class."""
    trainer = cell.side == "trainer"
    struck = sides.sources[1] if trainer else sides.replicas[0][1]
    layout = layouts[struck]
    if cell.fault != "cancel":
        await struck.arm.remote(Fault(cell.fault, cell.phase), trainer)

    scope = anyio.CancelScope()
    with cancelling(scope, struck, cell, steps):
        error, _, _ = await failing(group, scope, cell, None)

    await mend(group, sides, struck, 0, layout, cell, pool, SoakActor)
    fresh = sides.sources[1] if trainer else sides.replicas[0][1]
    layouts[fresh] = layout
    return error


async def _read(steadfast: Sequence[object], groups_open: int) -> Reading:
    found = [await actor.footprint.remote() for actor in steadfast]
    actors = Footprint(
        *(max(getattr(each, field.name) for each in found) for field in fields(Footprint)),
    )
    driver = Footprint.now()
    counted = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    return Reading(driver, actors, groups_open, len(counted), len(os.listdir("/dev/shm")), len(asyncio.all_tasks()))


def _table(readings: Mapping[int, Reading]) -> str:
    rows = ["  syncs | driver MB    heap  files threads | actor MB    heap  files threads groups  open | objects  shm"]
    for done, each in readings.items():
        driver, actors = each.driver, each.actors
        rows.append(
            f"{done:>7} | {driver.private_bytes / 1e6:9.1f} {driver.heap_bytes / 1e6:7.1f} "
            f"{driver.open_files:>6} {driver.threads:>7} | "
            f"{actors.private_bytes / 1e6:8.1f} {actors.heap_bytes / 1e6:7.1f} {actors.open_files:>6} "
            f"{actors.threads:>7} {actors.process_groups:>6} {each.groups_open:>5} | "
            f"{each.objects:>7} {each.shared_memory_files:>4}"
        )

    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--syncs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.syncs < 1:
        parser.error(f"--syncs is {options.syncs}: it must be 1 or more")

    logging.disable(logging.CRITICAL)
    # Ray tells of the dead on standard output.
    with contextlib.redirect_stdout(sys.stderr):
        start_ray()
        try:
            found = asyncio.run(soak(options.syncs, seed=options.seed))
        finally:
            ray.shutdown()

    if options.json:
        print(json.dumps({**environment(), "config": vars(options), **asdict(found)}, indent=1))
    else:
        print(f"{found.syncs} syncs in {found.seconds:.1f} s, {found.wrong} wrong; errors: {found.errors}")
        print(_table(found.readings))

    return 1 if found.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
