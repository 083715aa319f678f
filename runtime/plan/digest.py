"""One digest for all that the actors of a transfer must agree on."""

from __future__ import annotations

import hashlib
from typing import Protocol

__all__ = ("plan_digest",)


class _Digested(Protocol):
    @property
    def digest(self) -> str: ...


def plan_digest(plan: _Digested, schedule: _Digested) -> str:
    """
    Return the SHA-256 over the digests of a plan and of its schedule, in hexadecimal.

    The same on any machine and for any hash seed: all actors compare it before their first collective.
    """
    return hashlib.sha256(f"plan {plan.digest}\nschedule {schedule.digest}\n".encode()).hexdigest()
