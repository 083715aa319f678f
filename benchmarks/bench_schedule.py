"""
Wave schedules against their lower bounds, and against the ways of others.

    python benchmarks/bench_schedule.py                     # a table
    python benchmarks/bench_schedule.py --json              # one JSON object
    python benchmarks/bench_schedule.py --plot docs/images  # pictures too (needs the extra "plot")
    python benchmarks/bench_schedule.py --only workloads scale --docs docs/scheduling.md

Parts: ``workloads`` (named plans by every strategy), ``lookahead`` (what barriers cost), ``random`` (seeded plans that
may be cut, up to 1024 actors), ``relay`` (rounds to many receivers), ``scale`` (10^3 to 10^6 tasks). One core, no GPU.
Times to plan are processor time, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from common import environment
from schedule_plots import plot
from schedule_tables import around_tables, tables, write_docs
from schedule_workloads import BASELINES, FAMILIES, WORKLOADS, Workload, random_plan

from wavecast.scheduler import STRATEGIES, LinkCost, Schedule, Task, plan_divisible, plan_waves, simulate, verify
from wavecast.scheduler.bounds import divisible_nbytes
from wavecast.scheduler.fan_out import tree_hops
from wavecast.scheduler.ports import PortModel, build_graph
from wavecast.scheduler.relaxation import relax

COST = LinkCost()
PARTS = ("workloads", "lookahead", "random", "relay", "scale")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure wave schedules.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--plans", type=int, default=1000, help="random plans in all")
    parser.add_argument("--largest", type=int, default=1_000_000, help="tasks of the largest plan in the part scale")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw SVG pictures there")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the tables between the markers of FILE")
    parser.add_argument(
        "--from", type=Path, dest="earlier", metavar="FILE", help="take the figures of an earlier --json"
    )
    options = parser.parse_args(argv)
    refuse(parser, options)
    if options.earlier:
        try:
            report = json.loads(options.earlier.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--from: {options.earlier} holds no earlier figures: {error}")

        if not (isinstance(report, dict) and "environment" in report and any(part in report for part in PARTS)):
            parser.error(f"--from: {options.earlier} holds no earlier figures: no part of {', '.join(PARTS)}")
    else:
        report = {
            "environment": environment(),
            "link": {"alpha_seconds": COST.alpha_seconds, "nbytes_per_second": COST.nbytes_per_second},
        }
        parts: dict[str, Callable[[], object]] = {
            "workloads": measure_workloads,
            "lookahead": measure_lookahead,
            "random": lambda: measure_random(options.plans),
            "relay": measure_relay,
            "scale": lambda: measure_scale(options.largest),
        }
        report |= {part: parts[part]() for part in PARTS if part in options.only}

    if options.plot:
        try:
            drawn = plot(report, options.plot)
        except OSError as error:
            parser.error(f"--plot: cannot draw to {options.plot}: {error}")

        if not drawn:
            parser.error(f"--plot: there is no picture of {' or '.join(options.only)} alone")

    if options.docs:
        try:
            write_docs(report, options.docs)
        except (OSError, ValueError) as error:
            parser.error(f"--docs: cannot rewrite {options.docs}: {error}")

    print(json.dumps(report, indent=1) if options.json else tables(report))
    return 0


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End in one line, before anything is measured, for what cannot be."""
    if options.plans < len(FAMILIES):
        parser.error(f"--plans is {options.plans}: it must be {len(FAMILIES)} or more, one a family")

    if options.largest < 1000:
        parser.error(f"--largest is {options.largest}: it must be 1000 tasks or more")

    if options.docs and not options.docs.is_file():
        parser.error(f"--docs: there is no file {options.docs}")

    if options.docs:
        try:
            around_tables(options.docs)
        except (OSError, ValueError) as error:
            parser.error(f"--docs: cannot rewrite {options.docs}: {error}")

    if options.plot:
        try:
            options.plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--plot: cannot draw to {options.plot}: {error}")


def measure_workloads() -> list[dict[str, object]]:
    """Schedule every workload in every way."""
    rows: list[dict[str, object]] = []
    for workload in WORKLOADS:
        tasks = workload.build()
        bound = plan_waves(tasks, strategy="first_fit", ports=workload.ports).bound
        for name in STRATEGIES:
            start = time.process_time()
            schedule = plan_waves(tasks, strategy=name, ports=workload.ports)
            seconds = time.process_time() - start
            verify(schedule, tasks)
            rows.append(figures(workload, name, schedule, seconds, bound.nbytes) | {"bound_waves": bound.waves})

        for name, baseline in BASELINES.items():
            if name in ("cut", "halving") and any(task.after for task in tasks):
                continue

            start = time.process_time()
            schedule = baseline(workload, tasks)
            seconds = time.process_time() - start
            verify(schedule, schedule.tasks)
            rows.append(figures(workload, name, schedule, seconds, bound.nbytes) | {"bound_waves": bound.waves})

    return rows


