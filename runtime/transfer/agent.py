"""The actor's half of its groups: answers requests, whatever hosts the actor."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Protocol

import torch

from wavecast.runtime import errors
from wavecast.runtime.collector import collector_paused
from wavecast.runtime.layout.shard import FixedShards, Layout, Place, Shard, describe
from wavecast.runtime.transfer.comm import CommunicatorError, Deadline, MoveTimeout
from wavecast.runtime.transfer.compare import compare_step, read_step
from wavecast.runtime.transfer.futures import Promise, pass_on
from wavecast.runtime.transfer.hooks import Hook, HookCall, Hooks, call_hooks, call_hooks_async
from wavecast.runtime.transfer.lending import why_not_shared
from wavecast.runtime.transfer.memory import Memory, count_nan
from wavecast.runtime.transfer.messages import (
    Abort,
    Addresses,
    Attach,
    Began,
    Begin,
    Close,
    CloseRun,
    Commit,
    Committed,
    Compare,
    Connect,
    Describe,
    Described,
    Disconnect,
    Done,
    Excerpt,
    Export,
    Exported,
    Failure,
    HookDone,
    HostStore,
    Load,
    Probe,
    Reply,
    Request,
    RunHook,
    RunId,
    RunStep,
    Standing,
    Status,
    StepDone,
    StoreAddress,
)
from wavecast.runtime.transfer.program import Program
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.shadow import Shadow
from wavecast.runtime.transfer.tables import has_kernels, warm_up

__all__ = ("Agent", "Host")

#: How often a blocked call looks whether the driver has given up on it.
_LOOK_SECONDS = 0.01
#: Until the first part of what starts with a run is under way: some 0.5 ms.
_GIVE_WAY_SECONDS = 0.001


class Host(Protocol):
    """What the agent must know of whatever runs its actor. Sent along with each request."""

    def cancelled(self) -> bool:
        """Tell whether the driver has cancelled the call that is running. Called on the calling thread."""
        ...

    def tell(self, reply: StepDone) -> None:
        """Tell the driver ahead of the answer, where it can be told. Called on a thread of the session's."""
        ...

    def node(self) -> str:
        """Return the node's id."""
        ...

    def address(self) -> str:
        """Return the node's own address, as other nodes reach it."""
        ...


