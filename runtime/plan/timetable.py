"""From routes to waves, with the size of tasks that suits them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from wavecast.runtime.plan.chunks import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, start_nbytes
from wavecast.runtime.plan.reshard import ReshardPlan
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import build_tasks, spread_tasks, through_owners
from wavecast.scheduler import FanOut, LinkCost, Schedule, plan_waves, verify

__all__ = ("make_timetable",)

#: A schedule so close to its bound is not worth cutting anything for.
_NEXT_TO_NOTHING = 1.02
_PARTS = 8


def make_timetable(
    plan: ReshardPlan,
    *,
    chunk_bytes: int | None = None,
    strategy: str = "auto",
    ports: Literal["half", "full"] = "half",
    fan_out: FanOut = "auto",
    link: LinkCost | None = None,
    apart: Callable[[Route], bool] | None = None,
    owners: Sequence[int] = (),
) -> Schedule:
    """
    Return a verified schedule of ``plan``'s routes.

    Where ``chunk_bytes`` is left out no run is cut if that leaves next to nothing idle: runs of one size share waves.
    Else two more sizes are tried, the one that makes chunks of all runs most alike and an eighth of the busiest port's
    bytes, and the schedule of the least makespan is taken, each wave charged with the start of its tasks.

    :param apart: as of :func:`~wavecast.runtime.plan.tasks.build_tasks`; the other options as of ``SyncOptions``
    :param owners: as of :func:`~wavecast.runtime.plan.tasks.through_owners`
    :raises ConfigError: when ``chunk_bytes`` cannot be
    """

    def try_out(size: int | None) -> Schedule:
        hops = spread_tasks(build_tasks(plan, chunk_bytes=size, apart=apart), method=fan_out, cost=link)
        tasks = through_owners(hops, owners, apart=apart)
        schedule = plan_waves(tasks, strategy=strategy, ports=ports)
        verify(schedule, tasks)
        return schedule

    if chunk_bytes is not None:
        return try_out(chunk_bytes)

    whole = try_out(MAX_CHUNK_BYTES)
    if whole.gap <= _NEXT_TO_NOTHING:
        return whole

    start = start_nbytes(whole.bound.nbytes)
    eighth = max(whole.bound.nbytes // _PARTS, MIN_CHUNK_BYTES)
    tried = (whole, try_out(None), try_out(eighth))
    return min(tried, key=lambda schedule: schedule.makespan_bytes + start * len(schedule.waves))