def figures(workload: Workload, way: str, schedule: Schedule, seconds: float, bound_nbytes: int) -> dict[str, object]:
    """Return what is written down of one schedule. Baselines wait at barriers; ours are replayed with and without."""
    barrier = simulate(schedule, COST, barrier=True).seconds
    ahead = simulate(schedule, COST).seconds
    return {
        "workload": workload.name,
        "ports": workload.ports,
        "way": way,
        "strategy": schedule.strategy,
        "tasks": len(schedule.tasks),
        "waves": len(schedule.waves),
        "gap": round(schedule.makespan_bytes / bound_nbytes, 4),
        "barrier_seconds": round(barrier, 6),
        "lookahead_seconds": round(ahead, 6),
        "plan_seconds": round(seconds, 4),
    }


def measure_lookahead() -> list[dict[str, object]]:
    """Replay plans of uneven tasks with barriers and without, under costs that are not quite what was planned for."""
    rows: list[dict[str, object]] = []
    for jitter in (0.0, 0.2, 0.5):
        for workload in WORKLOADS:
            tasks = workload.build()
            schedule = plan_waves(tasks, ports=workload.ports)
            plain = plan_waves(tasks, strategy="first_fit", ports=workload.ports)
            rng = random.Random(7)
            slower = {task.id: 1 + jitter * rng.expovariate(1.0) for task in tasks}

            def cost(task: Task, slower: dict[int, float] = slower) -> float:
                return COST(task) * slower[task.id]

            barrier = simulate(schedule, cost, barrier=True).seconds
            rows.append(
                {
                    "workload": workload.name,
                    "jitter": jitter,
                    "barrier_seconds": round(barrier, 6),
                    "lookahead_seconds": round(simulate(schedule, cost).seconds, 6),
                    "first_fit_barrier_seconds": round(simulate(plain, cost, barrier=True).seconds, 6),
                    "first_fit_lookahead_seconds": round(simulate(plain, cost).seconds, 6),
                    "one_wave_ahead_seconds": round(simulate(schedule, cost, lookahead=1).seconds, 6),
                }
            )

    return rows