class Agent:
    """
    Everything an actor keeps: its shards and version, and a session for each group it is in.

    Requests may come on several threads. An actor is in one run at a time: a run that begins ends an older one, of
    whatever group, and an older one never ends a newer.

    :param shards: the user's hook; called at the begin of each run, on the thread of the request
    :param hooks: the user's other hooks, by name: see :data:`~wavecast.runtime.transfer.hooks.HOOKS`
    :param make_session: makes what is kept for one group
    :ivar version: last committed version, ``None`` before the first
    """

    def __init__(
        self,
        shards: Callable[[], Sequence[Shard]],
        *,
        hooks: Mapping[str, Hook] | None = None,
        make_session: Callable[[], Session] = Session,
    ) -> None:
        self._shards = shards
        self._hooks = Hooks(hooks or {})
        self._make_session = make_session
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._latest = 0
        self._memory: Memory | None = None
        self._moves = 0
        self._early: list[tuple[RunStep, Promise[Reply]]] = []
        self._place: tuple[torch.device, Place] | None = None
        self._unshared = ""
        self._layout = Layout(())
        self._signature: tuple[object, ...] | None = None
        self._digest = ""
        self._written_by: Run | None = None
        self._writing: int | None = None
        self._was_torn = False
        self._shadow: Shadow | None = None
        self._shadow_of: Memory | None = None
        self._in_shadow = False
        self._forgets = False
        self._live: tuple[Shard, ...] = ()
        self._received: dict[str, frozenset[str]] = {}
        self.version: int | None = None

    @property
    def torn(self) -> bool:
        """Whether a run has begun to write and was not committed. One that writes to a shadow tears nothing."""
        if self._in_shadow or self._written_by is None:
            return self._was_torn

        return self._written_by.wrote

    @property
    def standing(self) -> Standing:
        """Version and torn, as they are told to drivers."""
        return Standing(self.version, self.torn, self._writing if self.torn else None)

    def serve(self, request: Request, host: Host, *attachments: object) -> Reply:
        """Answer ``request``, blocking. A cancelled call gives up its run and returns within the grace time."""
        try:
            seconds = self._call_before(request, host)
            future = self._start(request, host, attachments, seconds)
            if isinstance(request, Begin) and request.ahead:
                # This thread would hold up the one that starts the transfer; the answer can wait.
                self._session(request.run).under_way.wait(_GIVE_WAY_SECONDS)

            deadline = Deadline(request.seconds if isinstance(request, RunStep) else math.inf)
            while not future.done():
                wait((future,), timeout=_LOOK_SECONDS)
                if deadline.passed:
                    self._expire(future)

                if not future.done() and host.cancelled():
                    self._give_up(request, "the driver cancelled the call")
                    return Failure("SyncAborted", "the driver cancelled the call")

            self._call_ends(self._hooks.after(request))
            return future.result()
        except Exception as error:
            return self._failed(request, error)

    async def serve_async(self, request: Request, host: Host, *attachments: object) -> Reply:
        """Answer ``request`` on an actor's event loop, without blocking it while bytes move."""
        try:
            seconds = await self._call_before_async(request)
            future = self._start(request, host, attachments, seconds)
            reply = await asyncio.wrap_future(future)
            await self._call_ends_async(self._hooks.after(request))
            return reply
        except asyncio.CancelledError:
            self._give_up(request, "the driver cancelled the call")
            raise
        except Exception as error:
            return self._failed(request, error)

    # Hooks that come before what is asked.

    def _call_before(self, request: Request, host: Host) -> float:
        self._admit(request)
        while isinstance(calls := self._hooks.before(request), Future):
            wait((calls,), timeout=_LOOK_SECONDS)
            if host.cancelled():
                raise errors.SyncAborted("the driver cancelled the call behind the hooks of an earlier sync")

            self._admit(request)

        try:
            return call_hooks(calls)
        finally:
            self._call_ends(self._hooks.called(request))

    async def _call_before_async(self, request: Request) -> float:
        self._admit(request)
        while isinstance(calls := self._hooks.before(request), Future):
            await asyncio.wrap_future(calls)
            self._admit(request)

        try:
            return await call_hooks_async(calls)
        finally:
            await self._call_ends_async(self._hooks.called(request))

    def _call_ends(self, calls: Sequence[HookCall]) -> None:
        """Call the hooks that end a run, for which nobody waits but the next one."""
        if not calls:
            return

        try:
            call_hooks(calls, log_errors=True)
        finally:
            self._hooks.ended()

    async def _call_ends_async(self, calls: Sequence[HookCall]) -> None:
        if not calls:
            return

        try:
            await call_hooks_async(calls, log_errors=True)
        finally:
            self._hooks.ended()

    def _admit(self, request: Request) -> None:
        """Refuse what comes too late before any hook is called for it."""
        if isinstance(request, Begin) and request.run.serial < self._latest:
            raise errors.SyncAborted("a later run has begun on this actor")

        if isinstance(request, RunHook) and request.hook == "before_commit":
            self._session(request.run).current(request.run)

    def _start(
        self, request: Request, host: Host, attachments: tuple[object, ...], hook_seconds: float
    ) -> Future[Reply]:
        """Answer what is answered at once; hand the rest to the session's own thread."""
        match request:
            case Status():
                return _answered(self.standing)
            case Begin():
                return _answered(self._begin(request, host, hook_seconds))
            case Close():
                return _answered(self._close(request))
            case RunHook():
                self._vote(request)
                return _answered(HookDone(hook_seconds))
            case Abort():
                self._give_up(request, request.reason)
                return _answered(Done())

        if isinstance(request, RunStep):
            future = self._step(request)
            future.tell_first(lambda reply: _tell(host, reply))
            return future

        session = self._session(request.run)
        match request:
            case Connect():
                return session.connect(request, host.address())
            case Load():
                return session.lane.submit(lambda: self._load(session, request))
            case Export():
                return session.lane.submit(lambda: Exported(session.export(request.run)))
            case Attach():
                return session.lane.submit(lambda: self._attach(session, request, attachments))
            case Disconnect():
                return session.lane.submit(lambda: self._disconnect(session, request))
            case Probe():
                return session.lane.submit(lambda: self._probe(session, request))
            case Compare():
                return session.lane.submit(lambda: self._compare(session, request, attachments))
            case Describe():
                session.current(request.run)
                with collector_paused():
                    return _answered(Described.of(self._layout))
            case HostStore():
                session.current(request.run)
                return _answered(StoreAddress(host.address(), session.host_store(request, host.address())))
            case Commit():
                return _answered(self._commit(session, request))

    def _failed(self, request: Request, error: Exception) -> Failure:
        """Turn an exception into an answer. A failed transport is dropped: its other members get the same."""
        if isinstance(request, RunStep | Connect):
            self._give_up(request, f"{type(error).__name__}: {error}")

        return _failure(error)

    def _give_up(self, request: Request, reason: str) -> None:
        if isinstance(request, Close | Status):
            return

        session = self._sessions.get(request.run.group)
        if session is not None:
            session.give_up(request.run, reason)

    def _session(self, run: RunId) -> Session:
        session = self._sessions.get(run.group)
        if session is None:
            raise errors.SyncAborted("the actor is in no run of this group: it was closed, or never begun")

        return session

    # Steps, which may come before the begin of their run where calls have no order.

    def _step(self, request: RunStep) -> Promise[Reply]:
        with self._lock:
            if request.run.serial > self._latest:
                future: Promise[Reply] = Promise()
                self._early.append((request, future))
                return future

        return self._session(request.run).enqueue(request)

    def _expire(self, future: Future[Reply]) -> None:
        """
        Let a step that came early wait no longer, once its deadline has passed.

        Ray may send a call again, to an actor that it has started anew and in whose place nothing has begun; on a plain
        actor the begin of the next run would wait behind it.
        """
        with self._lock:
            expired = [each for each in self._early if each[1] is future]
            self._early = [each for each in self._early if each[1] is not future]

        for _, waiting in expired:
            waiting.set_exception(MoveTimeout("the step's run had not begun by its deadline"))

    def _take_up(self, request: RunStep, outer: Promise[Reply]) -> None:
        """Go on with a step that came early, now that a run has begun: its own, or a later one."""
        try:
            inner = self._step(request)
        except Exception as error:
            outer.set_exception(error)
        else:
            pass_on(inner, outer)

    # What is answered at once.

    def _begin(self, request: Begin, host: Host, hook_seconds: float) -> Began:
        if self._hooks.abandoned:
            raise errors.SyncAborted("the run was given up while its hook was called")

        started = time.thread_time()
        live = self._read_shards(request.actor, in_haste=bool(request.ahead))
        shards = live.shards
        nan = count_nan(shards) if request.scan else ()
        is_first = False
        with self._lock:
            if request.run.serial < self._latest:
                raise errors.SyncAborted("a later run has begun on this actor")

            self._latest = request.run.serial
            for session in self._sessions.values():
                if session.run is not None and session.run.name != request.run:
                    session.give_up(session.run.name, "another sync, of this group or of another, began on this actor")

            if live is not self._memory:
                is_first = self._moves == 0
                self._memory = live
                self._moves += 1
                self._unshared = why_not_shared(live) if live.device.type == "cuda" else "it is host memory"

            if live.signature != self._signature:
                self._signature = live.signature
                with collector_paused():
                    self._layout = describe(shards, sharing=live.sharing)
                    self._digest = _digest(self._layout)

            before = self.standing
            memory = self._second_copy(live).memory if request.shadow else live
            run = Run(request.run, request.actor, memory)
            self._was_torn = before.torn
            self._forgets = False
            self._in_shadow = request.shadow
            self._live = shards if request.shadow else ()
            run.wrote = before.torn and not request.shadow
            self._written_by = run
            if request.version is not None:
                self._writing = request.version

            own = self._sessions.get(request.run.group)
            if own is None:
                # Not setdefault(): a session has a thread.
                own = self._sessions[request.run.group] = self._make_session()

            own.run = run
            run.spend(time.thread_time() - started)
            if request.layout is not None and request.layout != self._digest:
                own.refuse(run, request.ahead)
            else:
                own.announcer.begin(run)
                if request.close is not None:
                    self._let_close(own, run, request.close, before, idle=not request.ahead)

                own.start_ahead(request.ahead)

            early, self._early = self._early, []

        for waiting, future in early:
            self._take_up(waiting, future)

        kernels = live.device.type == "cuda" and has_kernels()
        if is_first and kernels:
            # On a thread that needs the interpreter as well: from now on this actor waits for the driver to plan.
            warm_up(live.device)

        return Began(
            digest=self._digest,
            place=self._locate(host, live.device),
            nan=nan,
            standing=before,
            addresses=self._moves,
            unshared=self._unshared,
            kernels=kernels,
            hooks=self._hooks.names if request.version is not None else (),
            hook_seconds=hook_seconds,
            shadow_bytes=self._shadow.nbytes if self._shadow is not None and request.shadow else 0,
        )

    def _let_close(self, session: Session, run: Run, close: CloseRun, before: Standing, *, idle: bool) -> None:
        """
        Let the run end by itself on this actor; at once where it has nothing to do in it.

        Not where the driver would perhaps have refused to commit, had it known what this actor says at its begin.
        """
        known = -1 if close.newest is None else close.newest
        ahead = close.version is not None and before.version is not None and before.version > known
        if ahead or (close.version is None and before.torn):
            session.announcer.refuse_to_close(run)
            return

        def end() -> None:
            commit = Commit(run.name, close.version)
            self._commit(session, commit)
            self._hooks.after(commit)

        if idle:
            end()
        else:
            session.let_close(run, close.peers, end)

    def _locate(self, host: Host, device: torch.device) -> Place:
        """Return where the shards are; an actor never leaves its node, so only its device may change."""
        if self._place is None or self._place[0] != device:
            self._place = (device, Place(host.node(), _device_name(device)))

        return self._place[1]

    def _read_shards(self, actor: int, *, in_haste: bool = False) -> Memory:
        """
        Ask the user's hook; what it returned the last time is taken as it was where it has not changed.

        :param in_haste: a sample will do here: what starts at once looks at each tensor before it touches it
        """
        # Read once: the end of another group's run may drop it meanwhile.
        shards, memory = _listed(self._shards()), self._memory
        if memory is not None and (memory.seems_still(shards) if in_haste else memory.holds_still(shards)):
            return memory

        for shard in shards:
            if not isinstance(shard, Shard):
                raise errors.LayoutError(
                    f"transfer_shards() must return Shard values, got {type(shard).__name__}", actors=(actor,)
                )

        with collector_paused():
            return Memory(shards)

    def _second_copy(self, live: Memory) -> Shadow:
        """Return what a run writes to in place of ``live``: allocated once a layout."""
        shadow, of = self._shadow, self._shadow_of
        if shadow is None or (live is not of and not shadow.fits(live.shards)):
            # The old one goes first: there may be no room for both.
            del shadow
            self._shadow = None
            shadow = self._shadow = Shadow(live.shards)

        self._shadow_of = live
        return shadow

    def _vote(self, request: RunHook) -> None:
        """Refuse a commit that could not be made whole: its flip would write to what is no longer there."""
        if request.hook == "before_commit" and self._in_shadow and self._memory is not None:
            self._memory.require_still()

    def _commit(self, session: Session, request: Commit) -> Committed:
        with self._lock:
            run = session.current(request.run)
            seconds = self._flip(run)
            if request.version is not None:
                self.version = request.version
                self._was_torn = False

            run.wrote = self._was_torn
            session.run = None
            if self._forgets:
                # Whoever owns the shards may free them from here on, in its after_commit hook for one.
                self._memory, self._shadow_of, self._written_by, self._live = None, None, None, ()

        return Committed(seconds)

    def _flip(self, run: Run) -> float:
        """Copy what a run wrote to the shadow over the weights. On the actor's own thread: its methods wait for it."""
        if not self._in_shadow or self._shadow is None or not run.wrote:
            return 0.0

        if self._memory is not None:
            self._memory.require_still()

        was_torn, self._was_torn = self._was_torn, True
        seconds = self._shadow.flip(self._live, self._received.get(run.name.group, frozenset()))
        self._was_torn, self._live = was_torn, ()
        return seconds

    def _close(self, request: Close) -> Done:
        with self._lock:
            session = self._sessions.pop(request.group, None)

        if session is not None:
            session.close()

        with self._lock:
            self._received.pop(request.group, None)
            if not self._sessions:
                self._was_torn = self.torn
                self._shadow, self._shadow_of, self._live = None, None, ()
                self._memory, self._written_by = None, None

        return Done()

    # On the session's thread.

    def _load(self, session: Session, request: Load) -> Done:
        session.current(request.run)
        with collector_paused():
            program = request.program.unpack()

        self._received[request.run.group] = _received(program)
        session.load(program)
        return Done()

    def _probe(self, session: Session, request: Probe) -> Excerpt:
        run = session.current(request.run)
        return Excerpt(read_step(session.buckets_of(request.step), session.memory_of(run)))

    def _attach(self, session: Session, request: Attach, attachments: tuple[object, ...]) -> Reply:
        found: dict[int, Addresses] = {}
        for sender, attachment in zip(request.senders, attachments, strict=True):
            if isinstance(attachment, Failure):
                return attachment

            if not isinstance(attachment, Exported):
                raise TypeError(f"expected a sender's addresses, got {type(attachment).__name__}")

            found[sender] = attachment.addresses

        session.attach(request.run, found)
        return Done()

    def _disconnect(self, session: Session, request: Disconnect) -> Done:
        session.current(request.run)
        if request.communicators:
            session.disconnect()

        if request.memory:
            session.detach()
            self._forgets = True

        return Done()

    def _compare(self, session: Session, request: Compare, attachments: tuple[object, ...]) -> Reply:
        run = session.current(request.run)
        (attachment,) = attachments
        if isinstance(attachment, Failure):
            return attachment

        if not isinstance(attachment, Excerpt):
            raise TypeError(f"expected the sender's excerpt, got {type(attachment).__name__}")

        return Done(compare_step(session.buckets_of(request.step), session.memory_of(run), attachment.data))


