"""The actor's half of its groups: answers requests, whatever hosts the actor."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait

from wavecast.runtime.collector import collector_paused
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer.comm import Deadline
from wavecast.runtime.transfer.failure import failure_of
from wavecast.runtime.transfer.holding import Holding
from wavecast.runtime.transfer.hook_calls import call_before, call_before_async, call_ends, call_ends_async
from wavecast.runtime.transfer.hooks import Hook, Hooks
from wavecast.runtime.transfer.host import LOOK_SECONDS, Host
from wavecast.runtime.transfer.messages import (
    Abort,
    Attach,
    Begin,
    Close,
    Commit,
    Compare,
    Connect,
    Describe,
    Described,
    Disconnect,
    Done,
    Export,
    Failure,
    HookDone,
    HostStore,
    Load,
    Probe,
    Reply,
    Request,
    RunHook,
    RunStep,
    Standing,
    Status,
    StepDone,
    StoreAddress,
)
from wavecast.runtime.transfer.on_lane import answer_on_lane
from wavecast.runtime.transfer.runs import Runs
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.weights import Weights

__all__ = ("Agent",)

#: Until the first part of what starts with a run is under way: some 0.5 ms.
_GIVE_WAY_SECONDS = 0.001


class Agent:
    """
    Everything an actor keeps: what it holds, what became of its weights, and the runs it is in.

    Requests may come on several threads.

    :param shards: the user's hook; called at the begin of each run, on the thread of the request
    :param hooks: the user's other hooks, by name: see :data:`~wavecast.runtime.transfer.hooks.HOOKS`
    :param make_session: makes what is kept for one group
    """

    def __init__(
        self,
        shards: Callable[[], Sequence[Shard]],
        *,
        hooks: Mapping[str, Hook] | None = None,
        make_session: Callable[[], Session] = Session,
    ) -> None:
        self._hooks = Hooks(hooks or {})
        self._holding = Holding(shards)
        self._weights = Weights()
        self._runs = Runs(self._holding, self._weights, self._hooks, make_session=make_session)

    @property
    def version(self) -> int | None:
        """The last committed version, ``None`` before the first."""
        return self._weights.version

    @property
    def torn(self) -> bool:
        """Whether a run has begun to write and was not committed."""
        return self._weights.torn

    @property
    def standing(self) -> Standing:
        """Version and torn, as they are told to drivers."""
        return self._weights.standing

    def serve(self, request: Request, host: Host, *attachments: object) -> Reply:
        """Answer ``request``, blocking. A cancelled call gives up its run and returns within the grace time."""
        try:
            seconds = call_before(self._hooks, request, self._runs.admit, host)
            future = self._start(request, host, attachments, seconds)
            if isinstance(request, Begin) and request.ahead:
                # This thread would hold up the one that starts the transfer; the answer can wait.
                self._runs.session(request.run).steps.under_way.wait(_GIVE_WAY_SECONDS)

            deadline = Deadline(request.seconds if isinstance(request, RunStep) else math.inf)
            while not future.done():
                wait((future,), timeout=LOOK_SECONDS)
                if deadline.passed:
                    self._runs.expire(future)

                if not future.done() and host.cancelled():
                    self._runs.give_up(request, "the driver cancelled the call")
                    return Failure("SyncAborted", "the driver cancelled the call")

            call_ends(self._hooks, self._hooks.after(request))
            return future.result()
        except Exception as error:
            return self._failed(request, error)

    async def serve_async(self, request: Request, host: Host, *attachments: object) -> Reply:
        """Answer ``request`` on an actor's event loop, without blocking it while bytes move."""
        try:
            seconds = await call_before_async(self._hooks, request, self._runs.admit)
            future = self._start(request, host, attachments, seconds)
            reply = await self._reply(request, future)
            await call_ends_async(self._hooks, self._hooks.after(request))
            return reply
        except asyncio.CancelledError:
            self._runs.give_up(request, "the driver cancelled the call")
            raise
        except Exception as error:
            return self._failed(request, error)

    async def _reply(self, request: Request, future: Future[Reply]) -> Reply:
        """Await what becomes of ``request``; a step that came early waits for its run no longer than its deadline."""
        if not isinstance(request, RunStep):
            return await asyncio.wrap_future(future)

        expiry = asyncio.get_running_loop().call_later(request.seconds, self._runs.expire, future)
        try:
            return await asyncio.wrap_future(future)
        finally:
            expiry.cancel()

    def _start(
        self, request: Request, host: Host, attachments: tuple[object, ...], hook_seconds: float
    ) -> Future[Reply]:
        """Answer what is answered at once; hand the rest to the session's own thread."""
        match request:
            case Status():
                return _answered(self._weights.standing)
            case Begin():
                return _answered(self._runs.begin(request, host, hook_seconds))
            case Close():
                return _answered(self._runs.close(request))
            case RunHook():
                if request.hook == "before_commit":
                    self._weights.require_committable()

                return _answered(HookDone(hook_seconds))
            case Abort():
                self._runs.give_up(request, request.reason)
                return _answered(Done())

        if isinstance(request, RunStep):
            future = self._runs.step(request)
            future.tell_first(lambda reply: _tell(host, reply))
            return future

        session = self._runs.session(request.run)
        match request:
            case Connect():
                return session.connect(request, host.address())
            case Load() | Export() | Attach() | Disconnect() | Probe() | Compare():
                return session.lane.submit(lambda: answer_on_lane(request, session, self._weights, attachments))
            case Describe():
                session.current(request.run)
                with collector_paused():
                    return _answered(Described.of(self._holding.layout))
            case HostStore():
                session.current(request.run)
                return _answered(StoreAddress(host.address(), session.host_store(request, host.address())))
            case Commit():
                return _answered(self._runs.commit(session, request))

    def _failed(self, request: Request, error: Exception) -> Failure:
        """Turn an exception into an answer. A failed transport is dropped: its other members get the same."""
        if isinstance(request, RunStep | Connect):
            self._runs.give_up(request, f"{type(error).__name__}: {error}")

        return failure_of(error)


def _tell(host: Host, reply: Reply) -> None:
    """Let the driver know what a step became; of one that failed only the answer itself can say how."""
    if isinstance(reply, StepDone):
        host.tell(reply)


def _answered(reply: Reply) -> Future[Reply]:
    future: Future[Reply] = Future()
    future.set_result(reply)
    return future
