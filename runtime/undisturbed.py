"""Work that comes to its end although its caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import anyio

__all__ = ("undisturbed",)

T = TypeVar("T")


async def undisturbed(work: Awaitable[T]) -> T:
    """
    Wait until ``work`` has ended, then let a cancellation that came meanwhile go on.

    A shield of anyio's keeps out its own cancel scopes, but not ``task.cancel()``, by which asyncio's own timeouts and
    an ending loop cancel. So the work has a task of its own, and it bounds its own time.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error

    if cancelled is not None:
        raise cancelled

    return task.result()
