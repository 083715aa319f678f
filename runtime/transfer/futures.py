"""Futures of answers: made, taken apart and passed on."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

__all__ = ("item_of", "pass_on", "promised")

T = TypeVar("T")


def promised() -> Future[T]:
    """Return what will be answered: a caller on an event loop that stops waiting must not cancel that."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


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
