"""``wavecast sync``: the main job on this machine or a cluster, with every element compared."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import anyio
import torch
from tqdm import tqdm

from wavecast.runtime.cluster import ActorHandle, call_all, cluster, cluster_gpus, end_actors, start_actor
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.group import ParameterSyncGroup
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.model import Sides, as_table, describe_sides
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.plan_job import gigabytes
from wavecast.runtime.report import SyncReport
from wavecast.scheduler import TaskReceipt

__all__ = ("SyncJob", "SyncOutcome", "run", "run_sync_job", "sync_as_json", "sync_as_table")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncJob:
    """
    What to run.

    :ivar address: a running cluster's, or ``None`` to start one on this machine
    :ivar device: ``"auto"``, ``"cpu"`` or ``"cuda"``
    :ivar repeat: how many syncs, with new weights before each
    """

    config: ModelConfig
    checkpoint: str | None
    src: str
    dst: str
    replicas: int
    dtype: str
    seed: int
    repeat: int
    device: str
    address: str | None
    options: SyncOptions


@dataclass(frozen=True, slots=True)
class SyncOutcome:
    """
    What was seen.

    :ivar reports: one a sync
    :ivar differing: tensors with elements that differ after any of the syncs, and how many elements
    :ivar compare_seconds: to compare every element, summed over the syncs
    """

    sides: Sides
    reports: tuple[SyncReport, ...]
    versions: dict[int, object]
    differing: dict[str, int]
    compare_seconds: float

    @property
    def verified(self) -> bool:
        """Whether every element of every destination was right after every sync."""
        return not self.differing


async def run_sync_job(job: SyncJob) -> SyncOutcome:
    """
    Start actors, sync them ``job.repeat`` times, and compare every element after each.

    :raises WavecastError: when the job cannot be done; whatever was started is stopped
    """
    if job.repeat < 1:
        raise ConfigError(f"repeat is {job.repeat}, it must be at least 1")

    sides = describe_sides(job.config, src=job.src, dst=job.dst, replicas=job.replicas, dtype=job.dtype)
    with cluster(job.address), _actors(job, sides) as (trainers, engines):
        group = ParameterSyncGroup(ModelGroup("policy", [trainers]), ModelGroup("rollout", engines), job.options)
        async with group:
            return await _repeat(job, sides, group, trainers, [actor for replica in engines for actor in replica])


async def _repeat(
    job: SyncJob,
    sides: Sides,
    group: ParameterSyncGroup,
    trainers: Sequence[ActorHandle],
    engines: Sequence[ActorHandle],
) -> SyncOutcome:
    reports: list[SyncReport] = []
    differing: dict[str, int] = {}
    compare_seconds = 0.0
    await call_all(engines, "spoil")
    for step in range(job.repeat):
        await call_all(trainers, "fill", step)
        with _progress(f"sync {step + 1}/{job.repeat}") as tick:
            reports.append(await group.sync(step, progress=tick))

        start = time.perf_counter()
        for found in await call_all(engines, "differing", step):
            for name, count in cast("dict[str, int]", found).items():
                differing[name] = differing.get(name, 0) + count

        compare_seconds += time.perf_counter() - start

    return SyncOutcome(sides, tuple(reports), dict(group.versions()), differing, compare_seconds)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[TaskReceipt], None]]:
    """Show bytes delivered as tasks finish; silent where nobody looks."""
    with tqdm(desc=title, unit="B", unit_scale=True, unit_divisor=1000, leave=False, disable=None) as bar:

        def tick(receipt: TaskReceipt) -> None:
            bar.update(receipt.nbytes)

        yield tick


@contextlib.contextmanager
def _actors(job: SyncJob, sides: Sides) -> Iterator[tuple[list[ActorHandle], list[list[ActorHandle]]]]:
    """Start one actor a rank; kill them all when the block ends."""
    weights = Weights(job.seed, job.checkpoint)
    total = len(sides.sources) + len(sides.destinations)
    device = _choose_device(job.device)
    gpus = _gpu_share(total) if device == "cuda" else 0.0
    trainers = [start_actor(DemoActor, layout, weights, device, gpus=gpus) for layout in sides.sources]
    engines = [
        [start_actor(DemoActor, layout, weights, device, gpus=gpus) for layout in replica] for replica in sides.replicas
    ]
    try:
        yield trainers, engines
    finally:
        end_actors([*trainers, *(actor for replica in engines for actor in replica)])


def _choose_device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', this machine has none")

    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _gpu_share(actors: int) -> float:
    """Return the share of a GPU an actor takes: one each while they last, else an equal part that packs them all."""
    gpus = cluster_gpus()
    if gpus == 0:
        raise ConfigError("the cluster has no GPU to give to actors")

    return 1.0 if actors <= gpus else 1.0 / -(-actors // gpus)


def sync_as_json(outcome: SyncOutcome) -> dict[str, object]:
    """Return the figures of a job as JSON values."""
    first = outcome.reports[0]
    warm = outcome.reports[1:] or outcome.reports
    return {
        "actors": len(outcome.sides.sources) + len(outcome.sides.destinations),
        "pieces": sum(len(layout.pieces) for layout in (*outcome.sides.sources, *outcome.sides.destinations)),
        "routes": first.routes,
        "tasks": first.tasks,
        "nbytes": first.nbytes,
        "waves": first.waves,
        "bound_waves": first.bound_waves,
        "makespan_bytes": first.makespan_bytes,
        "bound_bytes": first.bound_bytes,
        "gap": first.gap,
        "strategy": first.strategy,
        "ports": str(first.ports),
        "digest": first.digest,
        "seconds": {
            "describe": first.seconds.describe,
            "reshard": first.reshard_seconds,
            "schedule": first.schedule_seconds,
            "connect": first.seconds.connect,
            "transfer": statistics.median(report.seconds.transfer for report in warm),
            "verify": statistics.median(report.seconds.verify for report in warm),
            "compare": outcome.compare_seconds,
        },
        "verified": outcome.verified,
        "differing": outcome.differing,
        "transport": first.transport,
        "device": first.device,
        "versions": [outcome.versions[index] for index in sorted(outcome.versions)],
        "repeats": [
            {
                "version": report.version,
                "seconds": asdict(report.seconds),
                "gigabytes_per_second": report.gigabytes_per_second,
            }
            for report in outcome.reports
        ],
        "host_seconds": [report.host_seconds for report in outcome.reports],
        "transport_reasons": list(first.transport_reasons),
        "pulled_nbytes": first.pulled_nbytes,
        "extra_bytes_peak": max(report.staging_bytes for report in outcome.reports),
        "communicator_bytes": max(report.communicator_bytes for report in outcome.reports),
    }


def sync_as_table(outcome: SyncOutcome, title: str) -> str:
    """Return the figures of a job for a person."""
    first, last = outcome.reports[0], outcome.reports[-1]
    seconds = (
        f"describe {first.seconds.describe:.3f}, plan {first.seconds.plan:.3f}, connect {first.seconds.connect:.3f}"
    )
    rows = {
        "actors": f"{len(outcome.sides.sources)} trainers, {len(outcome.sides.replicas)} replicas of "
        f"{len(outcome.sides.replicas[0])} engine ranks",
        "bytes delivered": f"{gigabytes(first.nbytes)} a sync, {first.tensors:,} tensors",
        "routes": f"{first.routes:,}",
        "tasks": f"{first.tasks:,}",
        "waves": f"{first.waves:,} (at least {first.bound_waves:,}), {first.strategy}, {first.ports} duplex",
        "makespan": f"{gigabytes(first.makespan_bytes)} (at least {gigabytes(first.bound_bytes)}), gap {first.gap:.3f}",
        "transport": f"{first.transport} on {first.device}",
        "first sync": f"{first.seconds.total:.3f} s: {seconds}",
    }
    for number, report in enumerate(outcome.reports, start=1):
        rows[f"sync {number}"] = (
            f"transfer {report.seconds.transfer:.3f} s, verify {report.seconds.verify:.3f} s, "
            f"total {report.seconds.total:.3f} s, {report.gigabytes_per_second:.2f} GB/s"
        )

    rows["extra memory"] = (
        f"{gigabytes(last.staging_bytes)} staging, {gigabytes(last.communicator_bytes)} communicators an actor at most"
    )
    rows["versions"] = ", ".join(str(outcome.versions[index]) for index in sorted(outcome.versions))
    rows["verified"] = "yes, every element bit for bit" if outcome.verified else f"NO: {outcome.differing}"
    return as_table(title, rows)


def run(job: SyncJob) -> SyncOutcome:
    """Run the job on an event loop of its own."""
    return anyio.run(run_sync_job, job, backend="asyncio")
