"""The actors of a group: calls sent, awaited and ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, cast

import anyio
import ray
from ray.exceptions import RayError

from wavecast.runtime import errors
from wavecast.runtime.cluster.failures import from_failure, from_ray
from wavecast.runtime.cluster.host import RayHost
from wavecast.runtime.notices import Notices, Told
from wavecast.runtime.transfer.messages import (
    Abort,
    Close,
    Failure,
    Request,
    RunId,
    Status,
    decode,
    encode,
)

__all__ = ("ActorHandle", "Answer", "RayActors")

R = TypeVar("R")

#: After so long a call to a live actor has been delivered.
_DELIVERY_SECONDS = 0.1
#: What a call may take to end by itself once it is its turn.
_TURN_SECONDS = 0.02


class _RemoteMethod(Protocol):
    def remote(self, *args: object) -> ray.ObjectRef[bytes]: ...


class _ActorMethod(Protocol):
    def options(self, *, max_task_retries: int) -> _RemoteMethod: ...


#: Any Ray actor handle. Ray's own type says nothing of an actor's methods: a group checks for what it needs.
ActorHandle: TypeAlias = object


#: What stands for an answer until it is awaited.
Answer: TypeAlias = "ray.ObjectRef[bytes]"


_HOST = RayHost()


@dataclass(frozen=True, slots=True)
class _Call:
    """:ivar told: what the actor tells ahead of its answer, if it can"""

    actor: int
    sent: float
    told: Told | None = None


class RayActors:
    """
    The actors of a group, by number.

    Every call is awaited on the running asyncio loop; there is no thread here.

    :raises NotATransferWorker: for a handle whose class does not mix in ``TransferWorker``
    """

    def __init__(self, handles: Sequence[ActorHandle]) -> None:
        self.handles = tuple(handles)
        for actor, handle in enumerate(self.handles):
            if not hasattr(handle, "wavecast_request"):
                raise errors.NotATransferWorker(f"actor {handle!r} does not mix in TransferWorker", actors=(actor,))

        self._methods = [_request_method(handle) for handle in self.handles]
        self._running: dict[ray.ObjectRef[bytes], _Call] = {}

    def __len__(self) -> int:
        return len(self.handles)

    def start(
        self, actor: int, request: Request, *attachments: ray.ObjectRef[bytes], notices: Notices | None = None
    ) -> ray.ObjectRef[bytes]:
        """
        Send ``request`` and return the reference of its answer; :meth:`answer` awaits it.

        :param attachments: other actors' answers, which Ray hands over without a stop here; all of them must be there
            already, or the call could not be cancelled
        :param notices: what the actor tells by them is as good as its answer, and sooner there
        :raises SyncError: when Ray takes no more calls for the actor
        """
        slip, told = (None, None) if notices is None else notices.issue()
        try:
            ref = self._methods[actor].remote(encode((request, RayHost(slip))), *attachments)
        except RayError as error:
            raise from_ray(error, actor) from error

        self._running[ref] = _Call(actor, anyio.current_time(), told)
        return ref

    async def answer(self, ref: ray.ObjectRef[bytes], expected: type[R]) -> R:
        """
        Await the answer behind ``ref``.

        :raises SyncError: the actor's own failure, or its death, as the class that fits, naming the actor
        """
        actor = self._running[ref].actor
        try:
            answer = await ref
        except RayError as error:
            # A cancelled await leaves the reference on the list, for abort() to end; any answer takes it off.
            self._running.pop(ref, None)
            raise from_ray(error, actor) from error

        return self._read(ref, actor, decode(answer), expected)

    def hear(
        self,
        refs: Sequence[ray.ObjectRef[bytes]],
        expected: type[R],
        note: Callable[[int, R], object] = lambda place, reply: None,
    ) -> asyncio.Future[list[R]]:
        """
        Return the future of several answers, in order, or of what their actors tell ahead of them.

        The first failure ends it, as :meth:`answer` would raise it. No task waits for any of them: each would wake up
        in a turn of the loop of its own.

        :param note: called with the place and the answer of each as it comes, until the future is done
        """
        ended: asyncio.Future[list[R]] = asyncio.get_running_loop().create_future()
        # Who is cancelled does not look at it any more.
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        replies: dict[int, R] = {}

        def take(place: int, ref: ray.ObjectRef[bytes], actor: int, answer: Callable[[], object]) -> None:
            if ended.done():
                return

            try:
                reply = replies[place] = self._read(ref, actor, answer(), expected)
                note(place, reply)
            except RayError as error:
                self._running.pop(ref, None)
                ended.set_exception(from_ray(error, actor))
            except Exception as error:
                ended.set_exception(error)
            else:
                if len(replies) == len(refs):
                    ended.set_result([replies[number] for number in range(len(refs))])

        if not refs:
            ended.set_result([])

        for place, ref in enumerate(refs):
            call = self._running[ref]
            _when_heard(ref, call.told or Told(), functools.partial(take, place, ref, call.actor))

        return ended

    def _read(self, ref: ray.ObjectRef[bytes], actor: int, reply: object, expected: type[R]) -> R:
        self._running.pop(ref, None)
        if isinstance(reply, Failure):
            raise from_failure(reply, actor)

        if not isinstance(reply, expected):
            raise errors.ActorFailed(
                f"actor answered {type(reply).__name__} where {expected.__name__} was expected", actors=(actor,)
            )

        return reply

    async def ask(self, actor: int, request: Request, expected: type[R]) -> R:
        """Send ``request`` to one actor and await its answer."""
        return await self.answer(self.start(actor, request), expected)

    async def ask_all(self, requests: Mapping[int, Request], expected: type[R]) -> dict[int, R]:
        """Send a request each to several actors at once and await all answers; the first failure ends the wait."""
        refs = {actor: self.start(actor, request) for actor, request in requests.items()}
        return dict(zip(refs, await self.answers(list(refs.values()), expected), strict=True))

    async def answers(self, refs: Sequence[ray.ObjectRef[bytes]], expected: type[R]) -> list[R]:
        """Await several answers at once, in order; the first failure ends the wait."""
        return await self.hear(refs, expected)

    async def ask_each(self, requests: Mapping[int, Request], expected: type[R]) -> dict[int, R | errors.SyncError]:
        """Send a request each to several actors at once; return every answer, an actor's failure as a value."""
        refs = {actor: self.start(actor, request) for actor, request in requests.items()}
        replies: dict[int, R | errors.SyncError] = {}

        async def keep(actor: int, ref: Answer) -> None:
            try:
                replies[actor] = await self.answer(ref, expected)
            except errors.SyncError as error:
                replies[actor] = error

        async with anyio.create_task_group() as group:
            for actor, ref in refs.items():
                group.start_soon(keep, actor, ref)

        return {actor: replies[actor] for actor in refs}

    async def find_dead(self, seconds: float) -> tuple[int, ...]:
        """Return the actors that are dead, as far as ``seconds`` can tell; one that does not answer is none."""
        dead: set[int] = set()

        async def look(actor: int, ref: Answer) -> None:
            try:
                await self.answer(ref, object)
            except errors.SyncError as error:
                if isinstance(error, errors.ActorDied):
                    dead.add(actor)

        refs = [self.start(actor, Status()) for actor in range(len(self.handles))]
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as group:
                for actor, ref in enumerate(refs):
                    group.start_soon(look, actor, ref)

        for ref in refs:
            self._running.pop(ref, None)

        return tuple(sorted(dead))

    def waiting_for(self) -> tuple[int, ...]:
        """The actors that owe an answer, each once, in order."""
        return tuple(sorted({call.actor for call in self._running.values()}))

    async def abort(self, run: RunId, reason: str) -> None:
        """
        End every call that is running or queued, and the run on all actors.

        Ray's own cancel reaches an actor whose thread is blocked: the agent looks out for it. Returns when every actor
        has answered; the caller bounds the time. Actors that are dead already are no failure here.
        """
        running, self._running = self._running, {}
        calls: dict[int, list[tuple[ray.ObjectRef[bytes], float]]] = {actor: [] for actor in range(len(self.handles))}
        for ref, call in running.items():
            calls[call.actor].append((ref, call.sent))

        async with anyio.create_task_group() as group:
            for actor, owed in calls.items():
                group.start_soon(self._end, actor, owed, Abort(run, reason))

    async def _end(self, actor: int, owed: list[tuple[ray.ObjectRef[bytes], float]], abort: Abort) -> None:
        """
        End an actor's calls one after the other, then its run.

        Ray numbers an actor's calls, and one that is cancelled before it was delivered leaves a gap for which all later
        ones wait. So only the call that the actor is at is cancelled, and not before it must have arrived.
        """
        try:
            for ref, sent in owed:
                with anyio.move_on_after(max(sent + _DELIVERY_SECONDS - anyio.current_time(), _TURN_SECONDS)):
                    await _settled(ref)
                    continue

                ray.cancel(ref, recursive=False)
                await _settled(ref)
        except anyio.get_cancelled_exc_class():
            # Out of time: it ends its run as soon as it comes to it.
            self._methods[actor].remote(encode((abort, _HOST)))
            raise

        await _settled(self._methods[actor].remote(encode((abort, _HOST))))

    async def close_all(self, group: str) -> None:
        """Let every actor release what it holds for ``group``; the caller bounds the time. Passes over dead actors."""
        close = encode((Close(group), _HOST))
        refs = [method.remote(close) for method in self._methods]
        async with anyio.create_task_group() as tasks:
            for ref in refs:
                tasks.start_soon(_settled, ref)


def _when_heard(ref: ray.ObjectRef[bytes], told: Told, take: Callable[[Callable[[], object]], object]) -> None:
    """Call ``take`` with what returns the answer, or what was told ahead of it: whichever comes first."""
    loop = asyncio.get_running_loop()
    answer = ref.future()

    def call_home(_: object) -> None:
        # On a thread of Ray's, perhaps long after the sync, when the loop may be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(told.tell, None)

    told.then(lambda found: take((lambda: decode(answer.result())) if found is None else (lambda: found)))
    answer.add_done_callback(call_home)


async def _settled(ref: ray.ObjectRef[bytes]) -> None:
    """Wait until a call has ended, in whatever way."""
    try:
        await ref
    except RayError:
        # Cancelled or dead: both mean that it runs no more, which is all that is asked here.
        return


def _request_method(handle: ActorHandle) -> _RemoteMethod:
    method = cast("_ActorMethod", getattr(handle, "wavecast_request"))  # noqa: B009
    # Never sent again, whatever the user's other methods are: a new process in the actor's place knows of no run.
    return method.options(max_task_retries=0)
