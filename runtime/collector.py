"""Python's garbage collector, kept from looking through everything again while many objects are made that stay."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ("collector_paused",)

_lock = threading.Lock()
_pausing = 0
_was_enabled = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """
    Let no automatic collection begin while the block runs; blocks may nest and run on several threads.

    To describe a model of many tensors makes some hundred thousand objects, none of them garbage: each takes the
    collector nearer to going through all that a process with torch and Ray holds, 0.15 s at a time and several times
    before the first byte moves. A collector that was off stays off.
    """
    global _pausing, _was_enabled
    with _lock:
        if _pausing == 0:
            _was_enabled = gc.isenabled()
            gc.disable()

        _pausing += 1

    try:
        yield
    finally:
        with _lock:
            _pausing -= 1
            if _pausing == 0 and _was_enabled:
                gc.enable()
