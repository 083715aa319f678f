"""Cells of the fault matrix on real Ray actors: some of all kinds always, all of them by ``pytest -m matrix``."""

from __future__ import annotations

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


def test_the_sample_has_every_fault_and_every_phase_on_both_sides_in_both_stagings() -> None:
    cells = [REAL[name] for name in ALWAYS]
    for field in ("fault", "phase", "side", "staging"):
        assert {getattr(cell, field) for cell in cells} == {getattr(cell, field) for cell in CELLS}


@pytest.mark.parametrize("cell", [REAL[name] for name in ALWAYS], ids=str)
async def test_a_fault_in_a_process_ends_as_the_table_says(cell: Cell, make_sides: MakeSides, pool: Pool) -> None:
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
