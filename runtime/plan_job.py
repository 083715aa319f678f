"""``wavecast plan``: the plan and the schedule alone. Imports neither ray nor torch."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Literal

from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.model import Sides, as_table, describe_sides
from wavecast.runtime.plan.digest import plan_digest
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.timetable import make_timetable
from wavecast.scheduler import FanOut, Schedule, explain

__all__ = ("PlanOutcome", "make_plan", "plan_as_json", "plan_as_table", "gigabytes")


@dataclass(frozen=True, slots=True)
class PlanOutcome:
    """
    A plan and what it took.

    :ivar seconds: by part: ``describe``, ``reshard``, ``schedule``
    """

    sides: Sides
    plan: ReshardPlan
    schedule: Schedule
    digest: str
    seconds: dict[str, float]


def make_plan(
    config: ModelConfig,
    *,
    src: str,
    dst: str,
    replicas: int,
    dtype: str,
    strategy: str,
    ports: Literal["half", "full"],
    chunk_bytes: int | None,
    fan_out: FanOut = "auto",
) -> PlanOutcome:
    """
    Plan a sync of ``config`` without any actor.

    :raises ConfigError: for an impossible mesh or an unknown strategy
    """
    start = time.perf_counter()
    sides = describe_sides(config, src=src, dst=dst, replicas=replicas, dtype=dtype)
    described = time.perf_counter()
    plan = plan_reshard(sides.sources, sides.destinations)
    resharded = time.perf_counter()
    schedule = make_timetable(plan, chunk_bytes=chunk_bytes, strategy=strategy, ports=ports, fan_out=fan_out)
    scheduled = time.perf_counter()
    seconds = {
        "describe": described - start,
        "reshard": resharded - described,
        "schedule": scheduled - resharded,
    }
    return PlanOutcome(sides, plan, schedule, plan_digest(plan, schedule), seconds)


def plan_as_json(outcome: PlanOutcome, *, with_waves: bool = False) -> dict[str, object]:
    """Return the figures of a plan as JSON values; ``with_waves`` adds what each wave is under ``explain``."""
    plan, schedule = outcome.plan, outcome.schedule
    return {
        "actors": plan.actors,
        "pieces": plan.pieces,
        "routes": len(plan.routes),
        "tasks": sum(len(wave.tasks) for wave in schedule.waves),
        "nbytes": plan.nbytes,
        "waves": len(schedule.waves),
        "bound_waves": schedule.bound.waves,
        "makespan_bytes": schedule.makespan_bytes,
        "bound_bytes": schedule.bound.nbytes,
        "gap": schedule.gap,
        "strategy": schedule.strategy,
        "ports": str(schedule.ports),
        "digest": outcome.digest,
        "seconds": outcome.seconds,
        **({"explain": asdict(explain(schedule))} if with_waves else {}),
    }


def plan_as_table(outcome: PlanOutcome, title: str) -> str:
    """Return the figures of a plan for a person."""
    plan, schedule = outcome.plan, outcome.schedule
    tasks = sum(len(wave.tasks) for wave in schedule.waves)
    return as_table(
        title,
        {
            "actors": f"{plan.sources} trainers, {plan.destinations} engine ranks",
            "pieces": f"{plan.pieces:,}",
            "bytes delivered": gigabytes(plan.nbytes),
            "routes": f"{len(plan.routes):,}",
            "tasks": f"{tasks:,}",
            "waves": f"{len(schedule.waves):,} (at least {schedule.bound.waves:,})",
            "makespan": f"{gigabytes(schedule.makespan_bytes)} (at least {gigabytes(schedule.bound.nbytes)})",
            "gap": f"{schedule.gap:.3f}",
            "strategy": f"{schedule.strategy}, {schedule.ports} duplex",
            "seconds": ", ".join(f"{name} {value:.3f}" for name, value in outcome.seconds.items()),
            "digest": outcome.digest[:16],
        },
    )


def gigabytes(nbytes: int) -> str:
    """Return ``nbytes`` for a person, in units of 1000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"

    return f"{nbytes} B"
