"""
What driving a schedule costs, on real Ray actors that do nothing.

    python benchmarks/bench_executor.py                 # a table
    python benchmarks/bench_executor.py --json --actors 8 32 64

Ways to drive the same waves of pairs, two actor calls a task:

- ``run``: ``wavecast.scheduler.run`` with lookahead; ``run, 4 in flight``: with up to four tasks at an actor;
  ``run, barriers``: with ``lookahead=0``
- ``gather``: one bare ``asyncio.gather`` of all calls of a wave, wave after wave
- ``gather all``: one bare ``asyncio.gather`` of all calls at once, in no order: the floor
- ``threads``: a thread pool a wave, one blocking ``ray.get`` a task, as ChatLearn does

The part ``skewed`` runs tasks that sleep, a few of them long, with barriers and without, beside their simulation.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from common import environment

from wavecast.scheduler import Schedule, Task, plan_waves, run, simulate


@ray.remote(num_cpus=0)
class Actor:
    """Does nothing, or sleeps."""

    def nothing(self) -> None:
        return None

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """One drive of a schedule."""

    seconds: float
    cpu_seconds: float
    threads: int
    longest_stall_seconds: float


Drive = Callable[[Schedule, Sequence["ray.actor.ActorHandle"]], Awaitable[None]]


def calls(actors: Sequence[ray.actor.ActorHandle], task: Task) -> list[ray.ObjectRef]:
    """Start a task on all its members."""
    return [actors[member].nothing.remote() for member in task.members]


async def all_of(refs: Sequence[ray.ObjectRef]) -> None:
    await asyncio.gather(*refs)


def drive_run(*, lookahead: int | None = None, in_flight: int = 1) -> Drive:
    async def drive(schedule: Schedule, actors: Sequence[ray.actor.ActorHandle]) -> None:
        await run(schedule, lambda task: all_of(calls(actors, task)), lookahead=lookahead, in_flight=in_flight)

    return drive


async def drive_gather(schedule: Schedule, actors: Sequence[ray.actor.ActorHandle]) -> None:
    for wave in schedule.waves:
        await asyncio.gather(*(ref for task in wave.tasks for ref in calls(actors, task)))


async def drive_gather_all(schedule: Schedule, actors: Sequence[ray.actor.ActorHandle]) -> None:
    await asyncio.gather(*(ref for task in schedule.tasks for ref in calls(actors, task)))


async def drive_threads(schedule: Schedule, actors: Sequence[ray.actor.ActorHandle]) -> None:
    # Blocks the event loop, as it does there: the pool's results are waited for in the driver's own thread.
    for wave in schedule.waves:
        with ThreadPoolExecutor(max_workers=len(wave.tasks)) as pool:
            for future in [pool.submit(lambda task=task: ray.get(calls(actors, task))) for task in wave.tasks]:
                future.result()


WAYS: dict[str, Drive] = {
    "run": drive_run(),
    "run, 4 in flight": drive_run(in_flight=4),
    "run, barriers": drive_run(lookahead=0),
    "gather": drive_gather,
    "gather all": drive_gather_all,
    "threads": drive_threads,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the cost of driving a schedule.")
    parser.add_argument("--actors", type=int, nargs="*", default=[8, 32, 64], help="none: the part skewed alone")
    parser.add_argument("--waves", type=int, default=20, help="waves of pairs that take in all actors")
    parser.add_argument("--repeat", type=int, default=7, help="drives of each way; medians are reported")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    for name, value, least in (
        *(("actors", count, 2) for count in options.actors),
        ("waves", options.waves, 1),
        ("repeat", options.repeat, 1),
    ):
        if value < least:
            parser.error(f"--{name} is {value}: it must be {least} or more")

    # Ray writes warnings to standard output, which is kept for the figures.
    with contextlib.redirect_stdout(sys.stderr):
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            rows = [
                row for count in options.actors for row in measure(count, waves=options.waves, repeat=options.repeat)
            ]
            skewed = measure_skewed(repeat=9)
        finally:
            ray.shutdown()

    report = {"environment": environment() | {"load": os.getloadavg()}, "driving": rows, "skewed": skewed}
    print(json.dumps(report, indent=1) if options.json else table(report))
    return 0


def pairs(actors: int, waves: int) -> Schedule:
    """Return waves in which every actor has a partner, another one each time."""
    half = actors // 2
    tasks = [
        Task(wave * half + index, (index,), (half + (index + wave) % half,), 1)
        for wave in range(waves)
        for index in range(half)
    ]
    return plan_waves(tasks, strategy="edge_coloring")


def measure(count: int, *, waves: int, repeat: int) -> list[dict[str, object]]:
    """Drive the same schedule in every way, turn by turn."""
    actors = [Actor.remote() for _ in range(count)]
    ray.get([actor.nothing.remote() for actor in actors])
    schedule = pairs(count, waves)
    found: dict[str, list[Measured]] = {name: [] for name in WAYS}
    for _ in range(repeat + 1):
        for name, drive in WAYS.items():
            found[name].append(asyncio.run(measured(drive(schedule, actors))))

    for actor in actors:
        ray.kill(actor)

    base = statistics.median(drive.seconds for drive in found["gather"][1:])
    rows: list[dict[str, object]] = []
    for name, drives in found.items():
        kept = drives[1:]  # the first one warms up
        seconds = statistics.median(drive.seconds for drive in kept)
        rows.append(
            {
                "actors": count,
                "way": name,
                "tasks": len(schedule.tasks),
                "waves": len(schedule.waves),
                "milliseconds": round(seconds * 1e3, 3),
                "milliseconds_a_wave": round(seconds / len(schedule.waves) * 1e3, 3),
                "spread_milliseconds": [round(pick(drive.seconds for drive in kept) * 1e3, 1) for pick in (min, max)],
                "over_gather": round(seconds / base, 3),
                "cpu_milliseconds": round(statistics.median(drive.cpu_seconds for drive in kept) * 1e3, 3),
                "threads_more": max(drive.threads for drive in kept),
                "longest_stall_milliseconds": round(max(drive.longest_stall_seconds for drive in kept) * 1e3, 3),
            }
        )

    return rows


async def measured(drive: Awaitable[None]) -> Measured:
    """Await ``drive`` beside a coroutine that wants to run every millisecond, and one that counts threads."""
    longest = 0.0
    threads = 0
    before = threading.active_count()
    over = threading.Event()

    async def tick() -> None:
        nonlocal longest
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - asked - 0.001)

    def count() -> None:
        nonlocal threads
        while not over.wait(0.0005):
            threads = max(threads, threading.active_count() - before - 1)

    counter = threading.Thread(target=count)
    counter.start()
    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    longest = 0.0
    cpu = time.process_time()
    start = time.perf_counter()
    await drive
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    await asyncio.sleep(0.002)
    ticker.cancel()
    over.set()
    counter.join()
    return Measured(seconds, cpu, threads, longest)


def measure_skewed(*, repeat: int) -> list[dict[str, object]]:
    """Run tasks that sleep, most of them shortly, some of them long: free ones, and such that come after others."""
    half = 4
    rng = random.Random(5)
    tasks = [
        Task(id, (rng.randrange(half),), (half + rng.randrange(half),), rng.choice((2, 2, 2, 4, 8, 40)))
        for id in range(60)
    ]
    rng = random.Random(5)
    chained = [
        Task(
            id,
            (rng.randrange(half),),
            (half + rng.randrange(half),),
            rng.choice((2, 2, 2, 4, 8, 40)),
            after=(rng.randrange(max(0, id - 16), id),) if id and rng.random() < 0.7 else (),
        )
        for id in range(60)
    ]
    actors = [Actor.remote() for _ in range(2 * half)]
    ray.get([actor.nothing.remote() for actor in actors])

    async def sleep(task: Task) -> None:
        await asyncio.gather(*(actors[member].sleep.remote(task.nbytes / 1e3) for member in task.members))

    rows: list[dict[str, object]] = []
    for kind, strategy in (("free", "first_fit"), ("free", "auto"), ("chained", "first_fit"), ("chained", "auto")):
        schedule = plan_waves(chained if kind == "chained" else tasks, strategy=strategy)
        # Turn by turn, so that what else the machine does falls on both.
        drives = [
            [asyncio.run(run(schedule, sleep, lookahead=lookahead)).seconds for lookahead in (0, None)]
            for _ in range(repeat)
        ]
        barrier, ahead = ([drive[index] for drive in drives] for index in (0, 1))
        simulated = {
            barrier: simulate(schedule, lambda task: task.nbytes / 1e3, barrier=barrier).seconds
            for barrier in (True, False)
        }
        rows.append(
            {
                "tasks": kind,
                "strategy": strategy,
                "waves": len(schedule.waves),
                "barrier_milliseconds": round(statistics.median(barrier) * 1e3, 1),
                "lookahead_milliseconds": round(statistics.median(ahead) * 1e3, 1),
                "saved": round(1 - statistics.median(ahead) / statistics.median(barrier), 3),
                "barrier_spread_milliseconds": [round(min(barrier) * 1e3, 1), round(max(barrier) * 1e3, 1)],
                "lookahead_spread_milliseconds": [round(min(ahead) * 1e3, 1), round(max(ahead) * 1e3, 1)],
                "simulated_barrier_milliseconds": round(simulated[True] * 1e3, 1),
                "simulated_lookahead_milliseconds": round(simulated[False] * 1e3, 1),
                "simulated_saved": round(1 - simulated[False] / simulated[True], 3),
            }
        )

    for actor in actors:
        ray.kill(actor)

    return rows


def table(report: dict[str, list[dict[str, object]]]) -> str:
    """Return both parts as Markdown."""
    parts: list[str] = []
    for name in ("driving", "skewed"):
        rows = report[name]
        if not rows:
            continue

        lines = [list(rows[0])] + [["---"] * len(rows[0])] + [[str(value) for value in row.values()] for row in rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    return "\n\n".join(parts)


if __name__ == "__main__":
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    raise SystemExit(main())
