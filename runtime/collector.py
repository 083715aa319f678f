"""Python's garbage collector, kept from looking through everything again while many objects are made that stay."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ("collect_what_is_due", "collector_paused")

#: So many objects made that stay bring a collection of everything nearer.
_MANY = 20_000

_lock = threading.Lock()
_pausing = 0
_was_enabled = False
_made = 0


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """
    Let no automatic collection begin while the block runs; blocks may nest and run on several threads.

    To describe a model of many tensors makes some hundred thousand objects, none of them garbage: each takes the
    collector nearer to going through all that a process with torch and Ray holds, 0.15 s at a time. What was put off is
    done by :func:`collect_what_is_due`. A collector that was off stays off.
    """
    global _pausing, _was_enabled, _made
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
                _made += gc.get_count()[0]
                gc.enable()


def collect_what_is_due() -> bool:
    """
    Go through everything now, if so much was made in pauses that it would come soon, in the middle of a sync; return
    whether it did. To be called where nobody waits.
    """
    global _made
    with _lock:
        is_due, _made = _made >= _MANY and gc.isenabled(), 0 if _made >= _MANY else _made

    if is_due:
        gc.collect()

    return is_due
