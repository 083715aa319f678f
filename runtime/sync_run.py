"""One sync, phase by phase: what the driver asks of the actors, and what it makes of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import anyio
import anyio.to_thread

from wavecast.runtime import errors
from wavecast.runtime.carriers import Ability, Carriers, choose_carriers
from wavecast.runtime.cluster import RayActors
from wavecast.runtime.commit import CommitPhase
from wavecast.runtime.connection import Connection
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.layout.views import NameMap
from wavecast.runtime.naming import Naming, name_layouts
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Only, Preparation, prepare, select_names
from wavecast.runtime.report import HookSeconds, PhaseSeconds, SyncReport
from wavecast.runtime.stopwatch import Stopwatch
from wavecast.runtime.transfer.messages import (
    Began,
    Begin,
    Compare,
    Describe,
    Described,
    Done,
    Excerpt,
    Finished,
    Probe,
    RunId,
    RunStep,
    Standing,
    Status,
    StepDone,
)
from wavecast.runtime.versions import Versions
from wavecast.scheduler import RunReport, RunTimeout, Task, TaskFailed, TaskReceipt, TaskTimeout, run

__all__ = ("Progress", "SyncRequest", "Known", "SyncRun", "compare_checksums")

#: After the deadline: to end what is running on the actors.
_ABORT_SECONDS = 0.5
_PRECEDENCE_SECONDS = 0.1
#: How much later than a step's the failure of a begin may come that is its cause.
_BEGIN_SECONDS = 0.05

Progress = Callable[[TaskReceipt], object]


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """
    What one call of ``sync()`` asked for.

    :ivar version: ``None``: one more than the newest
    :ivar deadline: seconds for the whole call
    :ivar waited: how many of them had passed before this run of it
    :ivar from_peer: the sources are another replica's actors, whose hooks are left alone
    """

    version: int | None
    deadline: float
    only: Only
    validate: bool
    dry_run: bool
    progress: Progress | None
    waited: float = 0.0
    from_peer: bool = False

    @property
    def seconds_left(self) -> float:
        """What is left of the deadline as the run begins."""
        return max(self.deadline - self.waited, 0.001)


class Known:
    """
    What earlier syncs of the same actors found out and need not find out again.

    :ivar sources: how many of the actors, from the first on, are sources
    :ivar replicas: the numbers of the actors of each replica
    :ivar versions: of the replicas
    :param names: the name maps of both sides
    :ivar layouts: by digest
    :ivar naming: the last layouts under logical names, with what they were made of
    :ivar prepared: the last preparation, with what it was made for
    :ivar refused: pairs of sender and receiver of which the receiver could not map the sender's memory
    :ivar paused: some actor has a hook to run before anything moves
    """

    def __init__(
        self,
        actors: RayActors,
        sources: int,
        replicas: tuple[range, ...],
        versions: Versions,
        *,
        names: tuple[NameMap | None, NameMap | None],
    ) -> None:
        self.actors = actors
        self.sources = sources
        self.replicas = replicas
        self.versions = versions
        self.names = names
        self.connection = Connection(actors)
        self.layouts: dict[str, Layout] = {}
        self.naming: tuple[tuple[object, ...], Naming] | None = None
        self.prepared: tuple[tuple[object, ...], Preparation] | None = None
        self.refused: frozenset[tuple[int, int]] = frozenset()
        self.paused = False
        self._chosen: tuple[object, Carriers] | None = None

    def carriers(self, wanted: str, abilities: tuple[Ability, ...]) -> Carriers:
        """Return the ways open to the actors, as :func:`choose_carriers` finds them."""
        if self._chosen is None or self._chosen[0] != (abilities, self.refused):
            carriers = choose_carriers(wanted, abilities, refused=self.refused)
            self._chosen = ((abilities, self.refused), carriers)

        return self._chosen[1]


class SyncRun:
    """
    One sync under way.

    :param group: the group's unguessable name
    :ivar scope: ends the sync at its deadline; entered by the caller
    :ivar touched: destination actors that tasks have been dispatched to
    :ivar version: the one on its way, once it is known
    """

    def __init__(self, request: SyncRequest, group: str, known: Known, options: SyncOptions) -> None:
        self.request = request
        self.watch = Stopwatch()
        self.scope = anyio.CancelScope(deadline=anyio.current_time() + request.seconds_left)
        self.touched: set[int] = set()
        self.version: int | None = request.version
        # By the clock: also a driver that was started anew comes after the one before.
        self._name = RunId(group, time.time_ns())
        self._known = known
        self._options = options
        self._actors = known.actors
        self._sources = known.sources
        self._connection = known.connection
        self._ends = time.monotonic() + request.seconds_left
        self._owing: tuple[int, ...] = ()
        self._aborted = False
        self._finished: dict[int, Finished] = {}
        self._preparation: Preparation | None = None
        self._commit: CommitPhase | None = None

    async def run(self) -> SyncReport:
        """
        Go through all phases.

        :raises SyncError: the class that fits
        """
        watch, request = self.watch, self.request
        start = time.perf_counter()
        early = self._preparation = self._expected()
        if early is not None:
            self.version = self._known.versions.next(request.version)

        ahead = await self._run_ahead(early) if early is not None else None
        if early is not None and ahead is not None:
            preparation, planned, connected = early, False, False
            began, outcome = ahead
        else:
            with watch.measure("describe"):
                began = await self._open()
                await self._learn_layouts(began)

            preparation, planned, connected = await self._make_ready(began)
            self._preparation = preparation
            start = time.perf_counter()
            outcome = RunReport(0.0, ())
            if not request.dry_run:
                with watch.measure("transfer"):
                    outcome = await self._transfer(preparation)

        if not request.dry_run:
            with watch.measure("verify"):
                if self._options.checksum:
                    compare_checksums(self._finished, preparation)

                if request.validate:
                    await self._validate(preparation)

        with watch.measure("commit"):
            if self._options.release_communicators and self._connection.transport:
                await self._connection.release(self._name)

            in_shadow = self._options.staging == "shadow"
            # In place the bytes are there already: who has them all may as well say so.
            voters = range(self._sources, len(self._actors)) if in_shadow else ()
            commit = self._commit = CommitPhase(self._actors, self._name, began, request.dry_run, voters)
            hooks = await commit.go_through(self._versions_to_commit())

        report = self._report(preparation, outcome, planned=planned, connected=connected, device=began[-1].place.device)
        return replace(
            report,
            staging=self._options.staging,
            shadow_bytes=max(reply.shadow_bytes for reply in began),
            pause_seconds=self._pause_seconds(start, hooks),
            hooks=hooks,
        )

    def _expected(self) -> Preparation | None:
        """
        Return what this sync will in all likelihood do, when its steps may be asked for before that is certain.

        They may where all is pulled: a receiver begins with no sender that has not begun this run, or whose memory is
        no longer where it was, and no collective can be entered by some and not by others.
        """
        known, request = self._known, self.request
        if known.prepared is None or request.only is not None or request.validate or request.dry_run:
            return None

        if known.paused:
            return None

        (*_, names), preparation = known.prepared
        staged = preparation.edges or preparation.groups
        return preparation if names is None and not staged and self._connection.serves(preparation) else None

    async def _run_ahead(self, preparation: Preparation) -> tuple[list[Began], RunReport] | None:
        """
        Begin and transfer at once; return nothing, with the run ended, when the actors turn out to hold other layouts.

        :raises SyncError: the failure of the begin, if there was one, else that of the transfer
        """
        found: list[Began] = []
        refusals: list[errors.SyncError] = []
        given_up: list[errors.SyncError] = []
        failures: list[errors.SyncError] = []
        moving = anyio.CancelScope()

        async def begin() -> None:
            try:
                found.extend(await self._begin())
            except errors.SyncError as error:
                # One that was given up because a step had failed has nothing to tell.
                (given_up if isinstance(error, errors.SyncAborted) else refusals).append(error)

            if not self._fits(found, preparation):
                moving.cancel()

        outcome: RunReport | None = None
        with self.watch.measure("transfer"):
            async with anyio.create_task_group() as group:
                group.start_soon(begin)
                with moving:
                    # The begins leave first: an actor takes its calls in the order in which they were sent.
                    await anyio.lowlevel.checkpoint()
                    try:
                        outcome = await self._transfer(preparation)
                    except errors.SyncError as error:
                        failures.append(error)
                        # What failed may be a begin, which then tells more.
                        await anyio.sleep(_BEGIN_SECONDS)
                        group.cancel_scope.cancel()

        if refusals:
            raise refusals[0]

        if outcome is not None and self._fits(found, preparation):
            return found, outcome

        changed = len(found) == len(self._actors) and not self._fits(found, preparation)
        if (failures or given_up) and not changed:
            raise (failures or given_up)[0]

        await self.abort("the actors hold other layouts than the last time")
        self._name = RunId(self._name.group, time.time_ns())
        self._aborted = False
        self._finished = {}
        return None

    def _fits(self, began: list[Began], preparation: Preparation) -> bool:
        """Tell whether the actors are as they were when ``preparation`` was made, where they were, and not ahead."""
        known = self._known.prepared
        return (
            len(began) == len(self._actors)
            and not self._overtaken()
            and known is not None
            and known[0] == self._key(began, None)
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
        committed = commit.committed.keys() if commit is not None else ()
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
        """End what is left of the sync on all actors, once, within the grace time."""
        if self._aborted:
            return

        self._aborted = True
        self._owing = self._actors.waiting_for()
        self._connection.forget()
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
                preparation, planned = await self._prepare(began, self.request.only)

            try:
                with self.watch.measure("connect"):
                    connected = await self._connection.ensure(
                        preparation,
                        [reply.addresses for reply in began],
                        run=self._name,
                        seconds=lambda: self._seconds_left,
                    )
            except errors.TransportUnavailable as error:
                refused = {pair for pair in preparation.pulls if not set(pair).isdisjoint(error.actors)}
                if self._options.transport != "auto" or not refused:
                    raise

                self._known.refused |= refused
            else:
                return preparation, planned, connected

    @property
    def _seconds_left(self) -> float:
        return max(self._ends - time.monotonic(), 0.001)

    def _pause_seconds(self, start: float, hooks: HookSeconds) -> float:
        if self.request.dry_run:
            return 0.0

        if self._options.staging == "shadow":
            return self._commit.flip_seconds if self._commit is not None else 0.0

        return time.perf_counter() - start - hooks.before_commit - hooks.after_commit

    async def _open(self) -> list[Began]:
        """
        Settle on a version, begin on all actors, and return what they say.

        At the first contact their versions are asked for before: an earlier driver may have brought them anywhere. One
        that did so since shows at the begin; where the version was left open, the run begins again behind it.

        :raises ConfigError: when the version asked for is older than one that a replica has
        """
        versions = self._known.versions
        if not versions.met:
            await self.ask_versions()

        self.version = versions.next(self.request.version)
        began = await self._begin()
        if self._overtaken():
            self._name = RunId(self._name.group, time.time_ns())
            self.version = versions.next(self.request.version)
            began = await self._begin()

        return began

    async def ask_versions(self) -> None:
        """Ask the replicas' actors for their versions, and note what they say. Outside of a run as well."""
        every = [actor for replica in self._known.replicas for actor in replica]
        self._observe(await self._actors.ask_all(dict.fromkeys(every, Status()), Standing))

    def _observe(self, standings: Mapping[int, Standing]) -> None:
        self._known.versions.observe([[standings[actor] for actor in replica] for replica in self._known.replicas])

    async def _begin(self) -> list[Began]:
        """Let all actors read their shards."""
        in_shadow = self._options.staging == "shadow"
        requests = {
            actor: Begin(
                self._name,
                actor,
                scan=self.request.validate and actor < self._sources,
                version=None if self.request.from_peer and actor < self._sources else self.version,
                shadow=in_shadow and actor >= self._sources,
            )
            for actor in range(len(self._actors))
        }
        replies = await self._actors.ask_all(requests, Began)
        self._observe({actor: reply.standing for actor, reply in replies.items()})
        self._known.paused = any("before_sync" in reply.hooks for reply in replies.values())
        for actor, reply in replies.items():
            if reply.torn and actor < self._sources:
                raise errors.SyncError(
                    "a source's weights are torn: a sync into it was begun and not finished", actors=(actor,)
                )

            if reply.nan:
                name, count = reply.nan[0]
                raise errors.ValidationError(
                    f"{len(reply.nan)} source tensors hold NaN; the first is {name!r} with {count} elements",
                    tensor=name,
                    actors=(actor,),
                )

        return [replies[actor] for actor in range(len(self._actors))]

    async def _learn_layouts(self, began: list[Began]) -> None:
        """Fetch each layout that is not known yet from one of its holders."""
        holders = {reply.digest: actor for actor, reply in enumerate(began) if reply.digest not in self._known.layouts}
        described = await self._actors.ask_all(dict.fromkeys(holders.values(), Describe(self._name)), Described)
        for digest, actor in holders.items():
            self._known.layouts[digest] = await anyio.to_thread.run_sync(described[actor].layout)

        current = {reply.digest for reply in began}
        self._known.layouts = {digest: layout for digest, layout in self._known.layouts.items() if digest in current}

    def _carriers(self, began: list[Began]) -> Carriers:
        abilities = tuple(Ability(reply.place, reply.unshared, reply.kernels) for reply in began)
        return self._known.carriers(self._options.transport, abilities)

    def _key(self, began: list[Began], names: frozenset[str] | None) -> tuple[object, ...]:
        return tuple((reply.digest, reply.place) for reply in began), self._carriers(began), names

    async def _prepare(self, began: list[Began], only: Only) -> tuple[Preparation, bool]:
        naming = await self._named(began)
        sources, destinations = naming.sources, naming.destinations
        names = select_names(sources, destinations, only, aliases=naming.aliases)
        carriers = self._carriers(began)
        key = self._key(began, names)
        if self._known.prepared is not None and self._known.prepared[0] == key:
            return self._known.prepared[1], False

        # Planning is plain computing: it leaves the loop, so that the trainer's coroutines go on.
        preparation = await anyio.to_thread.run_sync(
            partial(
                prepare,
                sources,
                destinations,
                self._options,
                names,
                carriers,
                renames=naming.renames,
                replicas=self._known.replicas,
            ),
            abandon_on_cancel=True,
        )
        self._known.prepared = (key, preparation)
        return preparation, True

    async def _named(self, began: list[Began]) -> Naming:
        """Return both sides under logical names; worked out off the loop when a layout has changed."""
        known = self._known
        key = tuple((reply.digest, reply.place) for reply in began)
        if known.naming is None or known.naming[0] != key:
            layouts = [replace(known.layouts[reply.digest], place=reply.place) for reply in began]
            naming = await anyio.to_thread.run_sync(
                partial(
                    name_layouts,
                    layouts[: self._sources],
                    layouts[self._sources :],
                    source_names=known.names[0],
                    destination_names=known.names[1],
                    aliases=self._options.aliases,
                    source_copies=self.request.from_peer,
                )
            )
            known.naming = (key, naming)

        return known.naming[1]

    async def _transfer(self, preparation: Preparation) -> RunReport:
        async def dispatch(task: Task) -> list[StepDone]:
            self.touched.update(task.receivers)
            refs = [
                self._actors.start(
                    member,
                    RunStep(self._name, preparation.step_of[member][task.id], preparation.digest, self._seconds_left),
                )
                for member in task.members
            ]
            replies = await self._actors.answers(refs, StepDone)
            for member, reply in zip(task.members, replies, strict=True):
                if reply.finished is not None:
                    self._finished[member] = reply.finished

            return replies

        async def abort(tasks: tuple[Task, ...]) -> None:
            await self.abort(f"task {tasks[0].id} was given up" if tasks else "the run was given up")

        # The run has the same deadline and can say more of it: it goes first.
        self.scope.deadline += _PRECEDENCE_SECONDS
        options = self._options
        allowed = None
        if options.task_allowance is not None:
            # A task may have to wait at an actor for those it was given before.
            allowed = options.link.allow(factor=options.task_allowance * options.in_flight)

        try:
            return await run(
                preparation.driven,
                dispatch,
                lookahead=options.lookahead,
                deadline=self._seconds_left,
                abort=abort,
                in_flight=options.in_flight,
                abort_seconds=_ABORT_SECONDS + _PRECEDENCE_SECONDS,
                on_receipt=self.request.progress,
                task_seconds=allowed,
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

    async def _validate(self, preparation: Preparation) -> None:
        """Compare, task by task, what receivers hold with what the sender holds, over Ray's object store."""
        for wave in preparation.schedule.waves:
            for task in wave.tasks:
                sender = task.senders[0]
                excerpt = self._actors.start(sender, Probe(self._name, preparation.step_of[sender][task.id]))
                refs = [
                    self._actors.start(receiver, Compare(self._name, preparation.step_of[receiver][task.id]), excerpt)
                    for receiver in task.receivers
                ]
                # The sender first: its failure is the receivers' as well, and should be told as its own.
                await self._actors.answer(excerpt, Excerpt)
                replies = await self._actors.answers(refs, Done)
                for receiver, reply in zip(task.receivers, replies, strict=True):
                    if reply.differing:
                        raise errors.ValidationError(
                            f"a destination differs from its source in {reply.differing[0]}",
                            actors=(sender, receiver),
                            task=task.id,
                        )

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

    def _report(
        self,
        preparation: Preparation,
        outcome: RunReport,
        *,
        planned: bool,
        connected: bool,
        device: str,
    ) -> SyncReport:
        plan, schedule = preparation.plan, preparation.schedule
        seconds = self.watch.seconds
        return SyncReport(
            version=self.version or 0,
            dry_run=self.request.dry_run,
            nbytes=plan.nbytes,
            tensors=len({route.tensor for route in plan.routes}),
            partial=bool(preparation.left_out),
            left_out=preparation.left_out,
            routes=len(plan.routes),
            tasks=sum(len(wave.tasks) for wave in schedule.waves),
            waves=len(schedule.waves),
            bound_waves=schedule.bound.waves,
            makespan_bytes=schedule.makespan_bytes,
            bound_bytes=schedule.bound.nbytes,
            gap=schedule.gap,
            strategy=schedule.strategy,
            ports=schedule.ports,
            transport=_describe_transport(preparation),
            pulled_nbytes=preparation.pulled_nbytes,
            transport_reasons=preparation.carriers.reasons,
            device="cpu" if device == "cpu" else "cuda",
            staging_bytes=max((reply.staging_bytes for reply in self._finished.values()), default=0),
            communicator_bytes=self._connection.communicator_bytes,
            host_seconds=max((reply.host_seconds for reply in self._finished.values()), default=0.0),
            connected=connected,
            planned=planned,
            seconds=PhaseSeconds(
                describe=seconds("describe"),
                plan=seconds("plan"),
                connect=seconds("connect"),
                transfer=seconds("transfer"),
                verify=seconds("verify"),
                commit=seconds("commit"),
                total=self.watch.total,
            ),
            reshard_seconds=preparation.reshard_seconds,
            schedule_seconds=preparation.schedule_seconds,
            run=outcome,
            digest=preparation.digest,
        )


def _describe_transport(preparation: Preparation) -> str:
    """Return the ways that this plan's tasks really take."""
    ways = ["ipc"] if preparation.pulls else []
    if preparation.groups or preparation.edges:
        ways += [way for way in [preparation.carriers.moved] if way not in ways]

    return "+".join(ways) or preparation.carriers.moved


def compare_checksums(finished: dict[int, Finished], preparation: Preparation) -> None:
    """
    Compare what each receiver found in its memory with what the sender sent, and what is passed on with what came.

    :raises ChecksumMismatch: naming task, tensor and actors
    """
    step_of = preparation.step_of
    for wave in preparation.schedule.waves:
        for task in wave.tasks:
            sender = task.senders[0]
            sent = finished[sender].checksums[step_of[sender][task.id]]
            _require_passed_on(task, sent, finished, preparation)
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


def _require_passed_on(task: Task, sent: int, finished: dict[int, Finished], preparation: Preparation) -> None:
    sender = task.senders[0]
    for before in task.after:
        # A hop comes after the one that brought its bytes, and after nothing else at its sender.
        index = preparation.step_of[sender][before]
        got = finished[sender].checksums[index]
        if got != sent:
            cuts = preparation.programs[sender].steps[index].cuts
            raise errors.ChecksumMismatch(
                f"what was passed on sums up to {sent:#x}, what had come to {got:#x}: "
                f"{len(cuts)} cuts from {cuts[0].tensor!r} on",
                tensor=cuts[0].tensor,
                actors=(sender,),
                task=task.id,
            )


def _from_task(failure: TaskFailed) -> errors.SyncError:
    cause = failure.__cause__
    if isinstance(cause, errors.SyncError):
        cause.task = failure.task.id
        return cause

    return errors.SyncError(f"the driver's own code failed beside task {failure.task.id}: {cause!r}")
