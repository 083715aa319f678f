"""A sync's report, put together from what the run knows."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from wavecast.runtime.preparation import Preparation
from wavecast.runtime.report import HookSeconds, PhaseSeconds, SyncReport
from wavecast.runtime.stopwatch import Stopwatch
from wavecast.runtime.transfer.messages import Finished
from wavecast.scheduler import RunReport

__all__ = ("make_report",)


def make_report(
    preparation: Preparation,
    outcome: RunReport,
    finished: Collection[Finished],
    watch: Stopwatch,
    *,
    version: int,
    dry_run: bool,
    planned: bool,
    connected: bool,
    communicator_bytes: int,
    device: str,
    staging: Literal["in_place", "shadow"],
    shadow_bytes: int,
    pause_seconds: float,
    hooks: HookSeconds,
) -> SyncReport:
    """
    Put the report together.

    :param finished: what each actor said at the end of its steps
    :param device: of the destinations' shards
    """
    plan, schedule, seconds = preparation.plan, preparation.schedule, watch.seconds
    return SyncReport(
        version=version,
        dry_run=dry_run,
        nbytes=plan.nbytes,
        tensors=preparation.tensors,
        partial=bool(preparation.left_out),
        left_out=preparation.left_out,
        routes=len(plan.routes),
        tasks=sum(len(wave.tasks) for wave in schedule.waves),
        waves=len(schedule.waves),
        bound_waves=schedule.bound.waves,
        makespan_bytes=schedule.makespan_bytes,
        bound_bytes=schedule.bound.nbytes,
        gap=schedule.gap,
        strategy=schedule.strategy,
        ports=schedule.ports,
        transport=_describe_transport(preparation),
        pulled_nbytes=preparation.pulled_nbytes,
        transport_reasons=preparation.carriers.reasons,
        device="cpu" if device == "cpu" else "cuda",
        staging_bytes=max((reply.staging_bytes for reply in finished), default=0),
        communicator_bytes=communicator_bytes,
        host_seconds=max((reply.host_seconds for reply in finished), default=0.0),
        connected=connected,
        planned=planned,
        seconds=PhaseSeconds(
            describe=seconds("describe"),
            plan=seconds("plan"),
            connect=seconds("connect"),
            transfer=seconds("transfer"),
            verify=seconds("verify"),
            commit=seconds("commit"),
            total=watch.total,
        ),
        reshard_seconds=preparation.reshard_seconds,
        schedule_seconds=preparation.schedule_seconds,
        run=outcome,
        digest=preparation.digest,
        staging=staging,
        shadow_bytes=shadow_bytes,
        pause_seconds=pause_seconds,
        hooks=hooks,
    )


def _describe_transport(preparation: Preparation) -> str:
    """Return the ways that this plan's tasks really take."""
    ways = ["ipc"] if preparation.pulls else []
    if preparation.groups or preparation.edges:
        ways += [way for way in [preparation.carriers.moved] if way not in ways]

    return "+".join(ways) or preparation.carriers.moved
