"""Who may sync now: callers that come while another sync runs."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

import anyio

from wavecast.runtime.errors import GroupClosed, SyncInProgress, SyncTimeout
from wavecast.runtime.report import SyncReport
from wavecast.runtime.request import SyncRequest

__all__ = ("Caller", "Turns")


@dataclass(slots=True, eq=False)
class Caller:
    """
    Somebody who wants the group to himself.

    :ivar request: ``None`` for a change of members
    :ivar called: set when it is his turn, or when it never will be
    :ivar report: of the sync that served him along with its own caller
    """

    request: SyncRequest | None
    called: anyio.Event = field(default_factory=anyio.Event)
    report: SyncReport | None = None


class Turns:
    """
    Gives callers their turns, in the order they came; decided in plain functions, so that no two can slip in at once.

    :param when_busy: ``"raise"``: whoever comes second is refused; ``"queue"``: he waits; ``"coalesce"``: he waits, and
        all that wait by the time of a turn, for the same thing, are served by one sync
    """

    def __init__(self, when_busy: Literal["raise", "queue", "coalesce"]) -> None:
        self._when_busy = when_busy
        self._current: Caller | None = None
        self._followers: tuple[Caller, ...] = ()
        self._waiting: deque[Caller] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting) + len(self._followers)

    def arrive(self, request: SyncRequest | None) -> Caller:
        """
        Stand in line.

        :raises SyncInProgress: when it is another's turn and nobody may wait
        """
        caller = Caller(request)
        if self._current is None:
            self._call(caller)
        elif self._when_busy == "raise":
            raise _in_progress(self._current)
        else:
            self._waiting.append(caller)

        return caller

    @contextlib.asynccontextmanager
    async def turn(self, caller: Caller, seconds: float = float("inf")) -> AsyncIterator[None]:
        """
        Wait for the turn of ``caller``, and end it with the block. He may have been served already: see its report.

        :raises SyncTimeout: when the turn has not come after ``seconds``
        :raises GroupClosed: when the group was closed before
        """
        try:
            if not caller.called.is_set():
                with anyio.move_on_after(seconds):
                    await caller.called.wait()

            if self._closed and caller.report is None:
                raise GroupClosed("the group was closed before it was this caller's turn")

            if not caller.called.is_set():
                raise SyncTimeout(f"the deadline of {seconds} seconds passed behind another sync", phase="queue")

            yield
        finally:
            self._leave(caller)

    def gather(self, request: SyncRequest) -> SyncRequest:
        """
        Return what is to be done for the current caller's ``request`` and for all that can be served along with it.

        Those are the whole syncs that leave the version open when it does, and those that name one when it does: the
        newest of these is synced to. Once in a turn.
        """
        if self._when_busy != "coalesce" or not _is_whole(request):
            return request

        followers = [each for each in self._waiting if each.request is not None and _goes_along(each.request, request)]
        self._followers = tuple(followers)
        self._waiting = deque(each for each in self._waiting if each not in followers)
        requests = [request, *(each.request for each in followers if each.request is not None)]
        named = [each.version for each in requests if each.version is not None]
        return replace(
            request,
            version=max(named) if named else None,
            validate=any(each.validate for each in requests),
        )

    def share(self, report: SyncReport) -> None:
        """Serve all that went along with the current caller. Without this they get turns of their own."""
        for follower in self._followers:
            follower.report = report
            follower.called.set()

        self._followers = ()

    def close(self) -> None:
        """Send away all that wait."""
        self._closed = True
        for caller in (*self._followers, *self._waiting):
            caller.called.set()

    def _leave(self, caller: Caller) -> None:
        if caller is not self._current:
            self._followers = tuple(each for each in self._followers if each is not caller)
            self._waiting = deque(each for each in self._waiting if each is not caller)
            return

        # Who went along with a sync that failed goes first now.
        self._waiting.extendleft(reversed(self._followers))
        self._current, self._followers = None, ()
        if self._waiting:
            self._call(self._waiting.popleft())

    def _call(self, caller: Caller) -> None:
        self._current = caller
        caller.called.set()


def _in_progress(current: Caller) -> SyncInProgress:
    if current.request is None:
        return SyncInProgress("the group's members are being changed")

    version = current.request.version
    which = "the next version" if version is None else f"version {version}"
    return SyncInProgress(f"a sync to {which} is under way", version=version)


def _is_whole(request: SyncRequest) -> bool:
    return request.only is None and not request.dry_run


def _goes_along(other: SyncRequest, request: SyncRequest) -> bool:
    return _is_whole(other) and (other.version is None) == (request.version is None)
