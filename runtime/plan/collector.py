"""Large plans without stops by the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ("paused_collector",)


@contextmanager
def paused_collector() -> Iterator[None]:
    """
    Keep Python's cyclic garbage collector from running in this process, unless it is off already.

    A plan is up to a million small values that all stay and form no cycle. To look through them again and again takes
    as long as to make them, and no other thread runs meanwhile: a trainer's event loop would stand still each time.
    """
    if not gc.isenabled():
        yield
        return

    gc.disable()
    try:
        yield
    finally:
        gc.enable()
