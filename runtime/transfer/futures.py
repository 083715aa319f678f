"""Futures of answers: made, taken apart and passed on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ("Promise", "item_of", "pass_on")

T = TypeVar("T")


class Promise(Future[T]):
    """
    What will be answered: a caller on an event loop that stops waiting must not cancel that.

    Its result may be told to somebody before those that wait for it wake up: they need the interpreter as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._telling = threading.Lock()
        self._tell: Callable[[T], object] | None = None
        self._found: list[T] = []

    def tell_first(self, tell: Callable[[T], object]) -> None:
        """Call ``tell`` with the result as soon as there is one, at once if there is; never for a failure."""
        with self._telling:
            self._tell = tell
            found = list(self._found)

        for result in found:
            tell(result)

    def set_result(self, result: T) -> None:
        with self._telling:
            self._found.append(result)
            tell = self._tell

        try:
            if tell is not None:
                tell(result)
        finally:
            super().set_result(result)


def item_of(several: Future[list[T]], index: int) -> Future[T]:
    """Return the future of one item of a list."""
    one: Future[T] = Future()

    def pick(done: Future[list[T]]) -> None:
        error = done.exception()
        if error is not None:
            one.set_exception(error)
        else:
            one.set_result(done.result()[index])

    several.add_done_callback(pick)
    return one


def pass_on(inner: Future[T], outer: Future[T]) -> None:
    """Let ``outer`` end as ``inner`` does."""

    def end(done: Future[T]) -> None:
        error = done.exception()
        if error is None:
            outer.set_result(done.result())
        else:
            outer.set_exception(error)

    inner.add_done_callback(end)
