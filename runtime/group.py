"""A group keeps inference replicas at the trainers' weights: ``await group.sync()``."""

from __future__ import annotations

import math
import secrets
from types import TracebackType
from typing import Self

import anyio

from wavecast.runtime import errors
from wavecast.runtime.cluster import ActorHandle, RayActors, require_event_loop
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Only
from wavecast.runtime.report import ReplicaVersion, SyncReport
from wavecast.runtime.sync_run import Known, Progress, SyncRequest, SyncRun
from wavecast.runtime.versions import Versions

__all__ = ("ParameterSyncGroup",)

#: To let the actors release what they hold.
_CLOSE_SECONDS = 5.0


class ParameterSyncGroup:
    """
    Brings every replica of ``destination`` to the weights of ``source``.

    Use it as an async context manager on asyncio, or call :meth:`aclose` when done. Actors are numbered in the order
    given: the source's first, then the destination's, replica after replica.

    :param source: the trainers
    :param destination: the inference engines
    :raises ConfigError: when an actor is on both sides
    :raises NotATransferWorker: for an actor whose class does not mix in ``TransferWorker``
    """

    def __init__(self, source: ModelGroup, destination: ModelGroup, options: SyncOptions | None = None) -> None:
        self._options = options or SyncOptions()
        self._name = secrets.token_hex(16)
        self._run: SyncRun | None = None
        self._closed = False
        self._changing = False
        self._versions = Versions(len(destination.replicas))
        self._set_members(source, destination)

    async def __aenter__(self) -> Self:
        require_event_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "syncing" if self._run else "idle"
        replicas = len(self._destination.replicas)
        return f"<ParameterSyncGroup {self._source.name} -> {self._destination.name} x {replicas} [{state}]>"

    # What users call.

    async def sync(
        self,
        version: int | None = None,
        *,
        deadline: float | None = None,
        only: Only = None,
        validate: bool = False,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> SyncReport:
        """
        Bring every replica to the source's weights, and return what was done.

        The source's weights must not change, and the destination's must not be read, until this returns.

        :param version: what the replicas will report; one more than the newest that any of them has when ``None``, an
            earlier driver's included. Never less than the newest
        :param deadline: seconds for the whole call; the options' when ``None``
        :param only: names of the tensors to sync, a predicate over names, or ``"trainable"``: what some source holds
            and none has frozen (see :attr:`Shard.trainable`; buffers are not trained). The caller says by it that the
            rest has not changed: a whole replica takes on the version, one that was torn or new does not
        :param validate: look for NaN at the sources first, and compare every byte of every destination afterwards
        :param dry_run: plan, connect and send programs, but move nothing and commit nothing
        :param progress: called with a receipt as each task finishes
        :raises SyncError: the class that fits, naming phase, task and actors. Replicas that were written to are torn
            then, until a later sync succeeds
        :raises LayoutError: when the layouts cannot be served; nothing was written
        :raises ConfigError: for a version that would go backwards; nothing was written
        """
        require_event_loop()
        self._require_idle()
        seconds = self._seconds(deadline)
        if self._versions.met:
            self._versions.next(version)

        return await self._run_once(SyncRequest(version, seconds, only, validate, dry_run, progress), self._known)

    async def sync_if_due(self, step: int, *, deadline: float | None = None) -> SyncReport | None:
        """Sync to version ``step`` when it is a multiple of ``options.frequency``; return ``None`` when it is not."""
        frequency = self._options.frequency
        if frequency == 0 or step % frequency:
            return None

        return await self.sync(step, deadline=deadline)

    def versions(self) -> dict[int, ReplicaVersion]:
        """
        Return each replica's version: an integer, ``None`` before its first sync, or :class:`Torn`.

        As far as this group knows: actors that an earlier driver has synced are known from the first sync or
        :meth:`refresh` on. A replica has a version only if all of its actors say the same.
        """
        return self._versions.by_index()

    async def refresh(self, *, deadline: float | None = None) -> dict[int, ReplicaVersion]:
        """
        Ask the actors for their versions and return them by replica, as :meth:`versions` does from then on.

        Changes nothing on the actors and calls no code of the user's. Needed by nobody who syncs: the first sync asks
        by itself.

        :param deadline: seconds for the whole call; the options' when ``None``
        :raises SyncError: when an actor died or did not answer in time
        """
        require_event_loop()
        self._require_idle()
        request = SyncRequest(None, self._seconds(deadline), None, False, True, None)
        run = self._run = SyncRun(request, self._name, self._known, self._options)
        try:
            with run.scope:
                await run.ask_versions()
                return self.versions()

            raise run.timeout()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await run.abort(f"{type(error).__name__}: {error}")

            raise
        finally:
            self._run = None

    async def replace(self, dead: ActorHandle, fresh: ActorHandle) -> None:
        """Put ``fresh`` in the place of ``dead``; it gets its weights at the next sync."""
        self._require_idle()
        found = False
        groups: list[ModelGroup] = []
        for group in (self._source, self._destination):
            replicas = [[fresh if actor == dead else actor for actor in replica] for replica in group.replicas]
            found = found or dead in group.actors
            groups.append(ModelGroup(group.name, replicas))

        if not found:
            raise errors.ConfigError(f"actor {dead!r} is not in this group")

        concerned = [index for index, replica in enumerate(self._destination.replicas) if dead in replica]
        await self._change_members(*groups)
        for index in concerned:
            self._versions.renew(index)

    async def add_replica(self, actors: list[ActorHandle]) -> int:
        """Add a replica and return its index; it gets its weights at the next sync."""
        self._require_idle()
        index = len(self._destination.replicas)
        await self._change_members(
            self._source, ModelGroup(self._destination.name, (*self._destination.replicas, actors))
        )
        self._versions.add()
        return index

    async def remove_replica(self, index: int) -> None:
        """Take a replica out of the group; those after it move up by one."""
        self._require_idle()
        replicas = list(self._destination.replicas)
        if not 0 <= index < len(replicas):
            raise errors.ConfigError(f"there is no replica {index}, the group has {len(replicas)}")

        del replicas[index]
        await self._change_members(self._source, ModelGroup(self._destination.name, replicas))
        self._versions.remove(index)

    async def aclose(self) -> None:
        """Let the actors release communicators, programs and staging memory. Bounded; may be called again."""
        if self._closed:
            return

        require_event_loop()
        self._closed = True
        await self._release(self._known.actors)

    # One sync.

    async def _run_once(self, request: SyncRequest, known: Known) -> SyncReport:
        """Run one sync to its end, whatever that is: when this returns or raises, nothing of it is left running."""
        sync = self._run = SyncRun(request, self._name, known, self._options)
        try:
            with sync.scope:
                report = await sync.run()
                sync.settle()
                return report

            await sync.abort(f"the deadline of {request.deadline} seconds passed")
            raise sync.timeout()
        except BaseException as error:
            sync.settle()
            with anyio.CancelScope(shield=True):
                await sync.abort(f"{type(error).__name__}: {error}")

            if self._closed and isinstance(error, errors.SyncAborted):
                closed = errors.GroupClosed("the group was closed during the sync", version=sync.version)
                closed.versions = self._versions.by_index()
                raise closed from error

            if isinstance(error, errors.SyncError):
                sync.locate(error)
                error.versions = self._versions.by_index()

            raise
        finally:
            self._run = None

    def _seconds(self, deadline: float | None) -> float:
        seconds = self._options.deadline_seconds if deadline is None else deadline
        if not (seconds > 0 and math.isfinite(seconds)):
            raise errors.ConfigError(f"deadline is {seconds!r}, it must be positive and finite")

        return seconds

    # Members.

    def _set_members(self, source: ModelGroup, destination: ModelGroup) -> None:
        actors = RayActors((*source.actors, *destination.actors))
        both = [actor for actor in source.actors if actor in destination.actors]
        if both:
            raise errors.ConfigError(
                f"actor {both[0]!r} is in {source.name!r} and in {destination.name!r}; "
                "a trainer and an engine that share a GPU are two actors"
            )

        self._source = source
        self._destination = destination
        self._known = Known(actors, len(source.actors), _numbered(source, destination), self._versions)

    async def _change_members(self, source: ModelGroup, destination: ModelGroup) -> None:
        before = self._known.actors
        self._set_members(source, destination)
        self._changing = True
        try:
            await self._release(before)
        finally:
            self._changing = False

    async def _release(self, actors: RayActors) -> None:
        """Close every actor's end; those that are dead or stuck are left to their own end."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
            await actors.close_all(self._name)

    def _require_idle(self) -> None:
        if self._closed:
            raise errors.GroupClosed("the group is closed")

        if self._changing:
            raise errors.SyncInProgress("the group's members are being changed")

        if self._run is not None:
            raise errors.SyncInProgress(
                f"a sync to version {self._run.version} is under way", version=self._run.version
            )


def _numbered(source: ModelGroup, destination: ModelGroup) -> tuple[range, ...]:
    """Return the numbers of the actors of each of the destination's replicas."""
    start = len(source.actors)
    ranges: list[range] = []
    for replica in destination.replicas:
        ranges.append(range(start, start + len(replica)))
        start += len(replica)

    return tuple(ranges)
