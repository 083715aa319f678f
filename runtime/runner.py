"""Runs syncs to their end: one at a time, each within its deadline, with nothing of it left running."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from wavecast.runtime import errors
from wavecast.runtime.known import Known
from wavecast.runtime.opening import ask_versions
from wavecast.runtime.report import SyncReport
from wavecast.runtime.request import SyncRequest
from wavecast.runtime.sync_run import SyncRun

__all__ = ("Runner",)

#: To learn who is dead before a failure is told: Ray has had the time of the abort to find out.
_DEATH_SECONDS = 0.1

T = TypeVar("T")


class Runner:
    """
    One group's runs.

    :ivar closed: no further run is let in
    """

    def __init__(self) -> None:
        self.closed = False
        self._run: SyncRun | None = None
        self._ended: anyio.Event | None = None

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return self._run is not None

    async def sync(self, request: SyncRequest, known: Known, name: str) -> SyncReport:
        """
        Run one sync to its end, whatever that is: when this returns or raises, nothing of it is left running.

        :param name: under which the actors keep what they hold for it
        :raises SyncError: the class that fits, with the versions of the replicas
        """
        run = self._enter(request, known, name)
        try:
            report = await self._within(run, known, run.run)
            run.settle()
            return report
        except BaseException as error:
            run.settle()
            await run.abort(f"{type(error).__name__}: {error}")
            if isinstance(error, errors.SyncError):
                run.locate(error)
                error.versions = known.versions.by_index()
                await self._raise_death_behind(error, run, known)

            if self.closed and isinstance(error, errors.SyncAborted):
                raise self._over(run, known) from error

            raise
        finally:
            self._leave()

    async def ask_versions(self, seconds: float, known: Known, name: str) -> None:
        """
        Ask the replicas' actors for their versions, outside of a sync.

        :raises SyncError: when an actor died or did not answer in time
        """
        run = self._enter(SyncRequest(None, max(seconds, 0.001), None, False, True, None), known, name)
        try:
            await self._within(run, known, lambda: ask_versions(known))
        except BaseException as error:
            await run.abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._leave()

    async def end(self) -> None:
        """Let no further run in, cancel the one under way, and wait until it has come to its end."""
        self.closed = True
        if self._run is not None:
            # What of it reached an actor later would open there again what is closed here.
            self._ended = self._ended or anyio.Event()
            self._run.scope.cancel()
            await self._ended.wait()

    async def _within(self, run: SyncRun, known: Known, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` inside of the run's scope."""
        with run.scope:
            return await work()

        late = f"the deadline of {run.request.deadline} seconds passed"
        await run.abort("the group was closed" if self.closed else late)
        raise self._over(run, known)

    def _enter(self, request: SyncRequest, known: Known, name: str) -> SyncRun:
        if self.closed:
            raise errors.GroupClosed("the group is closed")

        self._run = SyncRun(request, name, known)
        return self._run

    def _leave(self) -> None:
        self._run = None
        if self._ended is not None:
            self._ended.set()

    def _over(self, run: SyncRun, known: Known) -> errors.SyncError:
        """Return the error of a run whose scope was cancelled: by its deadline, or because the group was closed."""
        if not self.closed:
            return run.timeout()

        error = errors.GroupClosed("the group was closed during the sync", version=run.version)
        error.versions = known.versions.by_index()
        return error

    async def _raise_death_behind(self, error: errors.SyncError, run: SyncRun, known: Known) -> None:
        """
        Raise the death of an actor of which ``error`` is what another one saw: its transport may tell sooner than Ray.

        :raises ActorDied: naming who died, with ``error`` as its cause
        """
        seen_by_others = isinstance(error, errors.ActorFailed | errors.SyncAborted)
        if not seen_by_others or error.phase not in ("connect", "transfer") or self.closed:
            return

        with anyio.CancelScope(shield=True):
            dead = await known.actors.find_dead(_DEATH_SECONDS)

        if dead:
            death = errors.ActorDied(f"the actor died: {error.args[0]}", actors=dead, task=error.task)
            death.phase = error.phase
            run.locate(death)
            death.versions = error.versions
            raise death from error
