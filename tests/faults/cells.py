"""The fault matrix: what becomes of a sync, for every fault at every place. One table, for tests and docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ("CELLS", "FAULTS", "PHASES", "Cell", "Row", "ROWS", "SIDES", "STAGINGS")

Side = Literal["trainer", "engine"]
Staging = Literal["in_place", "shadow"]
SIDES: tuple[Side, ...] = get_args(Side)
STAGINGS: tuple[Staging, ...] = get_args(Staging)

#: In words, as the docs have them.
FAULTS = {
    "kill": "process killed (SIGKILL)",
    "stop": "process stopped (SIGSTOP)",
    "hook": "exception in the user's code",
    "shape": "another shape after the layout was read",
    "dtype": "another dtype after the layout was read",
    "bit": "one bit flipped in a buffer",
    "lost": "message or answer lost",
    "memory": "out of memory",
    "cancel": "driver cancelled",
}
PHASES = ("describe", "connect", "first wave", "middle wave", "last wave", "verify", "vote", "commit")


@dataclass(frozen=True, slots=True)
class Row:
    """
    A fault in a phase, and what comes of it at either side.

    :ivar trainer: the class of the error when it strikes a trainer; ``"cancelled"`` where the caller's own cancellation
        goes on; ``"-"`` and why, where the cell cannot be
    :ivar engine: the same for an engine
    :ivar in_place: the two replicas' versions afterwards: ``old``, ``new``, ``torn``. The engine struck is of the first
    :ivar shadow: the same where destinations are staged in shadow
    :ivar in_place_trainer: the versions when a trainer is struck, where they are others, and ``shadow_trainer``
    :ivar shadow_error: the error when an engine is struck that is staged in shadow, where it is another
    """

    fault: str
    phase: str
    trainer: str
    engine: str
    in_place: str
    shadow: str
    in_place_trainer: str = ""
    shadow_trainer: str = ""
    shadow_error: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """
    One sync that fails.

    :ivar error: the error's class name, or ``"cancelled"``; empty where there is no such cell
    :ivar versions: the replicas' versions afterwards
    :ivar why: why there is no such cell, or empty
    """

    fault: str
    phase: str
    side: Side
    staging: Staging
    error: str
    versions: tuple[str, ...]
    why: str = ""

    def __str__(self) -> str:
        return "-".join((self.fault, self.phase.replace(" ", "_"), self.side, self.staging))


_NOTHING_MOVES = "-no weights are in a buffer yet: what is said goes over Ray's own channel"
_PART_OVER = "-the trainer's part is over: what its tensors are now changes nothing that was sent"
_NO_CODE = "-no code of the user's is called here"
_ITS_OWN = "-its bytes have arrived and were compared: this is what a user may do after a sync"
_UNSEEN = "-compared before; what flips then flips as in a model at work, and nothing tells"

_WAVES = ("first wave", "middle wave", "last wave")


def _rows() -> Iterator[Row]:
    for fault, error in (
        ("kill", "ActorDied"),
        ("stop", "SyncTimeout"),
        ("lost", "SyncTimeout"),
        ("memory", "ActorFailed"),
        ("cancel", "cancelled"),
    ):
        for phase in ("describe", "connect"):
            yield Row(fault, phase, error, error, "old old", "old old")

        for phase in (*_WAVES, "verify", "vote"):
            yield Row(fault, phase, error, error, "torn torn", "old old")

        # Whoever was told to commit does; only an engine that cannot leaves its own replica torn.
        engine = "new new" if fault == "cancel" else "torn new"
        yield Row(fault, "commit", error, error, engine, engine, "new new", "new new")

    yield Row("hook", "describe", "ActorFailed", "ActorFailed", "old old", "old old")
    yield Row("hook", "connect", _NO_CODE, _NO_CODE, "", "")
    for phase in _WAVES:
        yield Row("hook", phase, "ActorFailed", _NO_CODE, "torn torn", "old old")

    yield Row("hook", "verify", _NO_CODE, _NO_CODE, "", "")
    yield Row("hook", "vote", "ActorFailed", "ActorFailed", "torn torn", "old old")
    yield Row("hook", "commit", "ActorFailed", "ActorFailed", "new new", "new new")

    for fault in ("shape", "dtype"):
        yield Row(fault, "describe", "LayoutError", "LayoutError", "old old", "old old")
        for phase in ("connect", *_WAVES):
            yield Row(fault, phase, "LayoutError", "LayoutError", "torn torn", "old old")

    yield Row(
        "shape", "verify", "ValidationError", "ValidationError", "torn torn", "old old", shadow_error="LayoutError"
    )
    yield Row("dtype", "verify", _PART_OVER, "LayoutError", "torn torn", "old old")
    for fault in ("shape", "dtype"):
        yield Row(fault, "vote", _PART_OVER, _ITS_OWN, "", "old old", shadow_error="LayoutError")
        yield Row(fault, "commit", _PART_OVER, _ITS_OWN, "", "torn new", shadow_error="LayoutError")

    yield Row("bit", "describe", _NOTHING_MOVES, _NOTHING_MOVES, "", "")
    yield Row("bit", "connect", _NOTHING_MOVES, _NOTHING_MOVES, "", "")
    for phase in _WAVES:
        yield Row("bit", phase, "ChecksumMismatch", "ChecksumMismatch", "torn torn", "old old")

    yield Row("bit", "verify", "ValidationError", "ValidationError", "torn torn", "old old")
    yield Row("bit", "vote", _PART_OVER, _UNSEEN, "", "")
    yield Row("bit", "commit", _PART_OVER, _UNSEEN, "", "")


def _cells(row: Row) -> Iterator[Cell]:
    for side in SIDES:
        for staging in STAGINGS:
            error = row.trainer if side == "trainer" else row.engine
            versions = row.in_place if staging == "in_place" else row.shadow
            if side == "trainer":
                versions = (row.in_place_trainer if staging == "in_place" else row.shadow_trainer) or versions
            elif staging == "shadow":
                error = row.shadow_error or error

            if error.startswith("-"):
                yield Cell(row.fault, row.phase, side, staging, "", (), error[1:])
            else:
                yield Cell(row.fault, row.phase, side, staging, error, tuple(versions.split()))


ROWS = tuple(_rows())
CELLS = tuple(cell for row in ROWS for cell in _cells(row))
