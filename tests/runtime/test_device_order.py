"""What staging comes after on the device: its actor's own work, and what a relay pulls."""

from __future__ import annotations

import functools
from typing import cast

import pytest
import torch

from tests.runtime.host_gpus import GpuActor, GpuAgent, GpuStage, Machine, Stream
from tests.runtime.local_actors import holder, local
from tests.runtime.test_ahead import group_of, machine
from tests.runtime.transfer.crew import Crew, Wires, expect
from tests.runtime.transfer.test_fused import noise
from wavecast.runtime import Shard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.transfer.memory import as_bits
from wavecast.runtime.transfer.messages import Attach, Close, Done, Export, Exported
from wavecast.runtime.transfer.program import Program, compile_programs
from wavecast.scheduler import Schedule, Task, Wave

__all__ = ("local", "machine")

pytestmark = pytest.mark.anyio

POISON = 0x0BADF00D


@pytest.mark.usefixtures("local")
async def test_weights_that_a_trainers_stream_still_has_to_write_are_what_is_sent(machine: Machine) -> None:
    """An optimizer's step returns before the device has made it."""
    stage = GpuStage(machine)
    # Sums start when the actor's board is cleared, which comes after its stream as well.
    async with group_of(stage, transport="nccl", checksum=False) as group:
        for number in range(3):
            stage.renew(number)
            for actor in stage.trainers:
                assert isinstance(actor, GpuActor)
                for view in (holder(actor).matrix, holder(actor).scale):
                    view.view(torch.int32).fill_(POISON)

                actor.gpu.default.put_late(functools.partial(stage.fill_in, actor))

            report = await group.sync()
            assert (report.transport, report.pulled_nbytes) == ("nccl", 0)
            assert stage.arrived()


class Relay:
    """A trainer, an engine that pulls two rows from it and passes them on, and the engine that gets them so."""

    def __init__(self, machine: Machine) -> None:
        # In column order on the relay, so that it has to pack what it passes on.
        self.views = [torch.zeros(2, 64), torch.zeros(64, 2).t(), torch.zeros(2, 64)]
        shards = [[Shard("w", view, (0, 0), (2, 64))] for view in self.views]
        wires = Wires()
        self.gpus = [machine.gpu() for _ in shards]
        agents = [
            GpuAgent(lambda own=own: own, gpu=gpu, hooks={}, wires=wires)  # type: ignore[misc]
            for own, gpu in zip(shards, self.gpus, strict=True)
        ]
        self.crew = Crew(shards, self.programs(), wires=wires, agents=agents)

    def programs(self) -> tuple[Program, ...]:
        """No plan of the driver's lets a relay pull, but steps come in order whatever the plan is."""
        hops = [(0, 1, 0), (1, 2, 0), (0, 1, 1), (1, 2, 1)]
        tasks = [
            Task(number, (a,), (b,), 256, payload=(Route(a, (b,), "w", (row, 0), (1, 64), "float32", 256),))
            for number, (a, b, row) in enumerate(hops)
        ]
        return compile_programs(
            Schedule(tuple(Wave((task,)) for task in tasks)),
            actors=3,
            digest="digest",
            bucket_bytes=1 << 10,
            checksum=True,
            kernels=True,
            pulled=lambda route: route.sender == 0,
        )

    async def __aenter__(self) -> Relay:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.crew.ask_all(lambda actor: Close(self.crew.group))

    async def connect(self) -> None:
        await self.crew.connect()
        (exported,) = expect(Exported, [await self.crew.ask(0, Export(self.crew.run))])
        expect(Done, [await self.crew.ask(1, Attach(self.crew.run, (0,)), exported)])

    def hold_up_pulls(self) -> None:
        """Let what the relay pulls take as long as it can."""
        (session,) = self.crew.agents[1]._runs._sessions.values()
        puller = session.equipment.puller
        assert puller is not None
        for stream in puller._streams:
            cast("Stream", stream).put_late(lambda: None)


async def test_a_relay_passes_on_what_it_pulled_once_it_is_there(machine: Machine) -> None:
    async with Relay(machine) as relay:
        for version in range(3):
            noise(relay.views[0], version)
            await relay.crew.begin()
            if version == 0:
                await relay.connect()

            relay.hold_up_pulls()
            await relay.crew.move()
            assert all(torch.equal(as_bits(view), as_bits(relay.views[0])) for view in relay.views)
            assert relay.crew.mismatches(relay.crew.finish()) == []
            await relay.crew.commit(version)
