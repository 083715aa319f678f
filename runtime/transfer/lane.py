"""One daemon thread that runs calls in order, and that can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

__all__ = ("Lane",)

T = TypeVar("T")


class Lane:
    """
    Runs calls one after the other on a thread of its own.

    An executor of the standard library would be joined at exit; a thread that is stuck in a transport must not keep its
    process, so this one is a daemon and is simply left behind.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue ``call`` and return the future of its result; on a closed lane that is a :class:`RuntimeError`."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return

            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._closing:
            if self._closed:
                future.set_exception(RuntimeError("the transfer thread has ended"))
            else:
                self._calls.put(run)

        return future

    def close(self) -> None:
        """End the thread once it has worked off its calls."""
        with self._closing:
            self._closed = True
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call
