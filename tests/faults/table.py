"""
The fault matrix as a table: runs every cell in one process and writes down what came of it.

    python -m tests.faults.table                                # a table
    python -m tests.faults.table --write docs/reliability.md    # puts the table between the page's markers
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import anyio

from tests.faults.cells import CELLS, FAULTS, PHASES, SIDES, STAGINGS, Cell
from tests.faults.local_cells import DEADLINE_SECONDS, Outcome, run_cells

__all__ = ("main", "table")

_BEGIN, _END = "<!-- faults: begin -->", "<!-- faults: end -->"


def table(outcomes: Mapping[Cell, Outcome | Exception]) -> str:
    """Return a row a fault and phase; in it a column a side and staging. A cell that is not as it should be says so."""
    at = {(cell.fault, cell.phase, cell.side, cell.staging): cell for cell in CELLS}
    lines = [
        "| fault | phase | " + " | ".join(f"{side}, {staging}" for side in SIDES for staging in STAGINGS) + " |",
        "| --- " * (2 + len(SIDES) * len(STAGINGS)) + "|",
    ]
    notes: list[str] = []
    for fault, words in FAULTS.items():
        for phase in PHASES:
            cells = [at[fault, phase, side, staging] for side in SIDES for staging in STAGINGS]
            shown = [_show(cell, outcomes.get(cell), notes) for cell in cells]
            lines.append(f"| {words} | {phase} | " + " | ".join(shown) + " |")

    return "\n".join([*lines, "", *(f"({number}) {note}.  " for number, note in enumerate(notes, 1))])


def _show(cell: Cell, outcome: Outcome | Exception | None, notes: list[str]) -> str:
    if not cell.error:
        if cell.why not in notes:
            notes.append(cell.why)

        return f"({notes.index(cell.why) + 1})"

    if not isinstance(outcome, Outcome) or not is_as_said(cell, outcome):
        return f"**NOT AS SAID**: {outcome!r}"

    seconds = "at once" if outcome.seconds < DEADLINE_SECONDS else "deadline"
    return f"{outcome.error}, {seconds}, {' + '.join(outcome.versions)}, healed"


def is_as_said(cell: Cell, outcome: Outcome) -> bool:
    """Tell whether a cell came out as the table of cells says, in time, whole where it says so, and healed."""
    in_time = outcome.seconds <= DEADLINE_SECONDS + 1
    said = (outcome.error, outcome.versions) == (cell.error, cell.versions)
    return said and in_time and not outcome.mixed and outcome.healed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a page with the markers between which the table goes")
    page = parser.parse_args().write
    logging.disable(logging.CRITICAL)
    real = [cell for cell in CELLS if cell.error]
    outcomes = anyio.run(run_cells, real)
    made = table(outcomes)
    if page is None:
        print(made)  # noqa: T201
    else:
        before, _, rest = page.read_text().partition(_BEGIN)
        _, _, after = rest.partition(_END)
        page.write_text(f"{before}{_BEGIN}\n{made}\n{_END}{after}")

    wrong = [cell for cell in real if not isinstance(found := outcomes[cell], Outcome) or not is_as_said(cell, found)]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
