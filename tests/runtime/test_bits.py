"""Whole syncs, bit by bit: NaN payloads, what a reader sees meanwhile, and actors that disagree on the plan."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from tests.runtime.local_actors import ELEMENTS, LocalActor, Stage, holder, local
from wavecast.runtime import (
    ModelGroup,
    ParameterSyncGroup,
    SyncError,
    SyncOptions,
    Torn,
    ValidationError,
    ValidationReceipt,
)
from wavecast.runtime.transfer.messages import Begin, Commit, Request, RunStep
from wavecast.scheduler import TaskReceipt

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

#: Quiet and signalling, of both signs.
_PAYLOADS = (0x7FC00001, 0x7FA5A5A5, 0xFFC12345, 0xFF800001)


def group_of(stage: Stage, staging: str = "in_place") -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(transport="gloo", chunk_bytes=1 << 8, staging=staging),  # type: ignore[arg-type]
    )


def bits(actor: LocalActor) -> torch.Tensor:
    """All bits that an actor holds, copied."""
    held = holder(actor)
    return torch.cat([held.matrix.flatten().view(torch.int32), held.scale.view(1).view(torch.int32)])


def fill_with_nan(actor: LocalActor, first: int) -> None:
    """Give every element a NaN of a payload of its own kind, and the scale a number."""
    payloads = [_PAYLOADS[(first + index) % len(_PAYLOADS)] for index in range(2 * ELEMENTS)]
    held = holder(actor)
    held.matrix.view(torch.int32).copy_(torch.tensor(payloads, dtype=torch.int64).to(torch.int32).view(2, ELEMENTS))


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_nan_of_any_payload_arrive_bit_for_bit(staging: str) -> None:
    stage = Stage()
    for rank, trainer in enumerate(stage.trainers):
        fill_with_nan(trainer, rank)

    async with group_of(stage, staging) as group:
        await group.sync(1)

    for replica in stage.replicas:
        for trainer, engine in zip(stage.trainers, replica, strict=True):
            assert holder(engine).matrix.isnan().all()
            assert torch.equal(bits(engine), bits(trainer))


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_where_validated_a_source_with_nan_is_refused_and_nothing_is_written(staging: str) -> None:
    stage = Stage()
    async with group_of(stage, staging) as group:
        await group.sync(1)
        stage.fill(2.0)
        holder(stage.trainers[1]).matrix[1, 3] = float("nan")
        with pytest.raises(ValidationError, match="'matrix' with 1 elements") as caught:
            await group.sync(2, validate=True)

        assert (caught.value.actors, caught.value.tensor) == ((1,), "matrix")
        assert caught.value.versions == group.versions() == {0: 1, 1: 1}
        assert stage.values(0) == stage.values(1) == {1.0}
        stage.fill(2.0)
        await group.sync(2, validate=True)
        assert stage.values(0) == stage.values(1) == {2.0}


async def test_what_was_compared_is_told_task_by_task() -> None:
    stage = Stage()
    told: list[TaskReceipt] = []
    async with group_of(stage) as group:
        await group.sync(1, progress=told.append)
        assert not any(isinstance(receipt, ValidationReceipt) for receipt in told)
        moved = {receipt.task: (receipt.wave, receipt.nbytes) for receipt in told}
        told.clear()
        report = await group.sync(2, validate=True, progress=told.append)
        compared = [receipt for receipt in told if isinstance(receipt, ValidationReceipt)]
        assert {receipt.task: (receipt.wave, receipt.nbytes) for receipt in compared} == moved
        # All of them come after all that was moved, one after the other.
        assert told[-len(compared) :] == compared
        assert len(told) == 2 * len(moved)
        times = [moment for receipt in compared for moment in (receipt.started, receipt.finished)]
        assert times == sorted(times)
        assert 0 <= times[0] <= times[-1] <= report.seconds.verify

        def refuse(receipt: TaskReceipt) -> None:
            if isinstance(receipt, ValidationReceipt):
                raise ValueError("the user's own")

        with pytest.raises(SyncError, match=r"the driver's own code failed beside task .*the user's own") as caught:
            await group.sync(3, validate=True, progress=refuse)

        assert caught.value.phase == "verify"
        await group.sync(3, validate=True)


async def test_where_validated_what_a_destination_held_before_may_be_nan() -> None:
    stage = Stage()
    for engine in (actor for replica in stage.replicas for actor in replica):
        fill_with_nan(engine, 0)

    async with group_of(stage) as group:
        await group.sync(1, validate=True)

    assert stage.values(0) == stage.values(1) == {1.0}


async def test_a_reader_sees_the_old_bits_until_the_flip_and_the_new_ones_from_then_on() -> None:
    stage = Stage()
    engines = [actor for replica in stage.replicas for actor in replica]
    for trainer in stage.trainers:
        fill_with_nan(trainer, 0)

    async with group_of(stage, "shadow") as group:
        await group.sync(1)
        old = [bits(engine) for engine in engines]
        stage.fill(2.0)
        told: set[int] = set()
        reads: list[str] = []

        def read(number: int, request: Request) -> None:
            """As any request arrives at any actor, read all engines that have not been told to commit."""
            if isinstance(request, Commit):
                told.add(number)

            reads.append(type(request).__name__)
            for index, engine in enumerate(engines):
                if 2 + index not in told:
                    assert torch.equal(bits(engine), old[index])

        for number, actor in enumerate(stage.actors):
            actor.on_request = lambda request, number=number: read(number, request)  # type: ignore[misc]

        await group.sync(2)
        assert stage.values(0) == stage.values(1) == {2.0}

    # It was read at the begin, all through the steps, and while the first had flipped and the last had not.
    assert reads.count(Begin.__name__) == reads.count(Commit.__name__) == 6
    assert reads.count(RunStep.__name__) >= 6
    assert told == {*range(6)}


@pytest.mark.parametrize("number", [0, 2], ids=["trainer", "engine"])
async def test_an_actor_with_another_plan_is_an_error_that_names_both_digests_and_the_next_sync_heals(
    number: int,
) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        stage.fill(2.0)
        (session,) = stage.actors[number].agent._runs._sessions.values()
        program = session.equipment._program
        assert program is not None
        session.equipment._program = replace(program, digest="another")
        start = time.monotonic()
        with pytest.raises(SyncError, match=f"has program another, it was asked to run {program.digest}") as caught:
            await group.sync(2, deadline=20.0)

        # Long before the deadline: those that wait for it in a collective are freed.
        assert time.monotonic() - start < 10
        assert caught.value.actors == (number,)
        assert caught.value.phase == "transfer"
        assert set(group.versions().values()) <= {1, Torn(1, 2)}
        assert (await group.sync(3)).version == 3
        assert stage.values(0) == stage.values(1) == {2.0}
