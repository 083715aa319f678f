"""
Cells of the fault matrix on real Ray actors: a core always, a few others each day, all by ``pytest -m matrix``.

The day's are drawn by a seed, which their names end in: ``WAVECAST_MATRIX_SEED=739577`` draws those of that day again.
"""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime

import pytest

from tests.faults.cells import CELLS, Cell
from tests.faults.ray_cells import deadline_of, run_ray_cell
from tests.integration.conftest import MakeSides, Pool

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

#: The user's code inside a step is the same code whatever hosts the actor; the demo actors have none.
REAL = {str(cell): cell for cell in CELLS if cell.error and not (cell.fault == "hook" and cell.phase.endswith("wave"))}

#: Every fault, every phase, both sides and both stagings: what only processes and sockets can show comes first.
ALWAYS = (
    "kill-describe-engine-shadow",
    "kill-connect-trainer-in_place",
    "kill-middle_wave-trainer-shadow",
    "kill-commit-engine-shadow",
    "stop-connect-engine-in_place",
    "stop-first_wave-trainer-shadow",
    "stop-vote-engine-shadow",
    "hook-vote-trainer-in_place",
    "shape-last_wave-engine-in_place",
    "dtype-first_wave-trainer-shadow",
    "bit-middle_wave-engine-shadow",
    "lost-last_wave-trainer-in_place",
    "memory-connect-engine-shadow",
    "cancel-verify-trainer-shadow",
)

#: A process that is killed costs a new one, one that is stopped or whose answer is lost a deadline: those are for the
#: core and for the whole matrix.
QUICK = tuple(name for name, cell in REAL.items() if name not in ALWAYS and cell.fault not in ("kill", "stop", "lost"))
DRAWN = 4
SEED = int(os.environ.get("WAVECAST_MATRIX_SEED") or datetime.now(UTC).toordinal())


def draw(seed: int) -> list[str]:
    """Return the cells of one day."""
    return random.Random(seed).sample(QUICK, DRAWN)


def test_the_sample_has_every_fault_and_every_phase_on_both_sides_in_both_stagings() -> None:
    cells = [REAL[name] for name in ALWAYS]
    for field in ("fault", "phase", "side", "staging"):
        assert {getattr(cell, field) for cell in cells} == {getattr(cell, field) for cell in CELLS}


def test_a_seed_draws_the_same_cells_again_and_the_days_of_a_year_draw_all() -> None:
    assert draw(739577) == draw(739577) != draw(739578)
    drawn = {name for day in range(739577, 739577 + 365) for name in draw(day)}
    assert drawn.isdisjoint(ALWAYS)
    assert (len(REAL), len(ALWAYS), len(QUICK)) == (238, 14, 136)
    assert drawn == set(QUICK)


@pytest.mark.parametrize("cell", [REAL[name] for name in ALWAYS], ids=str)
async def test_a_fault_in_a_process_ends_as_the_table_says(cell: Cell, make_sides: MakeSides, pool: Pool) -> None:
    await check(cell, make_sides, pool)


@pytest.mark.parametrize("cell", [pytest.param(REAL[name], id=f"{name}-seed{SEED}") for name in draw(SEED)])
async def test_a_fault_drawn_for_the_day_ends_as_the_table_says(cell: Cell, make_sides: MakeSides, pool: Pool) -> None:
    await check(cell, make_sides, pool)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [cell for name, cell in REAL.items() if name not in ALWAYS], ids=str)
async def test_every_other_fault_in_a_process_ends_so_too(cell: Cell, make_sides: MakeSides, pool: Pool) -> None:
    await check(cell, make_sides, pool)


async def check(cell: Cell, make_sides: MakeSides, pool: Pool) -> None:
    outcome = await run_ray_cell(cell, make_sides, pool)
    assert (outcome.error, outcome.versions) == (cell.error, cell.versions), outcome.message
    # One that is to end at once and waits for its deadline instead has another error.
    assert outcome.seconds <= deadline_of(cell) + 1
    assert outcome.healed