def _listed(found: object) -> Sequence[Shard]:
    """Return what the user's hook returned, if it is a list of anything."""
    if inspect.iscoroutine(found):
        found.close()

    if not isinstance(found, Iterable):
        raise errors.LayoutError(f"transfer_shards() must return a list of Shard values, got {type(found).__name__}")

    return found if isinstance(found, FixedShards) else list(found)


def _received(program: Program) -> frozenset[str]:
    """Return the actor's own names of the tensors that a program writes."""
    steps = (step for step in program.steps if program.actor in step.receivers)
    written = {cut.tensor for step in steps for cut in step.cuts}
    renamed = dict(program.renames)
    own = {name for name, logical in renamed.items() if not written.isdisjoint(logical)}
    return frozenset(own | (written - renamed.keys()))


def _tell(host: Host, reply: Reply) -> None:
    """Let the driver know what a step became; of one that failed only the answer itself can say how."""
    if isinstance(reply, StepDone):
        host.tell(reply)


def _answered(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future


def _failure(error: Exception) -> Failure:
    kind = "ActorFailed"
    if isinstance(error, errors.WavecastError):
        kind = type(error).__name__
    elif isinstance(error, MoveTimeout):
        kind = "SyncTimeout"
    elif isinstance(error, CommunicatorError) and "abort" in str(error):
        kind = "SyncAborted"

    named = isinstance(error, errors.WavecastError | CommunicatorError)
    # The first argument is the message itself; the driver adds who and where.
    message = str(error.args[0]) if named and error.args else f"{type(error).__name__}: {error}"
    return Failure(kind, message, "".join(traceback.format_exception(error)), getattr(error, "tensor", ""))


def _digest(layout: Layout) -> str:
    summary = hashlib.sha256()
    for piece in layout.pieces:
        summary.update(repr(piece).encode())

    summary.update(repr((layout.frozen, layout.computed, layout.sharing)).encode())
    return summary.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type

    return str(torch.cuda.get_device_properties(device).uuid)
