"""What a user's actor class mixes in."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Sequence
from typing import cast

from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.hooks import HOOKS, Hook
from wavecast.runtime.transfer.host import Host
from wavecast.runtime.transfer.messages import Request, decode, encode

__all__ = ("TransferWorker", "overridden_hooks")

_making = threading.Lock()


class TransferWorker:
    """
    Mix this into an actor class and say what it holds; the rest is the group's doing.

    Needs no ``__init__`` and no option: the class may become a plain, a threaded or an asyncio actor. On an asyncio
    actor (a class with coroutine methods) the event loop stays free while bytes move.

    A source's weights are read from when ``group.sync()`` is entered until it returns: do not change them meanwhile.
    A destination's are written in the same span, on all replicas: do not read them meanwhile. With
    ``staging="shadow"`` they are written in its commit alone.

    The hooks around a sync may be overridden, each by itself, with plain methods or coroutines; on an actor without an
    event loop an awaitable runs on a loop of its own. They are called on both sides, on the actor's own thread, in the
    order before_sync, transfer_shards, before_commit, after_commit. Of the last and ``after_abort`` exactly one follows
    each ``before_sync``. A hook that is not overridden costs nothing; ``before_commit`` and ``after_commit`` cost a
    round trip each where an actor has them. What a hook raises ends the sync as ``ActorFailed``.
    """

    def transfer_shards(self) -> Sequence[Shard]:
        """
        Return the shards this actor holds: views of its own memory, which a source lends and a destination offers.

        Called once at the begin of every sync, on the actor's own thread. Must be overridden. Return the same shards as
        the last time while the tensors are the same objects: with thousands of them this is what makes a warm sync
        cheap. Storage that moved under a tensor, and a new shape, are noticed. Where nothing of the kind can happen,
        return the same :class:`~wavecast.runtime.FixedShards`: they are not looked at one by one.

        On a GPU the sync comes after all that the current stream of this thread has been given; what other streams have
        yet to do to the weights must have been joined to it, here or in :meth:`before_sync` at the latest.
        """
        raise TypeError(f"{type(self).__name__} mixes in TransferWorker and must define transfer_shards()")

    def before_sync(self, version: int) -> Awaitable[None] | None:
        """
        Prepare for a sync to ``version``: pause an engine, bring offloaded weights back. Called before the shards are
        read, in a dry run too. When it raises, nothing has been moved and ``after_abort`` follows.
        """
        return None

    def before_commit(self, version: int) -> Awaitable[None] | None:
        """
        Prepare to take on ``version``: pause an engine whose weights are staged in shadow, drop its prefix cache.
        Called once everything has arrived everywhere and was verified; the commit waits for all of them. When it raises
        on one actor, no replica commits.
        """
        return None

    def after_commit(self, version: int) -> Awaitable[None] | None:
        """
        Go on with ``version``: resume the engine. Called once every actor has committed. When it raises, the sync fails
        but all replicas have the version. Weights that are offloaded here are freed only with ``release_memory=True``:
        other actors have mapped them.
        """
        return None

    def after_abort(self, version: int) -> Awaitable[None] | None:
        """
        Go on without ``version``: the sync failed, was cancelled, or was a dry run. An engine that was paused resumes
        here if its weights are whole: with ``staging="shadow"`` they are, with ``"in_place"`` they may be torn.

        Called as the sync ends; when the driver itself is lost, as the next one begins. What it raises is logged.
        """
        return None

    def wavecast_request(self, call: bytes, *attachments: bytes) -> bytes:
        """Answer one request of a group's driver. Not for users."""
        request, host = _read(call)
        return encode(_agent(self).serve(request, host, *map(decode, attachments)))

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A class with a coroutine method is hosted on an event loop, which a blocking method would hold up.
        on_event_loop = any(
            inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
            for name, member in inspect.getmembers(cls)
            if name != "wavecast_request"
        )
        if on_event_loop:
            cls.wavecast_request = _request_on_event_loop  # type: ignore[assignment, method-assign]


async def _request_on_event_loop(self: TransferWorker, call: bytes, *attachments: bytes) -> bytes:
    request, host = _read(call)
    return encode(await _agent(self).serve_async(request, host, *map(decode, attachments)))


def _read(call: bytes) -> tuple[Request, Host]:
    return cast("tuple[Request, Host]", decode(call))


def overridden_hooks(worker: TransferWorker) -> dict[str, Hook]:
    """
    Return those of the hooks that the worker's class, or the worker itself, has of its own.

    Told by their names: Ray wraps every method of an actor class, inherited ones too, and wrappers keep those.
    """
    found: dict[str, Hook] = {}
    for name in HOOKS:
        hook: Hook = getattr(worker, name)
        own = (getattr(hook, "__module__", None), getattr(hook, "__qualname__", None))
        if own != (TransferWorker.__module__, f"TransferWorker.{name}"):
            found[name] = hook

    return found


def _agent(worker: TransferWorker) -> Agent:
    """Return the worker's agent, made at its first request: the mixin has no ``__init__`` of its own."""
    with _making:
        agent = worker.__dict__.get("_wavecast_agent")
        if not isinstance(agent, Agent):
            agent = Agent(worker.transfer_shards, hooks=overridden_hooks(worker))
            worker.__dict__["_wavecast_agent"] = agent

        return agent
