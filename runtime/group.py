"""A group keeps inference replicas at the trainers' weights: ``await group.sync()``."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self

import anyio

from wavecast.runtime import errors
from wavecast.runtime.cluster import ActorHandle, RayActors, require_event_loop
from wavecast.runtime.known import Known
from wavecast.runtime.members import Members
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.opening import ask_versions
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Only
from wavecast.runtime.report import ReplicaVersion, SyncReport
from wavecast.runtime.request import Progress, SyncRequest
from wavecast.runtime.sync_run import SyncRun
from wavecast.runtime.turns import Turns
from wavecast.runtime.versions import Versions

__all__ = ("ParameterSyncGroup",)

#: To let the actors release what they hold.
_CLOSE_SECONDS = 5.0
#: The same, for what is left of a lost replica while a sync waits to go on.
_DROP_SECONDS = 0.2
#: To learn who is dead: Ray says it of a dead actor at once.
_LOOK_SECONDS = 1.0
#: The same, before a failure is told: Ray has had the time of the abort to find out.
_DEATH_SECONDS = 0.1

CatchUp = Literal["next", "peer", "trainer"]


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
        self._ended = anyio.Event()
        self._closed = False
        self._turns = Turns(self._options.when_busy)
        self._versions = Versions(len(destination.replicas))
        RayActors((*source.actors, *destination.actors))
        self._members = Members(source, destination)
        self._known = self._know(self._members)

    async def __aenter__(self) -> Self:
        require_event_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "syncing" if self._run else "idle"
        source, destination = self._members.source, self._members.destination
        return f"<ParameterSyncGroup {source.name} -> {destination.name} x {len(destination.replicas)} [{state}]>"

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
        self._require_open()
        seconds = self._seconds(deadline)
        called = anyio.current_time()
        asked = SyncRequest(version, seconds, only, validate, dry_run, progress)
        caller = self._turns.arrive(asked)
        async with self._turns.turn(caller, seconds):
            if caller.report is not None:
                return caller.report

            request = replace(self._turns.gather(asked), waited=anyio.current_time() - called)
            report = await self._until_done(request)
            self._turns.share(report)
            return report

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
        self._require_open()
        seconds = self._seconds(deadline)
        async with self._turns.turn(self._turns.arrive(None), seconds):
            await self._ask_versions(seconds)
            return self.versions()

    async def replace(self, dead: ActorHandle, fresh: ActorHandle) -> None:
        """
        Put ``fresh`` in the place of ``dead``; it gets its weights at the next sync, or by :meth:`sync_replica`.

        What is known of the others, their versions and layouts, is kept; communicators are made anew.

        :raises ConfigError: when ``dead`` is not in this group
        """
        self._require_open()
        async with self._turns.turn(self._turns.arrive(None)):
            replicas = self._members.destination.replicas
            concerned = [index for index, replica in enumerate(replicas) if dead in replica]
            await self._change(self._members.replaced(dead, fresh), _CLOSE_SECONDS)
            for index in concerned:
                self._versions.renew(index)

    async def add_replica(
        self, actors: Sequence[ActorHandle], *, catch_up: CatchUp = "next", deadline: float | None = None
    ) -> int:
        """
        Add a replica and return its index.

        :param catch_up: ``"next"``: it gets its weights at the next sync; ``"peer"``, ``"trainer"``: now, from there,
            as by :meth:`sync_replica`. When that fails the replica stays in the group
        :param deadline: seconds for catching up; the options' when ``None``
        """
        self._require_open()
        _check_choice("catch_up", catch_up, ("next", "peer", "trainer"))
        async with self._turns.turn(self._turns.arrive(None)):
            index = len(self._members.destination.replicas)
            await self._change(self._members.with_replica(actors), _CLOSE_SECONDS)
            self._versions.add()
            if catch_up != "next":
                await self._catch_up(index, catch_up, self._seconds(deadline))

            return index

    async def sync_replica(
        self, index: int, *, source: Literal["peer", "trainer"] = "peer", deadline: float | None = None
    ) -> SyncReport:
        """
        Bring one replica to the newest version that the group has; the others are left alone.

        Over a connection of its own, which is made and released in the call.

        :param source: ``"peer"``: copied from the first replica that has the version; trainers are not asked and may be
            busy, and the peer may go on reading its weights. ``"trainer"``: from the trainers; the caller says by it
            that their weights are still those of the version
        :param deadline: seconds for the whole call; the options' when ``None``
        :raises ConfigError: when there is no such replica, no version yet, or no peer that has it
        :raises SyncError: as :meth:`sync`
        """
        require_event_loop()
        self._require_open()
        _check_choice("source", source, ("peer", "trainer"))
        seconds = self._seconds(deadline)
        ends = anyio.current_time() + seconds
        async with self._turns.turn(self._turns.arrive(None), seconds):
            return await self._catch_up(index, source, seconds, waited=anyio.current_time() - ends + seconds)

    async def remove_replica(self, index: int) -> None:
        """
        Take a replica out of the group; those after it move up by one.

        :raises ConfigError: when there is no such replica, and for the last one
        """
        self._require_open()
        async with self._turns.turn(self._turns.arrive(None)):
            await self._change(self._members.without_replicas((index,)), _CLOSE_SECONDS)
            self._versions.remove(index)

    async def aclose(self) -> None:
        """
        Let the actors release communicators, programs and staging memory. Bounded; may be called again.

        A sync under way ends in :class:`GroupClosed`, and so do those that wait for their turn.
        """
        if self._closed:
            return

        require_event_loop()
        self._closed = True
        self._turns.close()
        if self._run is not None:
            # What of it reached an actor later would open there again what is closed here.
            self._run.scope.cancel()
            with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
                await self._ended.wait()

        await self._release(self._known.actors, self._name, _CLOSE_SECONDS)

    # A sync, and what the options forgive.

    async def _until_done(self, request: SyncRequest) -> SyncReport:
        """Run a sync, and again after what the options forgive, within its one deadline."""
        if self._versions.met:
            self._versions.next(request.version)

        ends = anyio.current_time() + request.seconds_left
        retries, attempts = self._options.retries, 1
        indices = list(range(len(self._versions)))
        before = tuple(indices)
        forgiven: errors.SyncError | None = None
        while True:
            try:
                report = await self._run_once(request, self._known, self._name)
                break
            except errors.LayoutError as error:
                if forgiven is not None:
                    raise error from forgiven

                raise
            except errors.SyncError as error:
                left = ends - anyio.current_time()
                if self._closed or left <= 0:
                    raise

                if isinstance(error, errors.ChecksumMismatch) and retries:
                    retries -= 1
                elif not await self._plan_around(error, min(left, _LOOK_SECONDS), indices):
                    raise

                forgiven, attempts = error, attempts + 1
                version = error.version if request.version is None else request.version
                request = replace(request, version=version, waited=request.deadline - (ends - anyio.current_time()))

        return replace(
            report,
            attempts=attempts,
            dropped=tuple(index for index in before if index not in indices),
            lost_trainers=len(self._members.lost),
        )

    async def _plan_around(self, error: errors.SyncError, seconds: float, indices: list[int]) -> bool:
        """
        Find who died and take them out of the group as far as the options allow; tell whether that was done.

        :param indices: of the replicas that are left, by what they were when the call began; kept up to date
        """
        options, members = self._options, self._members
        if options.on_lost_replica == "raise" and options.on_lost_trainer == "raise":
            return False

        dead = set(await self._known.actors.find_dead(seconds))
        if isinstance(error, errors.ActorDied):
            dead.update(error.actors)

        trainers = [members.actors[actor] for actor in sorted(dead) if actor < self._known.sources]
        replicas = [index for index, replica in enumerate(self._known.replicas) if not dead.isdisjoint(replica)]
        refused = (trainers and options.on_lost_trainer == "raise") or (replicas and options.on_lost_replica == "raise")
        left_over = len(trainers) < self._known.sources and len(replicas) < len(self._known.replicas)
        if not dead or refused or not left_over:
            return False

        await self._change(members.around(trainers).without_replicas(replicas), _DROP_SECONDS)
        for index in reversed(replicas):
            self._versions.remove(index)
            del indices[index]

        return True

    async def _catch_up(
        self, index: int, source: Literal["peer", "trainer"], seconds: float, *, waited: float = 0.0
    ) -> SyncReport:
        """Sync one replica alone, from a peer or from the trainers, by a run over just these actors."""
        if self._versions.newest is None and not self._versions.met:
            await self._ask_versions(seconds - waited)

        version = self._versions.newest
        if version is None:
            raise errors.ConfigError("no replica has a version yet: there is nothing to catch up with")

        numbers = self._source_of(index, source, version)
        replica = self._known.replicas[index]
        handles = self._known.actors.handles
        actors = RayActors([handles[actor] for actor in (*numbers, *replica)])
        start = len(numbers)
        source_names, own_names = self._known.names
        names = (own_names if source == "peer" else source_names, own_names)
        known = Known(actors, start, (range(start, start + len(replica)),), Versions(1), self._options, names=names)
        known.layouts = dict(self._known.layouts)
        known.versions.set(0, self._versions[index])
        name = secrets.token_hex(16)
        request = SyncRequest(version, seconds, None, False, False, None, waited, source == "peer")
        try:
            return await self._run_once(request, known, name)
        except errors.SyncError as error:
            error.actors = tuple((*numbers, *replica)[actor] for actor in error.actors)
            error.versions = {**self._versions.by_index(), index: known.versions[0]}
            raise
        finally:
            self._versions.set(index, known.versions[0])
            await self._release(actors, name, _DROP_SECONDS)

    def _source_of(self, index: int, source: Literal["peer", "trainer"], version: int) -> range:
        """Return the numbers of the actors from which a replica is to catch up."""
        if not 0 <= index < len(self._versions):
            raise errors.ConfigError(f"there is no replica {index}, the group has {len(self._versions)}")

        if source == "trainer":
            return range(self._known.sources)

        for peer, replica in enumerate(self._known.replicas):
            if peer != index and self._versions[peer] == version:
                return replica

        raise errors.ConfigError(f"no other replica has version {version}, there is no peer to copy it from")

    # One sync.

    async def _run_once(self, request: SyncRequest, known: Known, name: str) -> SyncReport:
        """Run one sync to its end, whatever that is: when this returns or raises, nothing of it is left running."""
        sync = self._enter(request, known, name)
        try:
            with sync.scope:
                report = await sync.run()
                sync.settle()
                return report

            await sync.abort(self._why_over(sync))
            raise self._over(sync)
        except BaseException as error:
            sync.settle()
            with anyio.CancelScope(shield=True):
                await sync.abort(f"{type(error).__name__}: {error}")

            if isinstance(error, errors.SyncError):
                sync.locate(error)
                error.versions = self._versions.by_index()
                await self._raise_death_behind(error, sync, known)

            if self._closed and isinstance(error, errors.SyncAborted):
                raise self._over(sync) from error

            raise
        finally:
            self._leave()

    async def _raise_death_behind(self, error: errors.SyncError, sync: SyncRun, known: Known) -> None:
        """
        Raise the death of an actor of which ``error`` is what another one saw: its transport may tell sooner than Ray.

        :raises ActorDied: naming who died, with ``error`` as its cause
        """
        seen_by_others = isinstance(error, errors.ActorFailed | errors.SyncAborted)
        if not seen_by_others or error.phase not in ("connect", "transfer") or self._closed:
            return

        with anyio.CancelScope(shield=True):
            dead = await known.actors.find_dead(_DEATH_SECONDS)

        if dead:
            death = errors.ActorDied(f"the actor died: {error.args[0]}", actors=dead, task=error.task)
            death.phase = error.phase
            sync.locate(death)
            death.versions = error.versions
            raise death from error

    async def _ask_versions(self, seconds: float) -> None:
        """Ask the replicas' actors for their versions, outside of a sync."""
        request = SyncRequest(None, max(seconds, 0.001), None, False, True, None)
        run = self._enter(request, self._known, self._name)
        try:
            with run.scope:
                await ask_versions(self._known)
                return

            raise self._over(run)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await run.abort(f"{type(error).__name__}: {error}")

            raise
        finally:
            self._leave()

    def _enter(self, request: SyncRequest, known: Known, name: str) -> SyncRun:
        self._require_open()
        self._ended = anyio.Event()
        self._run = SyncRun(request, name, known)
        return self._run

    def _leave(self) -> None:
        self._run = None
        self._ended.set()

    def _why_over(self, run: SyncRun) -> str:
        return "the group was closed" if self._closed else f"the deadline of {run.request.deadline} seconds passed"

    def _over(self, run: SyncRun) -> errors.SyncError:
        """Return the error of a run whose scope was cancelled: by its deadline, or because the group was closed."""
        if not self._closed:
            return run.timeout()

        error = errors.GroupClosed("the group was closed during the sync", version=run.version)
        error.versions = self._versions.by_index()
        return error

    def _seconds(self, deadline: float | None) -> float:
        seconds = self._options.deadline_seconds if deadline is None else deadline
        sound = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (sound and seconds > 0 and math.isfinite(seconds)):
            raise errors.ConfigError(f"deadline is {seconds!r}, it must be positive and finite")

        return seconds

    # Members.

    def _know(self, members: Members) -> Known:
        names = (members.source.names, members.destination.names)
        return Known(
            RayActors(members.actors),
            len(members.trainers),
            members.replicas,
            self._versions,
            self._options,
            names=names,
        )

    async def _change(self, members: Members, seconds: float) -> None:
        """Take on other members: whoever left is let go, the others keep what they hold until it does not fit."""
        known, before = self._know(members), self._known
        known.layouts = before.layouts
        self._members, self._known = members, known
        gone = [actor for actor in before.actors.handles if actor not in members.actors]
        await self._release(RayActors(gone), self._name, seconds)

    async def _release(self, actors: RayActors, name: str, seconds: float) -> None:
        """Close every actor's end; those that are dead or stuck are left to their own end."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(seconds):
            await actors.close_all(name)

    def _require_open(self) -> None:
        if self._closed:
            raise errors.GroupClosed("the group is closed")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise errors.ConfigError(f"{name} is {value!r}, it must be {' or '.join(choices)}")
