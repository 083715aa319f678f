"""Actors of this process behind handles like Ray's: whole groups without Ray, and actors that die when told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import cast

import pytest
import torch
from ray.exceptions import ActorDiedError, TaskCancelledError

from tests.runtime.transfer.crew import FakeSession, ThreadHost, Wires
from wavecast.runtime import ModelGroup, ParameterSyncGroup, Shard, SyncOptions, TransferWorker
from wavecast.runtime.cluster import RayHost
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.messages import HostStore, Request, decode, encode
from wavecast.runtime.transfer.worker import overridden_hooks

ELEMENTS = 96


class StorelessSession(FakeSession):
    """Meets the others at a fabric, with no store to host."""

    def host_store(self, request: HostStore, address: str) -> int:
        return 0


class Answer:
    """What Ray's reference is: to be awaited any number of times, and not ended by a waiter that goes away."""

    def __init__(self, found: asyncio.Future[bytes]) -> None:
        self.found = found

    def __await__(self) -> Generator[object, None, bytes]:
        return asyncio.shield(self.found).__await__()

    def future(self) -> Future[bytes]:
        """Return the same as a future of the standard library's threads."""
        passed: Future[bytes] = Future()

        def pass_on(done: asyncio.Future[bytes]) -> None:
            if done.cancelled():
                passed.cancel()
            elif (error := done.exception()) is not None:
                passed.set_exception(error)
            else:
                passed.set_result(done.result())

        self.found.add_done_callback(pass_on)
        return passed


class LocalActor:
    """
    A handle.

    :ivar asked: every request that has arrived
    :ivar on_request: called with each as it arrives
    """

    def __init__(self, worker: TransferWorker, wires: Wires) -> None:
        self.worker = worker
        self.asked: list[Request] = []
        self.on_request: Callable[[Request], object] = lambda request: None
        self.dead = False
        self._pending: dict[asyncio.Future[bytes], ThreadHost] = {}
        self.agent = Agent(
            worker.transfer_shards, hooks=overridden_hooks(worker), make_session=lambda: StorelessSession(wires)
        )

    @property
    def wavecast_request(self) -> LocalActor:
        return self

    def options(self, *, max_task_retries: int) -> LocalActor:
        assert max_task_retries == 0
        return self

    def remote(self, call: bytes, *attachments: Answer) -> Answer:
        request, sent = cast("tuple[Request, RayHost]", decode(call))
        host = ThreadHost(sent.slip)
        outer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        # An answer that nobody awaits is no news.
        outer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.asked.append(request)
        self.on_request(request)
        if self.dead:
            outer.set_exception(ActorDiedError())
            return Answer(outer)

        task = asyncio.ensure_future(self._serve(request, host, attachments))
        self._pending[outer] = host
        outer.add_done_callback(lambda done: task.cancel())
        task.add_done_callback(lambda done: self._pass_on(done, outer))
        return Answer(outer)

    def kill(self) -> None:
        """Be dead: whatever is asked or was asked fails, and the others lose the connection."""
        self.dead = True
        for future in [*self._pending]:
            if not future.done():
                future.set_exception(ActorDiedError())

    def owes(self) -> bool:
        """Tell whether it has been asked for what the driver has neither an answer to nor a notice of."""
        return not all(host.told for host in self._pending.values())

    async def settled(self) -> None:
        """Wait until it has answered all that it was asked for."""
        if self._pending:
            await asyncio.wait([*self._pending])

    def kinds(self) -> list[str]:
        """The names of the requests so far."""
        return [type(request).__name__ for request in self.asked]

    async def _serve(self, request: Request, host: ThreadHost, attachments: Sequence[Answer]) -> bytes:
        found = [decode(await attachment) for attachment in attachments]
        return encode(await self.agent.serve_async(request, host, *found))

    def _pass_on(self, task: asyncio.Task[bytes], outer: asyncio.Future[bytes]) -> None:
        self._pending.pop(outer, None)
        error = None if task.cancelled() else task.exception()
        if outer.done():
            return

        if task.cancelled():
            outer.set_exception(TaskCancelledError())
        elif error is not None:
            outer.set_exception(error)
        else:
            outer.set_result(task.result())


def cancel(answer: Answer, *, recursive: bool) -> None:
    """Stands in for ``ray.cancel``."""
    if not answer.found.done():
        answer.found.set_exception(TaskCancelledError())


class Holder(TransferWorker):
    """Holds rows ``first`` to ``first + rows`` of a matrix, and a scale."""

    def __init__(self, first: int, rows: int, of: int, value: float) -> None:
        self.first = first
        self.of = of
        self.matrix = torch.full((rows, ELEMENTS), value)
        self.scale = torch.full((), value)
        self.calls: list[str] = []

    def transfer_shards(self) -> Sequence[Shard]:
        self.calls.append("transfer_shards")
        return [
            Shard("matrix", self.matrix, (self.first, 0), (self.of, ELEMENTS)),
            Shard("scale", self.scale, (), ()),
        ]

    def fill(self, value: float) -> None:
        self.matrix.fill_(value)
        self.scale.fill_(value)

    def values(self) -> set[float]:
        """All different elements held."""
        return {*self.matrix.flatten().tolist(), self.scale.item()}


class Stage:
    """
    Two trainers with two rows each, and replicas of two engines with as many.

    :ivar wires: what connects them
    """

    def __init__(self, *, replicas: int = 2, kind: Callable[..., Holder] = Holder) -> None:
        self.wires = Wires()
        self.kind = kind
        self.trainers = [self.actor(2 * rank, value=1.0) for rank in range(2)]
        self.replicas = [self.replica() for _ in range(replicas)]

    def actor(self, first: int, *, rows: int = 2, value: float = 0.0) -> LocalActor:
        return LocalActor(self.kind(first, rows, 4, value), self.wires)

    def replica(self) -> list[LocalActor]:
        return [self.actor(2 * rank) for rank in range(2)]

    @property
    def actors(self) -> list[LocalActor]:
        return [*self.trainers, *(actor for replica in self.replicas for actor in replica)]

    def group(self, **options: object) -> ParameterSyncGroup:
        """Return a group of all of them."""
        return ParameterSyncGroup(
            ModelGroup("policy", replicas=[self.trainers]),
            ModelGroup("rollout", replicas=self.replicas),
            SyncOptions(deadline_seconds=15, **options),  # type: ignore[arg-type]
        )

    def fill(self, value: float) -> None:
        """Give the trainers new weights."""
        for actor in self.trainers:
            holder(actor).fill(value)

    def values(self, replica: int) -> set[float]:
        """All different elements that a replica holds."""
        return set().union(*(holder(actor).values() for actor in self.replicas[replica]))


def holder(actor: LocalActor) -> Holder:
    assert isinstance(actor.worker, Holder)
    return actor.worker


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups drive local actors."""
    monkeypatch.setattr("ray.cancel", cancel)
