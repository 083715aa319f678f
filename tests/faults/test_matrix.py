"""Every cell of the fault matrix, in one process."""

from __future__ import annotations

import gc

import anyio
import pytest

from tests.faults.cells import CELLS, FAULTS, PHASES, SIDES, STAGINGS, Cell
from tests.faults.local_cells import DEADLINE_SECONDS, Outcome, run_cells

pytestmark = pytest.mark.timeout(300)

REAL = tuple(cell for cell in CELLS if cell.error)


@pytest.fixture(scope="module")
def outcomes() -> dict[Cell, Outcome | Exception]:
    """Of all cells, side by side: nearly all of their time is waiting for deadlines."""
    # What other tests have left is not to be looked through by a collection in the middle of a deadline.
    gc.collect()
    gc.freeze()
    try:
        return anyio.run(run_cells, REAL)
    finally:
        gc.unfreeze()


def test_every_fault_meets_every_phase_side_and_staging_once() -> None:
    places = [(cell.fault, cell.phase, cell.side, cell.staging) for cell in CELLS]
    assert sorted(places) == sorted(
        (fault, phase, side, staging) for fault in FAULTS for phase in PHASES for side in SIDES for staging in STAGINGS
    )
    assert all(bool(cell.error) != bool(cell.why) for cell in CELLS)
    assert (len(CELLS), len(REAL)) == (288, 244)


@pytest.mark.parametrize("cell", REAL, ids=str)
def test_a_fault_ends_in_its_error_in_time_with_the_versions_it_should_and_is_healed(
    outcomes: dict[Cell, Outcome | Exception], cell: Cell
) -> None:
    outcome = outcomes[cell]
    if isinstance(outcome, Exception):
        raise outcome

    assert (outcome.error, outcome.versions) == (cell.error, cell.versions), outcome.message
    assert outcome.seconds <= DEADLINE_SECONDS + 1
    # A replica that is called whole is whole, bit for bit; and the next sync brings all of them to its own weights.
    assert outcome.mixed == ()
    assert outcome.healed
