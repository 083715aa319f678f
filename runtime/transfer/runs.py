"""The runs of one actor: which is under way, how it begins and ends, and what came before its turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from wavecast.runtime import errors
from wavecast.runtime.transfer.comm import MoveTimeout
from wavecast.runtime.transfer.futures import Promise, pass_on
from wavecast.runtime.transfer.holding import Holding
from wavecast.runtime.transfer.hooks import Hooks
from wavecast.runtime.transfer.host import Host
from wavecast.runtime.transfer.memory import count_nan
from wavecast.runtime.transfer.messages import (
    Abort,
    Began,
    Begin,
    Close,
    CloseRun,
    Commit,
    Committed,
    Done,
    Reply,
    Request,
    RunHook,
    RunId,
    RunStep,
    Standing,
    Status,
)
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.tables import has_kernels, warm_up
from wavecast.runtime.transfer.weights import Weights

__all__ = ("Runs",)


class Runs:
    """
    Lets runs follow each other, and keeps a session for each group they are of.

    An actor is in one run at a time: a run that begins ends an older one, of whatever group, and an older one never
    ends a newer. A begin, a commit and a close change what is held and the weights, one at a time.

    :param hooks: are asked whether a begin was given up meanwhile, and told of commits that nobody asks for
    :param make_session: makes what is kept for one group
    """

    def __init__(
        self, holding: Holding, weights: Weights, hooks: Hooks, *, make_session: Callable[[], Session]
    ) -> None:
        self._holding = holding
        self._weights = weights
        self._hooks = hooks
        self._make_session = make_session
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._latest = 0
        # By group: the last run that was given up before it began here.
        self._given_up: dict[str, int] = {}
        self._early: list[tuple[RunStep, Promise[Reply]]] = []

    def session(self, run: RunId) -> Session:
        """
        Return what is kept for the group of ``run``.

        :raises SyncAborted: when there is nothing
        """
        session = self._sessions.get(run.group)
        if session is None:
            raise errors.SyncAborted("the actor is in no run of this group: it was closed, or never begun")

        return session

    def admit(self, request: Request) -> None:
        """Refuse what comes too late before any hook is called for it."""
        if isinstance(request, Begin):
            self._require_wanted(request.run)

        if isinstance(request, RunHook) and request.hook == "before_commit":
            self.session(request.run).current(request.run)

    def begin(self, request: Begin, host: Host, hook_seconds: float) -> Began:
        """Begin a run; it ends the one before."""
        if self._hooks.abandoned:
            raise errors.SyncAborted("the run was given up while its hook was called")

        started = time.thread_time()
        live = self._holding.read(request.actor, in_haste=bool(request.ahead))
        nan = count_nan(live.shards) if request.scan else ()
        with self._lock:
            self._end_others(request.run)
            is_first = self._holding.moves == 0
            self._holding.take_on(live)
            before = self._weights.standing
            run = self._weights.begin(request, live, before)
            run.spend(time.thread_time() - started)
            self._start(run, request, before)
            early, self._early = self._early, []

        for waiting, future in early:
            self._take_up(waiting, future)

        kernels = live.device.type == "cuda" and has_kernels()
        if is_first and kernels:
            # On a thread that needs the interpreter as well: from now on this actor waits for the driver to plan.
            warm_up(live.device)

        return Began(
            digest=self._holding.digest,
            place=self._holding.locate(host, live.device),
            nan=nan,
            standing=before,
            addresses=self._holding.moves,
            unshared=self._holding.unshared,
            kernels=kernels,
            hooks=self._hooks.names if request.version is not None else (),
            hook_seconds=hook_seconds,
            shadow_bytes=self._weights.copy_bytes if request.shadow else 0,
        )

    def _end_others(self, run: RunId) -> None:
        """Give up what is under way, of whatever group, for ``run``."""
        self._require_wanted(run)
        self._latest = run.serial
        for session in self._sessions.values():
            # Read once: it may be given up meanwhile.
            running = session.run
            if running is not None and running.name != run:
                session.give_up(running.name, "another sync, of this group or of another, began on this actor")

    def _start(self, run: Run, request: Begin, before: Standing) -> None:
        """Let the group's session take ``run`` up, and the steps that come with its begin."""
        own = self._sessions.get(request.run.group)
        if own is None:
            # Not setdefault(): a session has a thread.
            own = self._sessions[request.run.group] = self._make_session()

        own.run = run
        if request.layout is not None and request.layout != self._holding.digest:
            own.refuse(run, request.ahead)
            return

        own.announcer.begin(run)
        if request.close is not None:
            self._let_close(own, run, request.close, before, idle=not request.ahead)

        own.start_ahead(request.ahead)

    def _require_wanted(self, run: RunId) -> None:
        if run.serial < self._latest:
            raise errors.SyncAborted("a later run has begun on this actor")

        if run.serial <= self._given_up.get(run.group, 0):
            raise errors.SyncAborted("the run was given up before it began on this actor")

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
            self.commit(session, commit)
            self._hooks.after(commit)

        if idle:
            end()
        else:
            run.close_with(close.peers, end)

    def commit(self, session: Session, request: Commit) -> Committed:
        """End a run that went well."""
        with self._lock:
            run = session.current(request.run)
            seconds = self._weights.commit(run, request.version)
            session.run = None
            if run.releases_memory:
                # Whoever owns the shards may free them from here on, in its after_commit hook for one.
                self._let_go()

        return Committed(seconds)

    def give_up(self, request: Request, reason: str) -> None:
        """End the run of ``request`` at once, if it is under way. One that is aborted before it began never will."""
        if isinstance(request, Close | Status):
            return

        if isinstance(request, Abort):
            self._keep_from_beginning(request.run, reason)

        session = self._sessions.get(request.run.group)
        if session is not None:
            session.give_up(request.run, reason)

    def _keep_from_beginning(self, run: RunId, reason: str) -> None:
        """Where calls have no order, what ends a run may overtake what begins it."""
        with self._lock:
            if run.serial <= self._latest:
                return

            self._given_up[run.group] = run.serial
            early = [future for step, future in self._early if step.run == run]
            self._early = [each for each in self._early if each[0].run != run]

        for future in early:
            future.set_exception(errors.SyncAborted(reason))

    def close(self, request: Close) -> Done:
        """Drop all that is kept for a group."""
        with self._lock:
            session = self._sessions.pop(request.group, None)
            self._given_up.pop(request.group, None)

        if session is not None:
            session.close()

        with self._lock:
            self._weights.forget(request.group)
            if not self._sessions:
                self._weights.drop_copy()
                self._let_go()

        return Done()

    def _let_go(self) -> None:
        self._holding.let_go()
        self._weights.let_go()

    # Steps, which may come before the begin of their run where calls have no order.

    def step(self, request: RunStep) -> Promise[Reply]:
        """Queue a step, or keep it until its run has begun."""
        with self._lock:
            if request.run.serial > self._latest:
                future: Promise[Reply] = Promise()
                self._early.append((request, future))
                return future

        return self.session(request.run).enqueue(request)

    def expire(self, future: Future[Reply]) -> None:
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
            inner = self.step(request)
        except Exception as error:
            outer.set_exception(error)
        else:
            pass_on(inner, outer)
