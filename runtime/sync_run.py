"""One sync, phase by phase: what the driver asks of the actors, and what it makes of their answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import anyio

from wavecast.runtime import errors
from wavecast.runtime.ahead import BeginsAhead, expected, may_close
from wavecast.runtime.commit import CommitPhase
from wavecast.runtime.integrity import compare_checksums, own_code_failed, validate
from wavecast.runtime.known import Known
from wavecast.runtime.opening import ask_to_begin, ask_versions, head_starts, hear_begins, note_begins
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.report import HookSeconds, SyncReport
from wavecast.runtime.reporting import make_report
from wavecast.runtime.request import SyncRequest
from wavecast.runtime.stopwatch import Stopwatch
from wavecast.runtime.transfer.comm import Deadline
from wavecast.runtime.transfer.messages import Began, RunId
from wavecast.runtime.transferring import TransferPhase
from wavecast.runtime.undisturbed import undisturbed
from wavecast.scheduler import RunReport, RunTimeout, Task, TaskFailed, TaskTimeout

__all__ = ("SyncRun",)

#: After the deadline: to end what is running on the actors.
_ABORT_SECONDS = 0.5
_PRECEDENCE_SECONDS = 0.1
#: How much later than a step's the failure of a begin may come that is its cause.
_BEGIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class _Moved:
    """
    A run whose bytes have arrived.

    :ivar began: what each actor said at its begin
    :ivar since: when the first byte may have left
    """

    began: list[Began]
    preparation: Preparation
    outcome: RunReport
    since: float
    planned: bool = False
    connected: bool = False


class SyncRun:
    """
    One sync under way.

    :param group: the group's unguessable name
    :ivar scope: ends the sync at its deadline; entered by the caller
    :ivar touched: destination actors that tasks have been dispatched to
    :ivar version: the one on its way, once it is known
    """

    def __init__(self, request: SyncRequest, group: str, known: Known) -> None:
        self.request = request
        self.watch = Stopwatch()
        self.scope = anyio.CancelScope(deadline=anyio.current_time() + request.seconds_left)
        self.touched: set[int] = set()
        self.version: int | None = request.version
        self._group = group
        self._known = known
        self._options: SyncOptions = known.options
        self._actors = known.actors
        self._sources = known.sources
        self._connection = known.connection
        self._deadline = Deadline(request.seconds_left)
        self._owing: tuple[int, ...] = ()
        self._preparation: Preparation | None = None
        self._commit: CommitPhase | None = None
        self._start_over()

    def _start_over(self) -> None:
        """Go on as another run."""
        # By the clock: also a driver that was started anew comes after the one before.
        self._name = RunId(self._group, time.time_ns())
        self._aborting: asyncio.Future[None] | None = None
        self._moving = TransferPhase(self._actors, self._name, self._options, self._deadline, self.touched)

    async def run(self) -> SyncReport:
        """
        Go through all phases.

        :raises SyncError: the class that fits
        """
        moved = await self._run_ahead() or await self._run_in_order()
        if not self.request.dry_run:
            with self.watch.measure("verify"):
                await self._verify(moved.preparation)

        with self.watch.measure("commit"):
            hooks = await self._commit_everywhere(moved)

        return self._report(moved, hooks)

    async def _run_in_order(self) -> _Moved:
        """Begin, plan and connect what has changed, and transfer: each once the one before is through."""
        known, watch = self._known, self.watch
        with watch.measure("describe"):
            began = await self._open()
            await known.learn_layouts(self._name, began)

        preparation, planned, connected = await self._make_ready(began)
        self._preparation = preparation
        since = time.perf_counter()
        outcome = RunReport(0.0, ())
        if not self.request.dry_run:
            with watch.measure("transfer"):
                outcome = await self._transfer(preparation)

        return _Moved(began, preparation, outcome, since, planned, connected)

    async def _verify(self, preparation: Preparation) -> None:
        if self._options.checksum:
            compare_checksums(self._moving.finished, preparation)

        if self.request.validate:
            await validate(self._actors, self._name, preparation, self.request.progress)

    async def _commit_everywhere(self, moved: _Moved) -> HookSeconds:
        communicators, memory = self._connection.to_release(self._options)
        if communicators or memory:
            await self._connection.release(self._name, communicators=communicators, memory=memory)

        # In place the bytes are there already: who has them all may as well say so.
        in_shadow = self._options.staging == "shadow"
        voters = range(self._sources, len(self._actors)) if in_shadow else ()
        self._commit = CommitPhase(
            self._actors, self._name, moved.began, self.request.dry_run, voters, self._moving.closed
        )
        return await self._commit.go_through(self._versions_to_commit())

    async def _run_ahead(self) -> _Moved | None:
        """
        Begin and transfer at once; return nothing where that cannot be, or the actors turn out to hold other layouts.

        Of a run that is not to be nothing is left when this returns.

        :raises SyncError: the failure of the begin, if there was one, else that of the transfer
        """
        preparation = self._preparation = expected(self._known, self.request)
        if preparation is None:
            return None

        self.version = self._known.versions.next(self.request.version)
        since = time.perf_counter()
        with self.watch.measure("transfer"):
            begins, outcome, failure = await self._begin_and_transfer(preparation)

        if outcome is not None and begins.fit:
            return _Moved(begins.began, preparation, outcome, since)

        # A step of other layouts fails by itself, and may do so long before its peers say that they begin.
        changed = bool(begins.began) and not begins.fit
        if failure is not None and not (isinstance(failure, errors.LayoutError) or changed):
            raise failure

        await self.abort("the actors hold other layouts than the last time")
        self._start_over()
        return None

    async def _begin_and_transfer(
        self, preparation: Preparation
    ) -> tuple[BeginsAhead, RunReport | None, errors.SyncError | None]:
        """
        Return what the actors said, what became of the transfer, and why the run cannot stand.

        :raises SyncError: the failure of a begin: it tells more than a step's
        """
        known, request = self._known, self.request
        closing = self._versions_to_commit() if may_close(known, request, preparation) else None
        starts = head_starts(known, preparation, self._name, closing, seconds=self._deadline.left)
        # The begins leave first, and at once: an actor takes its calls in the order in which they were sent. The first
        # steps go with them, whatever becomes of the next begin.
        self.touched.update(actor for actor, start in enumerate(starts) if start.ahead and actor >= known.sources)
        stopping = anyio.CancelScope()
        begins = BeginsAhead(
            self._actors,
            ask_to_begin(known, self._name, self.version, request, starts),
            note=lambda replies: note_begins(known, self.version, request, replies),
            fits=lambda began: self._fits(began, preparation),
            stop=stopping.cancel,
        )
        outcome: RunReport | None = None
        failure: errors.SyncError | None = None
        try:
            with stopping:
                try:
                    outcome = await self._transfer(preparation)
                except errors.SyncError as error:
                    failure = error
                    # What failed may be a begin, which then tells more.
                    with anyio.move_on_after(_BEGIN_SECONDS):
                        await begins.wait()

            if failure is None:
                await begins.wait()
        finally:
            begins.hear_no_more()

        if begins.refusal is not None:
            raise begins.refusal

        if closing is not None and outcome is not None:
            # Who has nothing to do has no step whose answer could tell.
            idle = (actor for actor, program in enumerate(preparation.programs) if not program.steps)
            self._moving.closed.update(idle)

        return begins, outcome, failure or begins.given_up

    def _fits(self, began: list[Began], preparation: Preparation) -> bool:
        """Tell whether the actors are as they were when ``preparation`` was made, where they were, and not ahead."""
        return (
            len(began) == len(self._actors)
            and not self._overtaken()
            and self._known.holds_for(began)
            and self._connection.knows(preparation, [reply.addresses for reply in began])
        )

    def _overtaken(self) -> bool:
        """Tell whether an actor has said meanwhile that a replica is at this version already, or behind it."""
        newest, version = self._known.versions.newest, self.version
        if newest is None or version is None:
            return False

        return version < newest or (self.request.version is None and version == newest)

    def settle(self) -> None:
        """
        Note which replicas have which version now, however the run ended.

        One that all of its actors have committed has the new version. One that was being written to is torn; in shadow
        that is one of whose actors not all are known to have committed or not.
        """
        versions, version = self._known.versions, self.version
        if version is None or self.request.dry_run:
            return

        commit = self._commit
        committed = self._moving.closed.union(commit.committed if commit is not None else ())
        flipping = commit is not None and commit.started
        for index, replica in enumerate(self._known.replicas):
            if all(actor in committed for actor in replica):
                if self._makes_whole(index):
                    versions.take_on(index, version)
            elif not self.touched.isdisjoint(replica) and (self._options.staging == "in_place" or flipping):
                versions.tear(index, version)

    def locate(self, error: errors.SyncError) -> None:
        """Say in ``error`` what the run knows and the actor did not: phase, version, wave and tensor."""
        error.phase = error.phase or self.watch.phase
        error.version = self.version
        if error.task is None or self._preparation is None:
            return

        error.tasks = error.tasks or (error.task,)
        for number, wave in enumerate(self._preparation.schedule.waves):
            if any(task.id == error.task for task in wave.tasks):
                error.wave = number

        for program in self._preparation.programs:
            for step in program.steps:
                if step.task == error.task and not error.tensor:
                    error.tensor = step.cuts[0].tensor

    async def abort(self, reason: str) -> None:
        """End what is left of the sync on all actors, once, within the grace time, even if the caller is cancelled."""
        if self._aborting is None:
            self._owing = self._actors.waiting_for()
            self._connection.forget()
            self._aborting = asyncio.ensure_future(self._end_calls(reason))

        await undisturbed(self._aborting)

    async def _end_calls(self, reason: str) -> None:
        with anyio.move_on_after(_ABORT_SECONDS):
            await self._actors.abort(self._name, reason)

    def timeout(self, unfinished: tuple[Task, ...] = ()) -> errors.SyncTimeout:
        """Return the error of a deadline that passed, naming who owed an answer."""
        tasks = f"; {len(unfinished)} tasks were unfinished" if unfinished else ""
        error = errors.SyncTimeout(
            f"the deadline of {self.request.deadline} seconds passed{tasks}",
            phase=self.watch.phase,
            actors=self._owing or tuple(dict.fromkeys(member for task in unfinished[:1] for member in task.members)),
            task=unfinished[0].id if unfinished else None,
        )
        error.tasks = tuple(task.id for task in unfinished)
        return error

    async def _make_ready(self, began: list[Began]) -> tuple[Preparation, bool, bool]:
        """Plan and connect; where a receiver cannot map a sender's memory, once more without."""
        while True:
            with self.watch.measure("plan"):
                preparation, planned = await self._known.prepare(
                    began, self.request.only, from_peer=self.request.from_peer
                )

            try:
                with self.watch.measure("connect"):
                    connected = await self._connection.ensure(
                        preparation,
                        [reply.addresses for reply in began],
                        run=self._name,
                        seconds=lambda: self._deadline.left,
                    )
            except errors.TransportUnavailable as error:
                refused = {pair for pair in preparation.readings if not set(pair).isdisjoint(error.actors)}
                # Asked for NCCL alone, actors still look at each other's boards: without them it takes longer.
                if self._options.transport == "ipc" or not refused:
                    raise

                self._known.refused |= refused
            else:
                return preparation, planned, connected

    async def _open(self) -> list[Began]:
        """
        Settle on a version, begin on all actors, and return what they say.

        At the first contact their versions are asked for before: an earlier driver may have brought them anywhere. One
        that did so since shows at the begin; where the version was left open, the run begins again behind it.

        :raises ConfigError: when the version asked for is older than one that a replica has
        """
        versions = self._known.versions
        if not versions.met:
            await ask_versions(self._known)

        self.version = versions.next(self.request.version)
        began = await self._begin()
        if self._overtaken():
            self._start_over()
            self.version = versions.next(self.request.version)
            began = await self._begin()

        return began

    async def _begin(self) -> list[Began]:
        asked = ask_to_begin(self._known, self._name, self.version, self.request)
        return await hear_begins(self._known, self.version, self.request, asked)

    async def _transfer(self, preparation: Preparation) -> RunReport:
        async def abort(tasks: tuple[Task, ...]) -> None:
            await self.abort(f"task {tasks[0].id} was given up" if tasks else "the run was given up")

        # The run has the same deadline and can say more of it: it goes first.
        self.scope.deadline += _PRECEDENCE_SECONDS
        try:
            return await self._moving.go_through(
                preparation,
                abort,
                abort_seconds=_ABORT_SECONDS + _PRECEDENCE_SECONDS,
                progress=self.request.progress,
            )
        except TaskTimeout as timeout:
            raise errors.SyncTimeout(
                f"task {timeout.task.id} of {timeout.task.nbytes} bytes took longer than it is allowed",
                phase=self.watch.phase,
                actors=self._owing or timeout.task.members,
                task=timeout.task.id,
            ) from timeout
        except TaskFailed as failure:
            raise _from_task(failure) from failure
        except RunTimeout as timeout:
            raise self.timeout(timeout.unfinished) from timeout

    def _versions_to_commit(self) -> dict[int, int | None]:
        """Return what each actor takes on: sources keep what they have, and so do replicas that stay not whole."""
        versions: dict[int, int | None] = dict.fromkeys(range(len(self._actors)))
        for index, replica in enumerate(self._known.replicas):
            if self._makes_whole(index) and not self.request.dry_run:
                versions.update(dict.fromkeys(replica, self.version))

        return versions

    def _makes_whole(self, index: int) -> bool:
        """Tell whether this sync leaves a replica whole: a part of the tensors makes no torn or new one so."""
        return self.request.only is None or isinstance(self._known.versions[index], int)

    def _report(self, moved: _Moved, hooks: HookSeconds) -> SyncReport:
        commit, in_shadow = self._commit, self._options.staging == "shadow"
        pause = time.perf_counter() - moved.since - hooks.before_commit - hooks.after_commit
        if in_shadow:
            pause = commit.flip_seconds if commit is not None else 0.0

        return make_report(
            moved.preparation,
            moved.outcome,
            self._moving.finished.values(),
            self.watch,
            version=self.version or 0,
            dry_run=self.request.dry_run,
            planned=moved.planned,
            connected=moved.connected,
            communicator_bytes=self._connection.communicator_bytes,
            device=moved.began[-1].place.device,
            staging=self._options.staging,
            shadow_bytes=max(reply.shadow_bytes for reply in moved.began),
            pause_seconds=0.0 if self.request.dry_run else pause,
            hooks=hooks,
        )


def _from_task(failure: TaskFailed) -> errors.SyncError:
    cause = failure.__cause__
    if isinstance(cause, errors.SyncError):
        cause.task = failure.task.id
        return cause

    return own_code_failed(failure.task.id, cause)
