"""Which size of tasks a plan gets, with exact numbers."""

from __future__ import annotations

import math

from wavecast.runtime.plan.reshard import ReshardPlan, routes_digest
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.timetable import make_timetable

MIB = 1 << 20


def plan_of(runs: dict[tuple[int, int], int], *, sources: int, destinations: int) -> ReshardPlan:
    """A plan of one route a run: rows of 1 MiB from sender to receiver."""
    routes = tuple(
        Route(sender, (receiver,), f"{sender}-{receiver}", (0, 0), (rows, MIB), "uint8", rows * MIB)
        for (sender, receiver), rows in runs.items()
    )
    nbytes = sum(route.nbytes for route in routes)
    return ReshardPlan(routes, sources, destinations, nbytes, 2 * len(routes), routes_digest(routes))


def sizes(plan: ReshardPlan, **options: int) -> list[list[int]]:
    """MiB of each task, wave by wave."""
    schedule = make_timetable(plan, **options)  # type: ignore[arg-type]
    return [sorted(task.nbytes // MIB for task in wave.tasks) for wave in schedule.waves]


def test_one_run_is_one_task() -> None:
    assert sizes(plan_of({(0, 1): 14_000}, sources=1, destinations=1)) == [[14_000]]


def test_runs_of_two_sizes_stay_whole_where_those_of_one_size_share_a_wave() -> None:
    runs = {(0, 2): 16_000, (1, 3): 16_000, (0, 3): 14_000, (1, 2): 14_000}
    assert sorted(sizes(plan_of(runs, sources=2, destinations=2))) == [[14_000, 14_000], [16_000, 16_000]]


def test_runs_that_would_leave_ports_idle_are_cut() -> None:
    """3 to 2: whole, the run of 6000 lasts two waves of the others, which share its actors."""
    runs = {(0, 3): 6000, (1, 4): 3000, (2, 4): 3000}
    waves = sizes(plan_of(runs, sources=3, destinations=2))
    assert sum(max(wave) for wave in waves) < 1.01 * 6000
    assert math.isclose(sum(map(sum, waves)), 12_000, rel_tol=1e-3)


def test_a_size_that_was_asked_for_is_kept() -> None:
    assert sizes(plan_of({(0, 1): 100}, sources=1, destinations=1), chunk_bytes=50 * MIB) == [[50], [50]]
