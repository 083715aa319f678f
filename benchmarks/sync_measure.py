"""Run one case of the sync benchmark on real Ray actors, and put its figures beside the ceiling of its pattern."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import cast

import anyio
from ceilings import CeilingBook, Row, best_rate, local_rate
from common import quantile
from sync_cases import Case, engine_memories, trainer_memories
from sync_traffic import Traffic, plan_case, traffic_of

from wavecast.runtime.cluster import ActorHandle, RayHost, call_all, end_actors, start_actor
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.demo_memory import DemoMemory
from wavecast.runtime.group import ParameterSyncGroup
from wavecast.runtime.layout.shard import FixedShards, Shard
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.report import SyncReport

__all__ = ("case_facts", "figures", "run_case", "started_actors")

#: What bytes that stay on their GPU are allowed to take, by the issue of a bar: 1 TB/s.
_LOCAL_BYTES_PER_SECOND = 1e12
#: For killed actors to be gone and their memory free.
_GONE_SECONDS = 20.0
_LOOK_SECONDS = 0.05
#: Of a traceback, kept with the error of a case.
_DETAIL_LINES = 6


@dataclass(frozen=True, slots=True)
class Seen:
    """
    What the syncs of a case were.

    :ivar reports: the first sync's, then the warm ones'
    :ivar wall: seconds of each whole ``await group.sync()``
    :ivar differing: elements that were wrong after the first and the last sync, by tensor
    :ivar extra_bytes: by which the fullest GPU had more in use after the last sync than before the first
    """

    reports: tuple[SyncReport, ...]
    wall: tuple[float, ...]
    differing: dict[str, int]
    extra_bytes: int


class FixedActor(DemoActor):
    """
    Promises that its tensors do not move.

    :ivar fixed: what was promised
    :ivar fixed_of: of which list of shards
    """

    fixed: FixedShards = FixedShards()
    fixed_of: object = None

    def transfer_shards(self) -> Sequence[Shard]:
        found = super().transfer_shards()
        if self.fixed_of is not found:
            self.fixed, self.fixed_of = FixedShards(found), found

        return self.fixed


class ApartActor(DemoActor):
    """Takes its GPU for a node of its own."""

    def __init__(self, memory: DemoMemory, weights: Weights, device: str) -> None:
        super().__init__(memory, weights, device)
        node = RayHost.node
        RayHost.node = lambda host: f"{node(host)}/{device}"  # type: ignore[method-assign]


async def run_case(case: Case, book: CeilingBook, *, repeat: int, seconds: float) -> Row:
    """
    Return a case's row: its figures, or how it failed. Needs a Ray cluster.

    Ceilings that are not known yet are measured first, while no actor holds memory.

    :param repeat: warm syncs
    :param seconds: for all of the syncs; also each one's deadline
    """
    row: Row = case_facts(case)
    # A driver has one model's plans; the garbage of other cases would be looked through in the middle of a sync.
    gc.collect()
    try:
        traffic = traffic_of(case, plan_case(case))
        ceilings = book.measure(
            edges=traffic.edges,
            port_bytes=traffic.port_bytes,
            broadcast=traffic.is_broadcast,
            local=traffic.local_bytes > 0,
        )
        with anyio.fail_after(seconds):
            seen = await _syncs(case, repeat=repeat, seconds=seconds)
    except TimeoutError:
        return {**row, "status": "failed", "error": f"the case was not done after {seconds:.0f} s"}
    except Exception as error:
        # Whatever it is: the other cases' figures must not be lost with this one's.
        detail = [*traceback.format_exception(error)[-_DETAIL_LINES:], *getattr(error, "__notes__", ())]
        return {**row, "status": "failed", "error": f"{type(error).__name__}: {error}", "detail": "".join(detail)}

    status = "failed" if seen.differing else "ok"
    return {**row, "status": status, **figures(case, traffic, seen, ceilings)}


def case_facts(case: Case) -> Row:
    """Return what is known of a case before it runs."""
    return {
        "name": case.name,
        "title": case.title,
        "suite": case.suite,
        "preset": case.preset,
        "layers": case.layers,
        "src": case.src,
        "dst": case.dst,
        "dtype": case.dtype,
        "placement": {"trainers": list(case.trainers), "engines": [list(gpus) for gpus in case.engines]},
        "options": {"transport": case.transport, "budget_bytes": case.budget_bytes, **dict(case.options)},
        "bar": asdict(case.bar) if case.bar is not None else None,
    }


async def _syncs(case: Case, *, repeat: int, seconds: float) -> Seen:
    """
    Sync once from nothing and then ``repeat`` times; compare every element after the first and the last.

    Both comparisons follow new weights at the trainers and spoilt ones at the engines. The syncs between move the same
    weights again: to make new ones each time would take longer than all else.
    """
    options = case.sync_options()
    async with started_actors(case) as (trainers, engines):
        every = [*trainers, *(actor for replica in engines for actor in replica)]
        receivers = every[len(trainers) :]
        before = await call_all(every, "device_bytes")
        reports: list[SyncReport] = []
        wall: list[float] = []
        differing: dict[str, int] = {}
        group = ParameterSyncGroup(ModelGroup("policy", [trainers]), ModelGroup("rollout", engines), options)
        async with group:
            for number in range(repeat + 1):
                is_compared = number in (0, repeat)
                if is_compared:
                    await call_all(receivers, "spoil")
                    await call_all(trainers, "fill", number)

                start = time.perf_counter()
                reports.append(await group.sync(number, deadline=seconds))
                wall.append(time.perf_counter() - start)
                if is_compared:
                    for found in await call_all(receivers, "differing", number):
                        for name, count in cast("dict[str, int]", found).items():
                            differing[name] = differing.get(name, 0) + count

            after = await call_all(every, "device_bytes")

    extra = max(cast("int", late) - cast("int", early) for early, late in zip(before, after, strict=True))
    return Seen(tuple(reports), tuple(wall), differing, extra)


@asynccontextmanager
async def started_actors(
    case: Case, actor_class: type[DemoActor] | None = None
) -> AsyncIterator[tuple[list[ActorHandle], list[list[ActorHandle]]]]:
    """Start the actors where the case says, each seeing all GPUs; when the block ends they are killed and gone."""
    actor_class = actor_class or (ApartActor if case.apart else FixedActor if case.fixed else DemoActor)
    weights = Weights(seed=0)
    started: list[ActorHandle] = []
    pids: list[object] = []
    try:
        for memory in trainer_memories(case):
            started.append(start_actor(actor_class, memory, weights, case.device(len(started))))

        trainers = list(started)
        engines: list[list[ActorHandle]] = []
        for held in engine_memories(case):
            first = len(started)
            for memory in held:
                started.append(start_actor(actor_class, memory, weights, case.device(len(started))))

            engines.append(started[first:])

        # Answered when the tensors are there; one that found no room for them is dead by then.
        pids = await call_all(started, "process_id")
        yield trainers, engines
    finally:
        end_actors(started)
        with anyio.CancelScope(shield=True):
            await _until_gone([cast("int", pid) for pid in pids])


async def _until_gone(pids: Sequence[int]) -> None:
    """Wait until the processes have ended, so that the next case finds the GPUs empty."""
    with anyio.move_on_after(_GONE_SECONDS):
        while any(os.path.exists(f"/proc/{pid}") for pid in pids):  # noqa: ASYNC110, ASYNC240
            await anyio.sleep(_LOOK_SECONDS)


def figures(case: Case, traffic: Traffic, seen: Seen, ceilings: Sequence[Row]) -> Row:
    """Return the figures of a case as JSON values."""
    first, last = seen.reports[0], seen.reports[-1]
    warm = seen.reports[1:]
    p50 = quantile(seen.wall[1:], 0.5)
    rate = traffic.port_bytes / p50 / 1e9
    ceiling = best_rate(ceilings)
    row: Row = {
        "verified": not seen.differing,
        "differing": dict(sorted(seen.differing.items())[:8]),
        "transport": last.transport,
        "device": last.device,
        "nbytes": last.nbytes,
        "tensors": last.tensors,
        "routes": last.routes,
        "tasks": last.tasks,
        "waves": last.waves,
        "gap": last.gap,
        "strategy": last.strategy,
        "digest": last.digest,
        "port_bytes": traffic.port_bytes,
        "crossing_bytes": traffic.crossing_bytes,
        "local_bytes": traffic.local_bytes,
        "first": {"wall": seen.wall[0], **asdict(first.seconds)},
        "first_parts": {"reshard": first.reshard_seconds, "schedule": first.schedule_seconds},
        "warm": {
            "count": len(warm),
            "wall": _spread(seen.wall[1:]),
            **{
                phase: _spread([cast("float", asdict(report.seconds)[phase]) for report in warm])
                for phase in asdict(first.seconds)
            },
        },
        "pause_seconds": _spread([report.pause_seconds for report in warm]),
        "shadow_bytes": last.shadow_bytes,
        "wall_seconds": list(seen.wall),
        "port_gigabytes_per_second": rate,
        "ceilings": [str(found["pattern"]) for found in ceilings],
        "ceiling_gigabytes_per_second": ceiling,
        "local_ceiling_gigabytes_per_second": local_rate(ceilings),
        "share_of_ceiling": rate / ceiling if ceiling else None,
        "staging_bytes": max(report.staging_bytes for report in seen.reports),
        "communicator_bytes": max(report.communicator_bytes for report in seen.reports),
        "extra_device_bytes": seen.extra_bytes,
        "pulled_bytes": last.pulled_nbytes,
        "transport_reasons": list(last.transport_reasons),
        "host_seconds": quantile([report.host_seconds for report in warm], 0.5),
    }
    pause = quantile([report.pause_seconds for report in warm], 0.95)
    return {**row, **_against_bar(case, traffic, p50, ceiling, cast("float", row["host_seconds"]), pause)}


def _spread(seconds: Sequence[float]) -> Row:
    return {"p50": quantile(seconds, 0.5), "p95": quantile(seconds, 0.95), "min": min(seconds)}


def _against_bar(
    case: Case, traffic: Traffic, p50: float, ceiling: float | None, host_seconds: float, pause: float
) -> Row:
    """Say what the case may take, and whether it does: crossing bytes at the bar's share, local ones at 1 TB/s."""
    if case.bar is not None and case.bar.pause_seconds is not None:
        return {"allowed_seconds": None, "meets_bar": pause <= case.bar.pause_seconds}

    if case.bar is None or ceiling is None:
        return {"allowed_seconds": None, "meets_bar": None}

    allowed = (
        traffic.port_bytes / (case.bar.share * ceiling * 1e9)
        + traffic.local_bytes / _LOCAL_BYTES_PER_SECOND
        + case.bar.overhead_seconds
    )
    on_host = case.bar.host_seconds is None or host_seconds <= case.bar.host_seconds
    return {"allowed_seconds": allowed, "meets_bar": p50 <= allowed and on_host}
