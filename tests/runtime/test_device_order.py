"""What staging comes after on the device: its actor's own work."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.runtime.host_gpus import GpuActor, GpuStage, Machine
from tests.runtime.local_actors import holder, local
from tests.runtime.test_ahead import group_of, machine

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
