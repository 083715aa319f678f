"""A group keeps inference replicas at the trainers' weights: ``await group.sync()``."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self

import anyio

from wavecast.runtime import errors
from wavecast.runtime.cluster import ActorHandle, RayActors, require_event_loop
from wavecast.runtime.lineup import Lineup
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.report import ReplicaVersion, SyncReport
from wavecast.runtime.request import Progress, SyncRequest
from wavecast.runtime.runner import Runner
from wavecast.runtime.selection import Only
from wavecast.runtime.turns import Turns
from wavecast.runtime.undisturbed import undisturbed

__all__ = ("ParameterSyncGroup",)

#: To let the actors release what they hold.
_CLOSE_SECONDS = 5.0
#: The same, for what is left of a lost replica while a sync waits to go on.
_DROP_SECONDS = 0.2
#: To learn who is dead: Ray says it of a dead actor at once.
_LOOK_SECONDS = 1.0

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
        self._lineup = Lineup(source, destination, self._options)
        self._turns = Turns(self._options.when_busy)
        self._runner = Runner()
        self._closing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        require_event_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._runner.closed else "syncing" if self._runner.busy else "idle"
        source, destination = self._lineup.members.source, self._lineup.members.destination
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
        :param progress: called with a receipt as each task finishes; with ``validate`` once more, with a
            :class:`ValidationReceipt`, as each has been compared. A call that is served by another's sync hears nothing
        :raises SyncError: the class that fits, naming phase, task and actors. Replicas that were written to are torn
            then, until a later sync succeeds
        :raises LayoutError: when the layouts cannot be served; nothing was written
        :raises ConfigError: for a version that is no integer, negative or would go backwards; nothing was written
        """
        self._require_open()
        _check_version(version)
        seconds = self._seconds(deadline)
        called = time.monotonic()
        asked = SyncRequest(version, seconds, only, validate, dry_run, progress)
        caller = self._turns.arrive(asked)
        async with self._turns.turn(caller, seconds):
            if caller.report is not None:
                return caller.report

            request = replace(self._turns.gather(asked), waited=time.monotonic() - called)
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
        return self._lineup.versions.by_index()

    async def refresh(self, *, deadline: float | None = None) -> dict[int, ReplicaVersion]:
        """
        Ask the actors for their versions and return them by replica, as :meth:`versions` does from then on.

        Changes nothing on the actors and calls no code of the user's. Needed by nobody who syncs: the first sync asks
        by itself.

        :param deadline: seconds for the whole call; the options' when ``None``
        :raises SyncError: when an actor died or did not answer in time
        """
        self._require_open()
        seconds = self._seconds(deadline)
        async with self._turns.turn(self._turns.arrive(None), seconds):
            await self._runner.ask_versions(seconds, self._lineup.known, self._name)
            return self.versions()

    async def replace(self, dead: ActorHandle, fresh: ActorHandle, *, deadline: float | None = None) -> None:
        """
        Put ``fresh`` in the place of ``dead``; it gets its weights at the next sync, or by :meth:`sync_replica`.

        What is known of the others, their versions and layouts, is kept; communicators are made anew.

        :param deadline: seconds to wait for syncs under way; the options' when ``None``
        :raises ConfigError: when ``dead`` is not in this group
        :raises SyncTimeout: when the deadline passed behind a sync; nothing has changed
        """
        self._require_open()
        async with self._turns.turn(self._turns.arrive(None), self._seconds(deadline)):
            await self._let_go(self._lineup.replace(dead, fresh), _CLOSE_SECONDS)

    async def add_replica(
        self, actors: Sequence[ActorHandle], *, catch_up: CatchUp = "next", deadline: float | None = None
    ) -> int:
        """
        Add a replica and return its index.

        :param catch_up: ``"next"``: it gets its weights at the next sync; ``"peer"``, ``"trainer"``: now, from there,
            as by :meth:`sync_replica`. When that fails the replica stays in the group
        :param deadline: seconds for the whole call; the options' when ``None``
        :raises SyncTimeout: when the deadline passed behind a sync; nothing has changed
        :raises SyncError: when catching up failed
        """
        self._require_open()
        _check_choice("catch_up", catch_up, ("next", "peer", "trainer"))
        seconds = self._seconds(deadline)
        ends = anyio.current_time() + seconds
        async with self._turns.turn(self._turns.arrive(None), seconds):
            index = self._lineup.add(actors)
            if catch_up != "next":
                await self._catch_up(index, catch_up, seconds, waited=anyio.current_time() - ends + seconds)

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
        self._require_open()
        _check_choice("source", source, ("peer", "trainer"))
        seconds = self._seconds(deadline)
        ends = anyio.current_time() + seconds
        async with self._turns.turn(self._turns.arrive(None), seconds):
            return await self._catch_up(index, source, seconds, waited=anyio.current_time() - ends + seconds)

    async def remove_replica(self, index: int, *, deadline: float | None = None) -> None:
        """
        Take a replica out of the group; those after it move up by one.

        :param deadline: seconds to wait for syncs under way; the options' when ``None``
        :raises ConfigError: when there is no such replica, and for the last one
        :raises SyncTimeout: when the deadline passed behind a sync; nothing has changed
        """
        self._require_open()
        async with self._turns.turn(self._turns.arrive(None), self._seconds(deadline)):
            await self._let_go(self._lineup.remove((index,)), _CLOSE_SECONDS)

    async def aclose(self) -> None:
        """
        Let the actors release communicators, programs and staging memory. Bounded; may be called again.

        A sync under way ends in :class:`GroupClosed`, and so do those that wait for their turn. Whoever is cancelled
        here is so once the group is closed.
        """
        require_event_loop()
        if self._closing is None:
            self._runner.closed = True
            self._turns.close()
            self._closing = asyncio.ensure_future(self._close())

        await undisturbed(self._closing)

    async def _close(self) -> None:
        with anyio.move_on_after(_CLOSE_SECONDS):
            await self._runner.end()

        await _release(self._lineup.known.actors, self._name, _CLOSE_SECONDS)

    # A sync, and what the options forgive.

    async def _until_done(self, request: SyncRequest) -> SyncReport:
        """Run a sync, and again after what the options forgive, within its one deadline."""
        lineup = self._lineup
        if lineup.versions.met:
            lineup.versions.next(request.version)

        ends = time.monotonic() + request.seconds_left
        retries, attempts = self._options.retries, 1
        indices = list(range(len(lineup.versions)))
        before = tuple(indices)
        forgiven: errors.SyncError | None = None
        while True:
            try:
                report = await self._runner.sync(request, lineup.known, self._name)
                break
            except errors.LayoutError as error:
                if forgiven is not None:
                    raise error from forgiven

                raise
            except errors.SyncError as error:
                left = ends - time.monotonic()
                if self._runner.closed or left <= 0:
                    raise

                if isinstance(error, errors.ChecksumMismatch) and retries:
                    retries -= 1
                elif not await self._plan_around(error, min(left, _LOOK_SECONDS), indices):
                    raise

                forgiven, attempts = error, attempts + 1
                version = error.version if request.version is None else request.version
                request = replace(request, version=version, waited=request.deadline - (ends - time.monotonic()))

        dropped, lost = tuple(index for index in before if index not in indices), len(lineup.members.lost)
        if attempts == 1 and not lost and not dropped:
            return report

        return replace(report, attempts=attempts, dropped=dropped, lost_trainers=lost)

    async def _plan_around(self, error: errors.SyncError, seconds: float, indices: list[int]) -> bool:
        """
        Find who died and take them out of the group as far as the options allow; tell whether that was done.

        :param indices: of the replicas that are left, by what they were when the call began; kept up to date
        """
        options, known = self._options, self._lineup.known
        if options.on_lost_replica == "raise" and options.on_lost_trainer == "raise":
            return False

        dead = set(await known.actors.find_dead(seconds))
        if isinstance(error, errors.ActorDied):
            dead.update(error.actors)

        trainers = [known.actors.handles[actor] for actor in sorted(dead) if actor < known.sources]
        replicas = [index for index, replica in enumerate(known.replicas) if not dead.isdisjoint(replica)]
        refused = (trainers and options.on_lost_trainer == "raise") or (replicas and options.on_lost_replica == "raise")
        left_over = len(trainers) < known.sources and len(replicas) < len(known.replicas)
        if not dead or refused or not left_over:
            return False

        gone = self._lineup.remove(replicas, around=trainers)
        for index in reversed(replicas):
            del indices[index]

        await self._let_go(gone, _DROP_SECONDS)
        return True

    async def _catch_up(
        self, index: int, source: Literal["peer", "trainer"], seconds: float, *, waited: float = 0.0
    ) -> SyncReport:
        """Sync one replica alone, from a peer or from the trainers, by a run over just these actors."""
        versions = self._lineup.versions
        if versions.newest is None and not versions.met:
            await self._runner.ask_versions(seconds - waited, self._lineup.known, self._name)

        version = versions.newest
        if version is None:
            raise errors.ConfigError("no replica has a version yet: there is nothing to catch up with")

        known, numbers = self._lineup.one_replica(index, source, version)
        name = secrets.token_hex(16)
        request = SyncRequest(version, seconds, None, False, False, None, waited, source == "peer")
        try:
            return await self._runner.sync(request, known, name)
        except errors.SyncError as error:
            error.actors = tuple(numbers[actor] for actor in error.actors)
            error.versions = {**versions.by_index(), index: known.versions[0]}
            raise
        finally:
            versions.set(index, known.versions[0])
            await undisturbed(_release(known.actors, name, _DROP_SECONDS))

    async def _let_go(self, gone: RayActors, seconds: float) -> None:
        """Let those who left release what they hold, also when the caller is cancelled: the change is made."""
        await undisturbed(_release(gone, self._name, seconds))

    def _seconds(self, deadline: float | None) -> float:
        seconds = self._options.deadline_seconds if deadline is None else deadline
        sound = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (sound and seconds > 0 and math.isfinite(seconds)):
            raise errors.ConfigError(f"deadline is {seconds!r}, it must be positive and finite")

        return seconds

    def _require_open(self) -> None:
        require_event_loop()
        if self._runner.closed:
            raise errors.GroupClosed("the group is closed")


async def _release(actors: RayActors, name: str, seconds: float) -> None:
    """Close every actor's end; those that are dead or stuck are left to their own end."""
    with anyio.move_on_after(seconds):
        await actors.close_all(name)


def _check_version(version: int | None) -> None:
    if version is not None and (type(version) is not int or version < 0):
        raise errors.ConfigError(f"version is {version!r}, it must be a whole number and not negative")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise errors.ConfigError(f"{name} is {value!r}, it must be {' or '.join(choices)}")