def measure_random(plans: int) -> list[dict[str, object]]:
    """Cut and schedule seeded random plans; a row a family."""
    rows: list[dict[str, object]] = []
    for family, ports in FAMILIES.items():
        found: list[dict[str, float]] = []
        for seed in range(plans // len(FAMILIES)):
            tasks = random_plan(seed, family)
            start = time.process_time()
            division = plan_divisible(tasks, ports=ports)
            seconds = time.process_time() - start
            schedule = division.schedule
            verify(schedule, schedule.tasks)
            found.append(
                {
                    "seed": seed,
                    "actors": len({actor for task in tasks for actor in task.members}),
                    "tasks": len(tasks),
                    "pieces": len(division.cuts),
                    "waves": len(schedule.waves),
                    "waves_over_bound": len(schedule.waves) / schedule.bound.waves,
                    "gap": schedule.gap,
                    "over_possible": schedule.makespan_bytes / possible(tasks, ports, schedule),
                    "uncut_gap": plan_waves(tasks, ports=ports).gap,
                    "seconds": seconds,
                }
            )

        worst = max(found, key=lambda row: row["gap"])
        gaps = sorted(row["gap"] for row in found)
        rows.append(
            {
                "family": family,
                "plans": len(found),
                "most_actors": max(row["actors"] for row in found),
                "worst_gap": round(worst["gap"], 4),
                "worst_seed": worst["seed"],
                "worst_over_possible": round(max(row["over_possible"] for row in found), 4),
                "median_gap": round(gaps[len(gaps) // 2], 4),
                "share_within_5_percent": round(sum(gap <= 1.05 for gap in gaps) / len(gaps), 4),
                "share_within_5_percent_of_possible": round(
                    sum(row["over_possible"] <= 1.05 for row in found) / len(found), 4
                ),
                "worst_uncut_gap": round(max(row["uncut_gap"] for row in found), 4),
                "worst_waves_over_bound": round(max(row["waves_over_bound"] for row in found), 4),
                "pieces_per_task": round(sum(row["pieces"] for row in found) / sum(row["tasks"] for row in found), 3),
                "most_seconds": round(max(row["seconds"] for row in found), 3),
            }
        )

    return rows


def possible(tasks: Sequence[Task], ports: PortModel, schedule: Schedule) -> int:
    """Return what no cutting goes below; worked out in full only where the busiest port does not say enough."""
    graph = build_graph(tasks, ports)
    simple = divisible_nbytes(graph)
    return simple if schedule.makespan_bytes <= 1.05 * simple else max(simple, relax(graph).bound)


def measure_relay() -> dict[str, object]:
    """Count the rounds in which k chunks reach r receivers, for every k up to 64 and every r up to 128; keep some."""
    rows: list[dict[str, object]] = []
    more: Counter[int] = Counter()
    for receivers in range(1, 129):
        for chunks in range(1, 65):
            hops = tree_hops(receivers, chunks)
            bound = chunks - 1 + receivers.bit_length()
            more[hops[-1].round + 1 - bound] += 1
            if receivers in (1, 3, 7, 8, 15, 31, 32, 63, 64, 100, 128) and chunks in (1, 4, 16, 64):
                rows.append(
                    {
                        "receivers": receivers,
                        "chunks": chunks,
                        "rounds": hops[-1].round + 1,
                        "bound": bound,
                        "sends_one_by_one": receivers * chunks,
                    }
                )

    return {"rows": rows, "pairs": more.total(), "pairs_by_rounds_over_bound": dict(sorted(more.items()))}


def measure_scale(largest: int) -> list[dict[str, object]]:
    """Plan ever more tasks on 1024 actors."""
    rows: list[dict[str, object]] = []
    count = 1000
    while count <= largest:
        rng = random.Random(count)
        kinds = {
            "pairs of one size": [_pair(id, rng, 64 << 20) for id in range(count)],
            "pairs of any size": [_pair(id, rng, rng.randrange(1 << 20, 1 << 26)) for id in range(count)],
            "broadcasts to 4": [
                Task(id, (rng.randrange(512),), tuple(512 + a for a in rng.sample(range(512), 4)), 64 << 20)
                for id in range(count)
            ],
            "mixed, of 2 to 4 members, any size": [_mixed(id, rng) for id in range(count)],
        }
        kinds |= {
            "hub, all through one actor, any size": [
                Task(id, (0,), (1 + id % 1023,), rng.randrange(1, 1 << 28)) for id in range(count)
            ],
            "pairs in half duplex, each after an earlier one": [_linked(id, rng) for id in range(count)],
            "broadcasts among 48 in 40 levels": [_leveled(id, count // 40, rng) for id in range(count)],
        }
        for kind, tasks in kinds.items():
            for strategy in ("first_fit", "largest_first", "edge_coloring", "auto"):
                start = time.process_time()
                schedule = plan_waves(tasks, strategy=strategy)
                seconds = time.process_time() - start
                peak = peak_nbytes(tasks, strategy) if strategy == "auto" else None
                rows.append(
                    {
                        "tasks": count,
                        "kind": kind,
                        "strategy": strategy,
                        "seconds": round(seconds, 4),
                        "microseconds_a_task": round(seconds / count * 1e6, 3),
                        "waves": len(schedule.waves),
                        "bound_waves": schedule.bound.waves,
                        "peak_nbytes": peak,
                        "peak_nbytes_a_task": peak and round(peak / count, 1),
                    }
                )

        count *= 10

    return rows


def peak_nbytes(tasks: Sequence[Task], strategy: str) -> int:
    """Return the most memory that planning holds at a time beyond the tasks themselves, its result included."""
    tracemalloc.start()
    try:
        plan_waves(tasks, strategy=strategy)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _mixed(id: int, rng: random.Random) -> Task:
    sender, *receivers = rng.sample(range(1024), rng.randint(2, 4))
    return Task(id, (sender,), tuple(receivers), rng.randrange(1, 1 << 28))


def _linked(id: int, rng: random.Random) -> Task:
    sender, receiver = rng.sample(range(1024), 2)
    return Task(id, (sender,), (receiver,), 1 << 20, (id - 1000,) if id >= 1000 else ())


def _leveled(id: int, level: int, rng: random.Random) -> Task:
    receivers = rng.sample(range(24, 48), rng.randint(2, 6))
    return Task(id, (rng.randrange(24),), tuple(receivers), 1 << 20, (id - level,) if id >= level else ())


def _pair(id: int, rng: random.Random, nbytes: int) -> Task:
    return Task(id, (rng.randrange(512),), (512 + rng.randrange(512),), nbytes)


if __name__ == "__main__":
    raise SystemExit(main())
