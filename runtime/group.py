"""A group keeps inference replicas at the trainers' weights: ``await group.sync()``."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread

from wavecast.runtime import errors
from wavecast.runtime.cluster import ActorHandle, RayActors, require_event_loop
from wavecast.runtime.connection import Connection
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Only, Preparation, choose_transport, prepare, select_names
from wavecast.runtime.report import PhaseSeconds, ReplicaVersion, SyncReport, Torn
from wavecast.runtime.stopwatch import Stopwatch
from wavecast.runtime.transfer.messages import (
    Began,
    Begin,
    Commit,
    Compare,
    Describe,
    Described,
    Done,
    Excerpt,
    Finish,
    Finished,
    Probe,
    RunId,
    RunStep,
    StepDone,
)
from wavecast.scheduler import RunReport, RunTimeout, Task, TaskFailed, TaskReceipt, run

__all__ = ("ParameterSyncGroup",)

#: After the deadline: to end what is running on the actors, and to let go of the rest.
_ABORT_SECONDS = 0.7
_PRECEDENCE_SECONDS = 0.1
_CLOSE_SECONDS = 5.0

Progress = Callable[[TaskReceipt], object]


@dataclass(frozen=True, slots=True)
class _Request:
    """What one call of :meth:`ParameterSyncGroup.sync` asked for."""

    version: int
    deadline: float
    only: Only
    validate: bool
    dry_run: bool
    progress: Progress | None


class _State:
    """One sync under way."""

    def __init__(self, request: _Request, group: str) -> None:
        self.request = request
        # By the clock: also a driver that was started anew comes after the one before.
        self.run = RunId(group, time.time_ns())
        self.watch = Stopwatch()
        self.ends = time.monotonic() + request.deadline
        self.scope = anyio.CancelScope(deadline=anyio.current_time() + request.deadline)
        self.touched: set[int] = set()
        self.owing: tuple[int, ...] = ()
        self.aborted = False

    @property
    def seconds_left(self) -> float:
        return max(self.ends - time.monotonic(), 0.001)


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
        self._state: _State | None = None
        self._closed = False
        self._latest: int | None = None
        self._layouts: dict[str, Layout] = {}
        self._prepared: tuple[tuple[object, ...], Preparation] | None = None
        self._set_members(source, destination)
        self._versions: dict[int, ReplicaVersion] = dict.fromkeys(range(len(destination.replicas)))

    async def __aenter__(self) -> Self:
        require_event_loop()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "syncing" if self._state else "idle"
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

        :param version: what the replicas will report; one more than the last when ``None``. Never less than the last
        :param deadline: seconds for the whole call; the options' when ``None``
        :param only: names of the tensors to sync, or a predicate over names
        :param validate: look for NaN at the sources first, and compare every byte of every destination afterwards
        :param dry_run: plan, connect and send programs, but move nothing and commit nothing
        :param progress: called with a receipt as each task finishes
        :raises SyncError: the class that fits, naming phase, task and actors. Replicas that were written to are torn
            then, until a later sync succeeds
        :raises LayoutError: when the layouts cannot be served; nothing was written
        """
        require_event_loop()
        self._require_idle()
        request = _Request(
            self._next_version(version),
            self._options.deadline_seconds if deadline is None else deadline,
            only,
            validate,
            dry_run,
            progress,
        )
        state = self._state = _State(request, self._name)
        try:
            with state.scope:
                return await self._sync(state)

            await self._abort(state, f"the deadline of {request.deadline} seconds passed")
            raise self._timeout(state)
        except BaseException as error:
            self._mark_torn(state)
            with anyio.CancelScope(shield=True):
                await self._abort(state, f"{type(error).__name__}: {error}")

            if isinstance(error, errors.SyncError):
                error.phase = error.phase or state.watch.phase
                error.version = request.version

            raise
        finally:
            self._state = None

    async def sync_if_due(self, step: int, *, deadline: float | None = None) -> SyncReport | None:
        """Sync to version ``step`` when it is a multiple of ``options.frequency``; return ``None`` when it is not."""
        frequency = self._options.frequency
        if frequency == 0 or step % frequency:
            return None

        return await self.sync(step, deadline=deadline)

    def versions(self) -> dict[int, ReplicaVersion]:
        """Return each replica's version: an integer, ``None`` before its first sync, or :class:`Torn`."""
        return dict(self._versions)

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

        for index, replica in enumerate(self._destination.replicas):
            if dead in replica:
                self._versions[index] = None

        await self._change_members(*groups)

    async def add_replica(self, actors: list[ActorHandle]) -> int:
        """Add a replica and return its index; it gets its weights at the next sync."""
        self._require_idle()
        index = len(self._destination.replicas)
        await self._change_members(
            self._source, ModelGroup(self._destination.name, (*self._destination.replicas, actors))
        )
        self._versions[index] = None
        return index

    async def remove_replica(self, index: int) -> None:
        """Take a replica out of the group; those after it move up by one."""
        self._require_idle()
        replicas = list(self._destination.replicas)
        if not 0 <= index < len(replicas):
            raise errors.ConfigError(f"there is no replica {index}, the group has {len(replicas)}")

        del replicas[index]
        kept = [version for number, version in sorted(self._versions.items()) if number != index]
        await self._change_members(self._source, ModelGroup(self._destination.name, replicas))
        self._versions = dict(enumerate(kept))

    async def aclose(self) -> None:
        """Let the actors release communicators, programs and staging memory. Bounded; may be called again."""
        if self._closed:
            return

        self._closed = True
        await self._release(self._actors)

    # The phases of a sync.

    async def _sync(self, state: _State) -> SyncReport:
        watch, request = state.watch, state.request
        with watch.measure("describe"):
            began = await self._begin(state)

        with watch.measure("plan"):
            preparation, planned = await self._prepare(began, request.only)

        places = [reply.place for reply in began]
        transport = choose_transport(self._options.transport, places)
        with watch.measure("connect"):
            connected = await self._connection.ensure(preparation, transport, run=state.run, seconds=state.seconds_left)

        outcome = RunReport(0.0, ())
        finished: dict[int, Finished] = {}
        if not request.dry_run:
            with watch.measure("transfer"):
                outcome = await self._transfer(state, preparation)

            with watch.measure("verify"):
                finished = await self._finish(state, preparation)
                if request.validate:
                    await self._validate(state, preparation)

        with watch.measure("commit"):
            await self._commit(state)

        return self._report(
            state,
            preparation,
            outcome,
            finished.values(),
            planned=planned,
            connected=connected,
            device=places[-1].device,
        )

    async def _begin(self, state: _State) -> list[Began]:
        """Let all actors read their shards, and fetch each layout that is not known yet from one of its holders."""
        requests = {
            actor: Begin(state.run, actor, scan=state.request.validate and actor < self._sources)
            for actor in range(len(self._actors))
        }
        replies = await self._actors.ask_all(requests, Began)
        for actor, reply in replies.items():
            if reply.nan:
                name, count = reply.nan[0]
                raise errors.ValidationError(
                    f"{len(reply.nan)} source tensors hold NaN; the first is {name!r} with {count} elements",
                    tensor=name,
                    actors=(actor,),
                )

        began = [replies[actor] for actor in range(len(self._actors))]
        holders = {reply.digest: actor for actor, reply in enumerate(began) if reply.digest not in self._layouts}
        described = await self._actors.ask_all(dict.fromkeys(holders.values(), Describe(state.run)), Described)
        for digest, actor in holders.items():
            self._layouts[digest] = await anyio.to_thread.run_sync(described[actor].layout)

        current = {reply.digest for reply in began}
        self._layouts = {digest: layout for digest, layout in self._layouts.items() if digest in current}
        return began

    async def _prepare(self, began: list[Began], only: Only) -> tuple[Preparation, bool]:
        layouts = [replace(self._layouts[reply.digest], place=reply.place) for reply in began]
        sources, destinations = layouts[: self._sources], layouts[self._sources :]
        names = select_names(destinations, only)
        key = (tuple((reply.digest, reply.place) for reply in began), names)
        if self._prepared is not None and self._prepared[0] == key:
            return self._prepared[1], False

        # Planning is plain computing: it leaves the loop, so that the trainer's coroutines go on.
        preparation = await anyio.to_thread.run_sync(
            prepare, sources, destinations, self._options, names, abandon_on_cancel=True
        )
        self._prepared = (key, preparation)
        return preparation, True

    async def _transfer(self, state: _State, preparation: Preparation) -> RunReport:
        async def dispatch(task: Task) -> list[StepDone]:
            state.touched.update(task.receivers)
            refs = [
                self._actors.start(
                    member,
                    RunStep(state.run, preparation.step_of[member][task.id], preparation.digest, state.seconds_left),
                )
                for member in task.members
            ]
            return await self._actors.answers(refs, StepDone)

        async def abort(tasks: tuple[Task, ...]) -> None:
            await self._abort(state, f"task {tasks[0].id} was given up" if tasks else "the run was given up")

        # The run has the same deadline and can say more of it: it goes first.
        state.scope.deadline += _PRECEDENCE_SECONDS
        options = self._options
        try:
            return await run(
                preparation.schedule,
                dispatch,
                lookahead=options.lookahead,
                deadline=state.seconds_left,
                abort=abort,
                in_flight=options.in_flight,
                abort_seconds=_ABORT_SECONDS + _PRECEDENCE_SECONDS,
                on_receipt=state.request.progress,
            )
        except TaskFailed as failure:
            raise _from_task(failure) from failure
        except RunTimeout as timeout:
            raise self._timeout(state, timeout.unfinished) from timeout

    async def _finish(self, state: _State, preparation: Preparation) -> dict[int, Finished]:
        """Wait until all that was written is in place, and compare the sums of both ends."""
        requests = {
            program.actor: Finish(state.run, state.seconds_left) for program in preparation.programs if program.steps
        }
        finished = await self._actors.ask_all(requests, Finished)
        if self._options.checksum:
            _compare_checksums(finished, preparation)

        return finished

    async def _validate(self, state: _State, preparation: Preparation) -> None:
        """Compare, task by task, what receivers hold with what the sender holds, over Ray's object store."""
        for wave in preparation.schedule.waves:
            for task in wave.tasks:
                sender = task.senders[0]
                excerpt = self._actors.start(sender, Probe(state.run, preparation.step_of[sender][task.id]))
                refs = [
                    self._actors.start(
                        receiver, Compare(state.run, preparation.step_of[receiver][task.id]), attachment=excerpt
                    )
                    for receiver in task.receivers
                ]
                replies = await self._actors.answers(refs, Done)
                await self._actors.answer(excerpt, Excerpt)
                for receiver, reply in zip(task.receivers, replies, strict=True):
                    if reply.differing:
                        raise errors.ValidationError(
                            f"a destination differs from its source in {reply.differing[0]}",
                            actors=(sender, receiver),
                            task=task.id,
                        )

    async def _commit(self, state: _State) -> None:
        request = Commit(state.run, None if state.request.dry_run else state.request.version)
        await self._actors.ask_all(dict.fromkeys(range(len(self._actors)), request), Done)
        if state.request.dry_run:
            return

        self._latest = state.request.version
        self._versions = dict.fromkeys(self._versions, state.request.version)

    # Failure.

    def _mark_torn(self, state: _State) -> None:
        """Say which replicas a failed sync had begun to write to."""
        for index, replica in enumerate(self._members_of_replicas()):
            version = self._versions[index]
            if not state.touched.isdisjoint(replica):
                before = version.from_version if isinstance(version, Torn) else version
                self._versions[index] = Torn(before, state.request.version)

    async def _abort(self, state: _State, reason: str) -> None:
        """End what is left of a failed sync on all actors, once, within the grace time."""
        if state.aborted:
            return

        state.aborted = True
        state.owing = self._actors.waiting_for()
        self._connection.forget()
        with anyio.move_on_after(_ABORT_SECONDS):
            await self._actors.abort(state.run, reason)

    def _timeout(self, state: _State, unfinished: tuple[Task, ...] = ()) -> errors.SyncTimeout:
        tasks = f"; {len(unfinished)} tasks were unfinished" if unfinished else ""
        return errors.SyncTimeout(
            f"the deadline of {state.request.deadline} seconds passed{tasks}",
            phase=state.watch.phase,
            actors=state.owing or tuple(dict.fromkeys(member for task in unfinished[:1] for member in task.members)),
            task=unfinished[0].id if unfinished else None,
        )

    # Members.

    def _set_members(self, source: ModelGroup, destination: ModelGroup) -> None:
        actors = RayActors((*source.actors, *destination.actors))
        both = [actor for actor in source.actors if actor in destination.actors]
        if both:
            raise errors.ConfigError(
                f"actor {both[0]!r} is in {source.name!r} and in {destination.name!r}; "
                "a trainer and an engine that share a GPU are two actors"
            )

        self._actors = actors
        self._source = source
        self._destination = destination
        self._sources = len(source.actors)
        self._connection = Connection(self._actors)
        self._prepared = None

    async def _change_members(self, source: ModelGroup, destination: ModelGroup) -> None:
        before = self._actors
        self._set_members(source, destination)
        await self._release(before)

    async def _release(self, actors: RayActors) -> None:
        """Close every actor's end; those that are dead or stuck are left to their own end."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
            await actors.close_all(self._name)

    def _members_of_replicas(self) -> list[range]:
        start = self._sources
        ranges: list[range] = []
        for replica in self._destination.replicas:
            ranges.append(range(start, start + len(replica)))
            start += len(replica)

        return ranges

    def _require_idle(self) -> None:
        if self._closed:
            raise errors.GroupClosed("the group is closed")

        if self._state is not None:
            raise errors.SyncInProgress(
                f"a sync to version {self._state.request.version} is under way", version=self._state.request.version
            )

    def _next_version(self, version: int | None) -> int:
        if version is None:
            return 0 if self._latest is None else self._latest + 1

        if self._latest is not None and version < self._latest:
            raise errors.ConfigError(f"version {version} is older than {self._latest}, which the replicas have")

        return version

    def _report(
        self,
        state: _State,
        preparation: Preparation,
        outcome: RunReport,
        finished: Iterable[Finished],
        *,
        planned: bool,
        connected: bool,
        device: str,
    ) -> SyncReport:
        plan, schedule = preparation.plan, preparation.schedule
        seconds = state.watch.seconds
        return SyncReport(
            version=state.request.version,
            dry_run=state.request.dry_run,
            nbytes=plan.nbytes,
            tensors=len({route.tensor for route in plan.routes}),
            partial=state.request.only is not None,
            routes=len(plan.routes),
            tasks=sum(len(wave.tasks) for wave in schedule.waves),
            waves=len(schedule.waves),
            bound_waves=schedule.bound.waves,
            makespan_bytes=schedule.makespan_bytes,
            bound_bytes=schedule.bound.nbytes,
            gap=schedule.gap,
            strategy=schedule.strategy,
            ports=schedule.ports,
            transport=self._connection.transport,
            device="cpu" if device == "cpu" else "cuda",
            staging_bytes=max((reply.staging_bytes for reply in finished), default=0),
            communicator_bytes=self._connection.communicator_bytes,
            connected=connected,
            planned=planned,
            seconds=PhaseSeconds(
                describe=seconds("describe"),
                plan=seconds("plan"),
                connect=seconds("connect"),
                transfer=seconds("transfer"),
                verify=seconds("verify"),
                commit=seconds("commit"),
                total=state.watch.total,
            ),
            reshard_seconds=preparation.reshard_seconds,
            schedule_seconds=preparation.schedule_seconds,
            run=outcome,
            digest=preparation.digest,
        )


def _compare_checksums(finished: dict[int, Finished], preparation: Preparation) -> None:
    """
    Compare what each receiver found in its memory with what the sender sent.

    :raises ChecksumMismatch: naming task, tensor and actors
    """
    step_of = preparation.step_of
    for wave in preparation.schedule.waves:
        for task in wave.tasks:
            sender = task.senders[0]
            sent = finished[sender].checksums[step_of[sender][task.id]]
            for receiver in task.receivers:
                index = step_of[receiver][task.id]
                found = finished[receiver].checksums[index]
                if found != sent:
                    cuts = preparation.programs[receiver].steps[index].cuts
                    raise errors.ChecksumMismatch(
                        f"what was sent sums up to {sent:#x}, what was written to {found:#x}: "
                        f"{len(cuts)} cuts from {cuts[0].tensor!r} on",
                        tensor=cuts[0].tensor,
                        actors=(sender, receiver),
                        task=task.id,
                    )


def _from_task(failure: TaskFailed) -> errors.SyncError:
    cause = failure.__cause__
    if isinstance(cause, errors.SyncError):
        cause.task = failure.task.id
        return cause

    return errors.ActorFailed(f"dispatching failed: {cause!r}", task=failure.task.id, actors=failure.task.members)
