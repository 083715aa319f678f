"""The mixin, on every kind of class that an actor may be made of."""

from __future__ import annotations

import inspect
import threading
from collections.abc import AsyncIterator, Awaitable
from typing import cast

import pytest
import torch

from tests.runtime.transfer.crew import SECONDS, ThreadHost
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer.messages import (
    Began,
    Begin,
    Close,
    Compare,
    Describe,
    Described,
    Done,
    Failure,
    Reply,
    RunId,
    decode,
    encode,
)
from wavecast.runtime.transfer.worker import TransferWorker

RUN = RunId("group", 1)


class Plain(TransferWorker):
    def __init__(self) -> None:
        self.tensor = torch.ones(2, 3)
        self.hooks: list[int] = []

    def transfer_shards(self) -> list[Shard]:
        self.hooks.append(threading.get_ident())
        return [Shard("w", self.tensor, (0, 0), (2, 3))]


class OnEventLoop(Plain):
    async def generate(self) -> int:
        return 1


class Streaming(Plain):
    async def stream(self) -> AsyncIterator[int]:
        yield 1


class Engine:
    async def generate(self) -> int:
        return 1


class MixedIn(Engine, Plain):
    """The coroutine comes from a class that knows nothing of transfers."""


class Heir(OnEventLoop):
    """Adds nothing that is a coroutine."""

    def more(self) -> int:
        return 2


class NoHook(TransferWorker):
    pass


class Slotted(TransferWorker):
    __slots__ = ("tensor",)

    def transfer_shards(self) -> list[Shard]:
        return []


def ask(worker: TransferWorker, request: Begin | Close | Describe) -> Reply:
    """Request and answer are bytes on the way, as over Ray."""
    return cast("Reply", decode(worker.wavecast_request(encode((request, ThreadHost())))))


async def ask_on_loop(worker: TransferWorker, request: Begin | Close | Describe) -> Reply:
    return cast(
        "Reply", decode(await cast("Awaitable[bytes]", worker.wavecast_request(encode((request, ThreadHost())))))
    )


def test_a_plain_class_answers_on_the_calling_thread() -> None:
    worker = Plain()
    assert not inspect.iscoroutinefunction(worker.wavecast_request)
    assert isinstance(ask(worker, Begin(RUN, 0)), Began)
    assert worker.hooks == [threading.get_ident()]


@pytest.mark.parametrize("kind", [OnEventLoop, Streaming, MixedIn, Heir])
@pytest.mark.anyio
async def test_a_class_with_a_coroutine_method_answers_on_its_event_loop(kind: type[Plain]) -> None:
    """Ray hosts such a class on a loop, which a blocking answer would hold up."""
    worker = kind()
    assert inspect.iscoroutinefunction(worker.wavecast_request)
    reply = await ask_on_loop(worker, Begin(RUN, 0))
    assert isinstance(reply, Began)
    # On the actor's own thread, where the user's other methods run.
    assert worker.hooks == [threading.get_ident()]


def test_an_event_loop_class_does_not_change_its_parent() -> None:
    assert not inspect.iscoroutinefunction(Plain.wavecast_request)
    assert not inspect.iscoroutinefunction(TransferWorker.wavecast_request)


def test_the_hook_is_called_once_a_run_and_reads_afresh() -> None:
    worker = Plain()
    ask(worker, Begin(RUN, 0))
    worker.tensor = torch.ones(2, 3, dtype=torch.bfloat16)
    ask(worker, Begin(RunId("group", 2), 0))
    described = ask(worker, Describe(RunId("group", 2)))
    assert isinstance(described, Described)
    assert [piece.dtype for piece in described.layout().pieces] == ["bfloat16"]
    assert len(worker.hooks) == 2


def test_a_class_without_the_hook_says_which_one_and_what_is_missing() -> None:
    failure = ask(NoHook(), Begin(RUN, 0))
    assert isinstance(failure, Failure)
    assert failure.kind == "ActorFailed"
    assert failure.message == "TypeError: NoHook mixes in TransferWorker and must define transfer_shards()"


@pytest.mark.anyio
async def test_a_hook_that_is_a_coroutine_is_refused_in_plain_words() -> None:
    class Waiting(TransferWorker):
        async def transfer_shards(self) -> list[Shard]:  # type: ignore[override]
            return []

    failure = await ask_on_loop(Waiting(), Begin(RUN, 0))
    assert isinstance(failure, Failure)
    assert failure.message == "transfer_shards() must return a list of Shard values, got coroutine"


def test_an_init_that_calls_no_super_and_slots_do_no_harm() -> None:
    assert isinstance(ask(Slotted(), Begin(RUN, 0)), Began)


def test_each_worker_has_one_agent_whatever_threads_ask_first() -> None:
    worker = Plain()
    start = threading.Barrier(8)
    replies: list[Reply] = []

    def begin(serial: int) -> None:
        start.wait(SECONDS)
        replies.append(ask(worker, Begin(RunId(f"group {serial}", 1), 0)))

    threads = [threading.Thread(target=begin, args=(serial,), daemon=True) for serial in range(8)]
    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join(SECONDS)

    assert [type(reply) for reply in replies] == [Began] * 8
    for serial in range(8):
        assert isinstance(ask(worker, Close(f"group {serial}")), Done)

    other = Plain()
    assert other.__dict__.keys() == {"tensor", "hooks"}


def test_attachments_are_answers_of_other_actors_as_they_came() -> None:
    """Ray hands over what another actor returned: bytes."""
    worker = Plain()
    assert isinstance(ask(worker, Begin(RUN, 0)), Began)
    failure = Failure("ActorFailed", "the sender's own trouble", tensor="w")
    call = encode((Compare(RUN, 0), ThreadHost()))
    assert decode(worker.wavecast_request(call, encode(failure))) == failure


@pytest.mark.parametrize(
    "value", [Done(("a", "b")), Failure("SyncError", "no", "trace", "w"), Begin(RUN, 3, scan=True)]
)
def test_a_message_comes_back_from_bytes_as_it_was(value: object) -> None:
    data = encode(value)
    assert isinstance(data, bytes)
    assert decode(data) == value
