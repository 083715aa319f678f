"""The user's hooks around a sync: which is due at which request."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple

from wavecast.runtime import errors
from wavecast.runtime.transfer.messages import Abort, Begin, Close, Commit, Request, RunHook, RunId

__all__ = ("HOOKS", "Hook", "HookCall", "Hooks")

#: In the order in which a sync comes to them; the last two exclude each other.
HOOKS = ("before_sync", "before_commit", "after_commit", "after_abort")

Hook = Callable[[int], Awaitable[None] | None]


class HookCall(NamedTuple):
    """A hook that is due."""

    name: str
    version: int
    hook: Hook


class Hooks:
    """
    Decides which hook a request makes due, and sees that each ``before_sync`` has its end.

    After ``before_sync`` was called, also when it raised, exactly one of ``after_commit`` and ``after_abort`` follows:
    at the driver's own request when the sync ends, or else when the next one begins or the group is closed. Hooks of
    one run never overlap those of another: who begins waits for the end of a run that is over, and is refused while a
    hook of one that is not is being called.

    Whoever is given calls makes them, whatever becomes of them, and says so by :meth:`called` or :meth:`ended`.

    :param hooks: by name, those that the user has written
    """

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self._hooks = dict(hooks)
        self._lock = threading.Lock()
        self._open: tuple[RunId, int] | None = None
        self._committed = False
        # Pending while hooks are being called.
        self._calling: Future[None] | None = None
        self._abandoned = False

    @property
    def names(self) -> tuple[str, ...]:
        """Those there are, in the order of :data:`HOOKS`."""
        return tuple(name for name in HOOKS if name in self._hooks)

    def before(self, request: Request) -> list[HookCall] | Future[None]:
        """
        Return what is to be called before ``request`` is served; :meth:`called` must follow.

        In place of it a future, when the hooks that end an earlier run have not returned yet: once it is done, ask
        again. Waiting for it may be given up at any time.

        :raises SyncInProgress: when a hook of an earlier run that goes on has not returned yet
        :raises SyncAborted: for a hook of a run that is over
        """
        if not isinstance(request, Begin | RunHook):
            return []

        with self._lock:
            if self._calling is not None:
                if isinstance(request, Begin) and (self._open is None or self._abandoned):
                    return self._calling

                raise errors.SyncInProgress("a hook of an earlier sync has not returned yet on this actor")

            if isinstance(request, RunHook):
                return self._asked_for(request)

            calls = self._end()
            self._committed = self._abandoned = False
            if request.version is not None:
                self._open = (request.run, request.version)
                calls += self._call("before_sync", request.version)

            return self._begin_calls(calls)

    def called(self, request: Request) -> list[HookCall]:
        """Note that the calls made before ``request`` are over; return what became due meanwhile, as :meth:`after`."""
        with self._lock:
            if not isinstance(request, Begin | RunHook):
                return []

            ends = self._end() if self._abandoned else []
            if not ends:
                self._end_calls()

            return ends

    def ended(self) -> None:
        """Note that the calls that :meth:`called` or :meth:`after` returned are over."""
        with self._lock:
            self._end_calls()

    @property
    def abandoned(self) -> bool:
        """Whether the run was given up while its hook was being called."""
        return self._abandoned

    def after(self, request: Request) -> list[HookCall]:
        """Return what is to be called after ``request`` was served; if that is anything, :meth:`ended` must follow."""
        with self._lock:
            match request:
                case Commit() if self._open is not None and self._open[0] == request.run:
                    self._committed = not request.dry_run
                    return []
                case Abort():
                    ends = self._open is not None and self._open[0] == request.run
                case Close():
                    ends = self._open is not None and self._open[0].group == request.group
                case _:
                    return []

            if ends and self._calling is not None:
                # On another thread; whoever called it goes on with the end.
                self._abandoned = True
                return []

            return self._begin_calls(self._end()) if ends else []

    def _begin_calls(self, calls: list[HookCall]) -> list[HookCall]:
        if calls:
            self._calling = Future()
            # One of those that wait for it goes away: that must not end it for the others.
            self._calling.set_running_or_notify_cancel()

        return calls

    def _end_calls(self) -> None:
        calling, self._calling = self._calling, None
        if calling is not None:
            calling.set_result(None)

    def _asked_for(self, request: RunHook) -> list[HookCall]:
        if self._open is None or self._open[0] != request.run:
            raise errors.SyncAborted("the run is no longer current on this actor")

        calls = self._call(request.hook, self._open[1]) if request.hook == "before_commit" else self._end()
        return self._begin_calls(calls)

    def _end(self) -> list[HookCall]:
        if self._open is None:
            return []

        (_, version), self._open = self._open, None
        return self._call("after_commit" if self._committed else "after_abort", version)

    def _call(self, name: str, version: int) -> list[HookCall]:
        hook = self._hooks.get(name)
        return [] if hook is None else [HookCall(name, version, hook)]
