"""Agents of one process, driven as a group drives actors: by messages alone, on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import torch

from wavecast.runtime.layout.shard import Shard, describe
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.tasks import build_tasks
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.comm import Communicator, Deadline
from wavecast.runtime.transfer.comm_fake import FakeFabric
from wavecast.runtime.transfer.comm_ported import PortedCommunicator
from wavecast.runtime.transfer.messages import (
    Abort,
    Began,
    Begin,
    Commit,
    Committed,
    Connect,
    Connected,
    Done,
    Failure,
    Finished,
    HostStore,
    Load,
    Reply,
    Request,
    RunId,
    RunStep,
    StepDone,
    StoreAddress,
)
from wavecast.runtime.transfer.program import Bucket, Program, Step, compile_programs, fill_buckets, pack_programs
from wavecast.runtime.transfer.session import Session
from wavecast.runtime.transfer.slip import Slip
from wavecast.scheduler import Schedule, plan_waves

R = TypeVar("R")

SECONDS = 20.0

#: No two runs of a test session have the same serial, whichever crew begins them.
_serials = count(1)


class ThreadHost:
    """
    Stands in for whatever hosts an actor.

    :ivar told: the driver was told ahead of the answer
    """

    def __init__(self, slip: Slip | None = None) -> None:
        self.ended = False
        self.told = False
        self.slip = slip

    def tell(self, reply: StepDone) -> None:
        if self.slip is not None:
            self.told = True
            self.slip.send(reply)

    def cancelled(self) -> bool:
        return self.ended

    def node(self) -> str:
        return "node-0"

    def address(self) -> str:
        return "127.0.0.1"


@dataclass
class Wires:
    """What connects fake communicators: a fabric a connection."""

    fabrics: dict[str, FakeFabric] = field(default_factory=dict)
    wrap: Callable[[Communicator], Communicator] = lambda communicator: communicator

    def session(self) -> Session:
        return FakeSession(self)


class FakeSession(Session):
    """A session that meets the others at a fabric instead of a store."""

    def __init__(self, wires: Wires) -> None:
        super().__init__()
        self._wires = wires

    def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        fabric = self._wires.fabrics.setdefault(request.connection, FakeFabric(request.size))
        communicator: Communicator = fabric.communicator(request.rank)
        if request.owners:
            ports = sorted(set(request.owners))
            far = self._wires.fabrics.setdefault(f"{request.connection}/far", FakeFabric(len(ports)))
            owns = request.rank in ports
            communicator = PortedCommunicator(
                request.rank,
                owners=request.owners,
                near=communicator,
                far=far.communicator(ports.index(request.rank)) if owns else None,
            )

        return self._wires.wrap(communicator)


def planned(
    sources: Sequence[Sequence[Shard]],
    destinations: Sequence[Sequence[Shard]],
    *,
    chunk_bytes: int,
    bucket_bytes: int,
    checksum: bool = True,
) -> tuple[Program, ...]:
    """Return the programs that bring the destinations to the sources' elements."""
    plan = plan_reshard([describe(shards) for shards in sources], [describe(shards) for shards in destinations])
    schedule = plan_waves(build_tasks(plan, chunk_bytes=chunk_bytes))
    return compiled(schedule, plan.actors, bucket_bytes=bucket_bytes, checksum=checksum)


def compiled(schedule: Schedule, actors: int, *, bucket_bytes: int, checksum: bool = True) -> tuple[Program, ...]:
    return compile_programs(schedule, actors=actors, digest="digest", bucket_bytes=bucket_bytes, checksum=checksum)


