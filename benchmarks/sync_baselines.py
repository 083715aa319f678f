"""Other ways to bring the same bytes to the same places."""

from __future__ import annotations

from collections.abc import Sequence

from sync_cases import Case

__all__ = ("BASELINES", "run_baselines")

BASELINES = {"seed": "x"}


def run_baselines(case: Case, names: Sequence[str], *, seconds: float) -> list[dict[str, object]]:
    return []
