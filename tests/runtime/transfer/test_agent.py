"""Agents among themselves: whole runs, and everything that may cross them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.runtime.transfer.crew import SECONDS, Crew, ThreadHost, Wires, compiled, expect, planned
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.transfer import session as session_module
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, Fence, Move
from wavecast.runtime.transfer.copying import unpack
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.messages import (
    Abort,
    Begin,
    Close,
    Commit,
    Compare,
    Describe,
    Described,
    Done,
    Excerpt,
    Failure,
    Finish,
    HostStore,
    Load,
    Probe,
    Reply,
    RunId,
    RunStep,
    StepDone,
)
from wavecast.runtime.transfer.program import Bucket, pack_programs
from wavecast.scheduler import Schedule, Task, Wave

pytestmark = pytest.mark.anyio


class World:
    """Three sources with two rows each of a matrix, two destinations with three, and a scale that all hold."""

    def __init__(self) -> None:
        self.sources = [torch.zeros(2, 40, dtype=torch.bfloat16) for _ in range(3)]
        self.scales = [torch.zeros(()) for _ in range(5)]
        # In column order: nothing about the destinations is contiguous.
        self.destinations = [torch.zeros(40, 3, dtype=torch.bfloat16).t() for _ in range(2)]
        rows = [
            *((view, 2 * i) for i, view in enumerate(self.sources)),
            *((view, 3 * i) for i, view in enumerate(self.destinations)),
        ]
        self.shards = [
            [Shard("w", view, (first, 0), (6, 40)), Shard("scale", scale, (), ())]
            for (view, first), scale in zip(rows, self.scales, strict=True)
        ]

    def programs(self, *, checksum: bool = True):
        """Chunks of one row of 80 bytes; two buckets each."""
        return planned(self.shards[:3], self.shards[3:], chunk_bytes=80, bucket_bytes=48, checksum=checksum)

    def crew(self, wires: Wires | None = None) -> Crew:
        return Crew(self.shards, self.programs(), wires=wires)

    def fill(self, seed: int) -> None:
        """Give the sources the weights of a step: random bits, NaN among them."""
        generator = torch.Generator().manual_seed(seed)
        for view in self.sources:
            as_bits(view).copy_(torch.randint(-(1 << 15), 1 << 15, view.shape, generator=generator))

        for scale in self.scales[:3]:
            scale.fill_(seed)

    def arrived(self) -> bool:
        """Whether every destination holds, bit for bit, what the sources do."""
        wanted = torch.cat([as_bits(view) for view in self.sources])
        found = torch.cat([as_bits(view) for view in self.destinations])
        return torch.equal(wanted, found) and all(torch.equal(self.scales[0], scale) for scale in self.scales[3:])

    def untouched(self) -> bool:
        return not any(view.view(torch.int16).any() for view in self.destinations) and not any(self.scales[3:])


def kind_of(reply: Reply) -> str:
    return reply.kind if isinstance(reply, Failure) else type(reply).__name__


@pytest.mark.parametrize("wire", ["fake", "gloo"])
async def test_weights_arrive_from_three_actors_at_two_run_after_run(wire: str) -> None:
    world = World()
    crew = world.crew(Wires() if wire == "fake" else None)
    assert [len(program.steps) for program in crew.programs] == [3, 2, 2, 4, 4]
    assert max(len(program.steps) for program in crew.programs) > 2
    sums = []
    for version in range(3):
        world.fill(version)
        assert not world.arrived()
        finished = await crew.sync(version, connect=version == 0)
        assert world.arrived()
        assert all(reply.staging_bytes == 2 * 48 for reply in finished)
        sums.append([reply.checksums for reply in finished])

    assert sums[0] != sums[1] != sums[2]
    assert [agent.version for agent in crew.agents] == [2] * 5
    assert not any(agent.torn for agent in crew.agents)
    expect(Done, await crew.ask_all(lambda actor: Close(crew.group)))