class Crew:
    """
    A driver and its agents.

    :ivar run: the one under way, or the last
    """

    def __init__(
        self,
        shards: Sequence[Sequence[Shard]],
        programs: Sequence[Program],
        *,
        wires: Wires | None = None,
        group: str = "group",
        agents: Sequence[Agent] | None = None,
    ) -> None:
        self.wires = wires or Wires()
        self.gloo = wires is None
        self.group = group
        self.programs = programs
        make_session = Session if self.gloo else self.wires.session
        self.agents = agents or [Agent(lambda own=own: own, make_session=make_session) for own in shards]  # type: ignore[misc]
        self.host = ThreadHost()
        self.run = RunId(group, 0)
        self.connection = ""
        self.finished: dict[int, Finished] = {}

    async def ask(self, actor: int, request: Request, *attachments: object) -> Reply:
        reply = await asyncio.wait_for(self.agents[actor].serve_async(request, self.host, *attachments), SECONDS)
        if isinstance(reply, StepDone) and reply.finished is not None:
            self.finished[actor] = reply.finished

        return reply

    async def ask_all(self, request: Callable[[int], Request]) -> list[Reply]:
        return list(await asyncio.gather(*(self.ask(actor, request(actor)) for actor in range(len(self.agents)))))

    async def begin(self, *, scan: bool = False) -> list[Began]:
        self.run = RunId(self.group, next(_serials))
        return expect(Began, await self.ask_all(lambda actor: Begin(self.run, actor, scan)))

    async def connect(self) -> None:
        """Make communicators and hand over the programs."""
        self.connection = f"connection-{self.run.serial}"
        port = 0
        if self.gloo:
            (address,) = expect(StoreAddress, [await self.ask(0, HostStore(self.run, self.connection, SECONDS))])
            port = address.port

        expect(Connected, await self.ask_all(lambda actor: self.connect_request(actor, port)))
        expect(Done, await self.load())

    def connect_request(self, actor: int, port: int = 0) -> Connect:
        steps = [step for program in self.programs for step in program.steps]
        many = {tuple(sorted((step.sender, *step.receivers))) for step in steps if len(step.receivers) > 1}
        one = {(step.sender, step.receivers[0]) for step in steps if len(step.receivers) == 1}
        return Connect(
            run=self.run,
            connection=self.connection,
            transport="gloo",
            host="127.0.0.1",
            port=port,
            rank=actor,
            size=len(self.agents),
            groups=tuple(sorted(many)),
            edges=tuple(sorted(one)),
            seconds=SECONDS,
            secret=bytes(32),
        )

    async def load(self) -> list[Reply]:
        packed = pack_programs(self.programs)
        return await self.ask_all(lambda actor: Load(self.run, packed[actor]))

    def buckets(self, actor: int, step: Step) -> tuple[Bucket, ...]:
        return fill_buckets(step.cuts, bucket_bytes=self.programs[actor].bucket_bytes)

    def step(self, actor: int, step: int, *, seconds: float = SECONDS) -> RunStep:
        return RunStep(self.run, step, self.programs[actor].digest, seconds)

    async def move(self, *, backwards: bool = False) -> None:
        """Ask for all steps of all actors at once."""
        requests = [
            (actor, self.step(actor, step))
            for actor, program in enumerate(self.programs)
            for step in range(len(program.steps))
        ]
        if backwards:
            requests.reverse()

        replies = await asyncio.gather(*(self.ask(actor, request) for actor, request in requests))
        expect(StepDone, replies)

    def finish(self) -> list[Finished]:
        """Return what each actor said with its last step."""
        nothing = Finished((), 0)
        return [self.finished.get(program.actor, nothing) for program in self.programs]

    async def commit(self, version: int | None) -> None:
        expect(Committed, await self.ask_all(lambda actor: Commit(self.run, version)))

    async def abort(self) -> None:
        expect(Done, await self.ask_all(lambda actor: Abort(self.run, "the test gave it up")))

    async def sync(self, version: int, *, connect: bool, backwards: bool = False) -> list[Finished]:
        """A whole sync; its checksums are compared."""
        await self.begin()
        if connect:
            await self.connect()

        await self.move(backwards=backwards)
        finished = self.finish()
        assert self.mismatches(finished) == []
        await self.commit(version)
        return finished

    def mismatches(self, finished: Sequence[Finished]) -> list[tuple[int, int]]:
        """Return the tasks, and their receivers, whose sums are not the sender's."""
        sums = {
            (step.task, program.actor): finished[program.actor].checksums[index]
            for program in self.programs
            for index, step in enumerate(program.steps)
        }
        return [
            (step.task, program.actor)
            for program in self.programs
            for step in program.steps
            if sums[step.task, program.actor] != sums[step.task, step.sender]
        ]


def expect(kind: type[R], replies: Sequence[Reply]) -> list[R]:
    """Return ``replies``, all of ``kind``; a failure is shown as it came."""
    for reply in replies:
        assert not isinstance(reply, Failure), f"{reply.kind}: {reply.message}\n{reply.detail}"
        assert isinstance(reply, kind)

    return [reply for reply in replies if isinstance(reply, kind)]
