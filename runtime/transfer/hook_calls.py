"""Calling the user's hooks: on a thread that may block, and on an event loop that must not."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait

from wavecast.runtime import errors
from wavecast.runtime.transfer.hooks import HookCall, Hooks
from wavecast.runtime.transfer.host import LOOK_SECONDS, Host
from wavecast.runtime.transfer.messages import Request

__all__ = ("call_before", "call_before_async", "call_ends", "call_ends_async")

_log = logging.getLogger(__name__)


def call_before(hooks: Hooks, request: Request, admit: Callable[[Request], None], host: Host) -> float:
    """
    Call on this thread what is due before ``request`` is served, and return the seconds it took.

    :param admit: raises for a request that comes too late; asked again behind each wait
    :raises SyncAborted: when the driver gives up on the call while it waits
    """
    admit(request)
    while isinstance(calls := hooks.before(request), Future):
        wait((calls,), timeout=LOOK_SECONDS)
        if host.cancelled():
            raise errors.SyncAborted("the driver cancelled the call behind the hooks of an earlier sync")

        admit(request)

    try:
        return _call_hooks(calls)
    finally:
        call_ends(hooks, hooks.called(request))


async def call_before_async(hooks: Hooks, request: Request, admit: Callable[[Request], None]) -> float:
    """Call on the running event loop what is due before ``request`` is served; otherwise as :func:`call_before`."""
    admit(request)
    while isinstance(calls := hooks.before(request), Future):
        await asyncio.wrap_future(calls)
        admit(request)

    try:
        return await _call_hooks_async(calls)
    finally:
        await call_ends_async(hooks, hooks.called(request))


def call_ends(hooks: Hooks, calls: Sequence[HookCall]) -> None:
    """Call the hooks that end a run, for which nobody waits but the next one."""
    if not calls:
        return

    try:
        _call_hooks(calls, log_errors=True)
    finally:
        hooks.ended()


async def call_ends_async(hooks: Hooks, calls: Sequence[HookCall]) -> None:
    """Call them on the running event loop; otherwise as :func:`call_ends`."""
    if not calls:
        return

    try:
        await _call_hooks_async(calls, log_errors=True)
    finally:
        hooks.ended()


def _call_hooks(calls: Sequence[HookCall], *, log_errors: bool = False) -> float:
    """
    Call hooks on this thread and return the seconds they took; an awaitable runs on an event loop of its own.

    :param log_errors: nobody waits for what they raise
    """
    start = time.perf_counter()
    for call in calls:
        try:
            found = call.hook(call.version)
            if inspect.isawaitable(found):
                asyncio.run(_wait_for(found))
        except Exception:
            if not log_errors:
                raise

            _log.exception("%s(%d) failed", call.name, call.version)

    return time.perf_counter() - start


async def _call_hooks_async(calls: Sequence[HookCall], *, log_errors: bool = False) -> float:
    """Call hooks on the running event loop and return the seconds they took; otherwise as :func:`_call_hooks`."""
    start = time.perf_counter()
    for call in calls:
        try:
            found = call.hook(call.version)
            if inspect.isawaitable(found):
                await found
        except Exception:
            if not log_errors:
                raise

            _log.exception("%s(%d) failed", call.name, call.version)

    return time.perf_counter() - start


async def _wait_for(found: Awaitable[None]) -> None:
    await found
