"""Tensors that move between syncs and in the middle of one, where bytes are staged as well as pulled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from ray.exceptions import PendingCallsLimitExceeded

from tests.runtime.host_gpus import GpuActor, GpuStage, Kept, Machine, bits, move
from tests.runtime.local_actors import LocalActor, holder, local
from tests.runtime.test_ahead import group_of, machine, warm
from wavecast.runtime import (
    ActorFailed,
    FixedShards,
    LayoutError,
    ParameterSyncGroup,
    Shard,
    Torn,
    TransportUnavailable,
)
from wavecast.runtime.transfer import holding, lending
from wavecast.runtime.transfer.messages import Begin, RunStep, decode
from wavecast.runtime.transfer.run import Run

__all__ = ("local", "machine")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

POISON = 0x0BADF00D


class Many(Kept):
    """Holds more tensors than are looked at before a sync begins."""

    def transfer_shards(self) -> list[Shard]:
        if self.kept is None:
            super().transfer_shards()
            assert self.kept is not None
            self.many = [torch.zeros(2, 8) for _ in range(40)]
            self.kept += [Shard(f"m{number}", view, (self.first, 0), (4, 8)) for number, view in enumerate(self.many)]

        return self.kept


class Mixed(Kept):
    """Holds a tensor that the trainers have in float32 and the engines in bfloat16, so that it is staged."""

    dtype = torch.bfloat16

    def transfer_shards(self) -> list[Shard]:
        if self.kept is None:
            cast = torch.ones((2, 128), dtype=self.dtype)
            super().transfer_shards()
            assert self.kept is not None
            self.kept.insert(0, Shard("cast", cast, (self.first, 0), (4, 128)))

        return self.kept


def held(actor: LocalActor, kind: type[Kept]) -> Kept:
    assert isinstance(actor.worker, kind)
    return actor.worker


async def sync_twice(stage: GpuStage, group: ParameterSyncGroup) -> None:
    """Sync until the next one may run ahead."""
    for number in range(2):
        stage.renew(number)
        stage.take()
        await group.sync()

    assert stage.ran_ahead()
    for actor in stage.actors:
        await actor.settled()

    stage.take()


@pytest.mark.parametrize("transport", ["nccl", "auto"])
async def test_what_is_somebody_elses_by_now_is_not_written_to(machine: Machine, transport: str) -> None:
    """Of tensors that are not looked at before a sync begins as well."""
    stage = GpuStage(machine, kind=Many)
    async with group_of(stage, transport=transport) as group:
        await sync_twice(stage, group)
        engine = stage.replicas[0][0]
        assert isinstance(engine, GpuActor)
        memory = engine.agent._holding.memory
        assert memory is not None
        looked_at = {id(view) for view in memory._sample.views}
        many = held(engine, Many).many  # type: ignore[attr-defined]
        moved = next(view for view in many if id(view) not in looked_at)
        old = move(moved, POISON)
        for trainer in stage.trainers:
            for view in held(trainer, Many).many:  # type: ignore[attr-defined]
                view.fill_(7.0)

        await group.sync()
        assert set(bits(old).flatten().tolist()) == {POISON}
        assert (moved == 7.0).all()


def set_apart(actor: LocalActor) -> None:
    """Put the actor's matrix where nothing else is: into pages of its own."""
    held, page = holder(actor), 1 << 16
    room = torch.zeros(held.matrix.nbytes + 2 * page, dtype=torch.uint8)
    first = -room.data_ptr() % page
    held.matrix = room[first : first + held.matrix.nbytes].view(held.matrix.dtype).view(held.matrix.shape)


@pytest.mark.parametrize("kind", [Kept, Many, Mixed])
@pytest.mark.parametrize("only", [None, "trainable"])
async def test_memory_that_is_freed_and_allocated_anew_where_it_was_is_mapped_anew(
    machine: Machine, kind: type[Kept], only: str | None
) -> None:
    """As tensors look that were offloaded and reloaded: the allocator gives them the same addresses again."""
    stage = GpuStage(machine, kind=kind)
    if kind is Mixed:
        for trainer in stage.trainers:
            held(trainer, Mixed).dtype, held(trainer, Mixed).kept = torch.float32, None  # type: ignore[attr-defined]

    for trainer in stage.trainers:
        set_apart(trainer)

    async with group_of(stage) as group:
        await sync_twice(stage, group)
        for number in range(3):
            machine.remake(holder(stage.trainers[number % 2]).matrix)
            assert machine.stale()
            stage.renew(300 + number)
            await group.sync(only=only)  # type: ignore[arg-type]
            assert stage.arrived()
            assert machine.stale() == []
            stage.take()

        await sync_twice(stage, group)


async def test_memory_that_is_made_anew_while_it_is_pulled_is_noticed(machine: Machine) -> None:
    stage = GpuStage(machine)
    set_apart(stage.trainers[0])
    async with group_of(stage, transport="ipc") as group:
        await sync_twice(stage, group)

        def remake(request: object) -> None:
            if isinstance(request, RunStep):
                machine.remake(holder(stage.trainers[0]).matrix)

        stage.trainers[0].on_request = remake
        stage.renew(300)
        with pytest.raises(LayoutError, match=r"'matrix' at 0x[0-9a-f]+ was freed and allocated anew") as caught:
            await group.sync(only="trainable")

        assert caught.value.actors == (0,)


async def test_a_trainers_tensor_that_moves_while_it_is_pulled_beside_what_is_staged_is_noticed(
    machine: Machine,
) -> None:
    stage = GpuStage(machine, kind=Mixed)
    for trainer in stage.trainers:
        worker = held(trainer, Mixed)
        worker.dtype, worker.kept = torch.float32, None  # type: ignore[attr-defined]

    async with group_of(stage) as group:
        await sync_twice(stage, group)
        stage.renew(301)
        gate = [False]
        for actor in stage.actors:
            (session,) = actor.agent._runs._sessions.values()
            assert session.equipment.puller is not None
            for stream in session.equipment.puller._streams:
                stream.put_waiting(lambda: gate[0])  # type: ignore[attr-defined]

        (session,) = stage.trainers[0].agent._runs._sessions.values()
        queue, moved = session.steps.queue_first, []

        def move_behind(run: Run, requests: object) -> object:
            fences = queue(run, requests)  # type: ignore[arg-type]
            if not moved:
                # All is queued, nothing has been read yet.
                moved.append(move(holder(stage.trainers[0]).matrix, POISON))
                machine.open_gate(gate)

            return fences

        session.steps.queue_first = move_behind  # type: ignore[method-assign, assignment]
        await group.sync()
        assert moved
        assert stage.arrived()
        assert POISON not in bits(holder(stage.replicas[0][0]).matrix).flatten().tolist()


@pytest.mark.parametrize("transport", ["auto", "ipc"])
async def test_memory_that_turns_out_not_to_be_shared_goes_another_way(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """A few allocations are tried at the begin; others may be refused when they are to be shared."""
    stage = GpuStage(machine)
    refused = {
        view.data_ptr() >> 16 for actor in stage.trainers for view in (holder(actor).scale, holder(actor).matrix)
    }
    tried = lending.Exporter

    class Refusing(tried):  # type: ignore[misc, valid-type]
        def locate(self, address: int) -> tuple[int, int]:
            if address >> 16 in refused:
                raise TransportUnavailable("cuIpcGetMemHandle failed with CUDA_ERROR_INVALID_VALUE (1)")

            return super().locate(address)  # type: ignore[no-any-return]

    monkeypatch.setattr(holding, "why_not_shared", lambda memory: "")
    monkeypatch.setattr(lending, "Exporter", Refusing)
    async with group_of(stage, transport=transport) as group:
        stage.renew(1)
        if transport == "ipc":
            with pytest.raises(TransportUnavailable, match="CUDA_ERROR_INVALID_VALUE") as caught:
                await group.sync()

            assert caught.value.phase == "connect"
            assert caught.value.actors in ((0,), (1,))
        else:
            report = await group.sync()
            assert stage.arrived()
            assert report.transport == "nccl"
            assert "actor 2 cannot read the memory of actor 0" in report.transport_reasons
            assert not (await group.sync()).planned


async def test_a_begin_that_is_not_sent_leaves_nothing_whole_that_others_may_have_written(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        last = stage.replicas[0][1]
        send = last.remote

        def refuse(call: bytes, *attachments: object) -> object:
            request, _ = decode(call)  # type: ignore[misc]
            if isinstance(request, Begin):
                raise PendingCallsLimitExceeded("the test's")

            return send(call, *attachments)  # type: ignore[arg-type]

        last.remote = refuse  # type: ignore[method-assign, assignment]
        with pytest.raises(ActorFailed) as caught:
            await group.sync(deadline=5)

        assert caught.value.actors == (3,)
        assert group.versions() == caught.value.versions == {0: Torn(1, 2)}
        last.remote = send  # type: ignore[method-assign]
        await group.sync()
        assert stage.arrived()


class Promised(Many):
    """Promises that its tensors do not move, until it says otherwise."""

    promise: FixedShards | None = None

    def transfer_shards(self) -> Sequence[Shard]:
        found = super().transfer_shards()
        if self.promise is None:
            self.promise = FixedShards(found)

        return self.promise


@pytest.mark.parametrize("transport", ["nccl", "auto"])
async def test_fixed_shards_are_synced_and_those_made_anew_may_be_anywhere(machine: Machine, transport: str) -> None:
    stage = GpuStage(machine, kind=Promised)
    async with group_of(stage, transport=transport) as group:
        await sync_twice(stage, group)
        assert stage.arrived()
        for actor in stage.actors:
            worker = held(actor, Promised)
            worker.matrix.data = worker.matrix.clone()
            worker.promise = None

        stage.renew(7)
        await group.sync()
        assert stage.arrived()


@pytest.mark.parametrize("transport", ["nccl", "auto"])
async def test_actors_whose_tensors_move_to_another_gpu_work_there(machine: Machine, transport: str) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, transport=transport) as group:
        await sync_twice(stage, group)
        for number, actor in enumerate((stage.trainers[1], stage.replicas[0][0])):
            assert isinstance(actor, GpuActor)
            left, gpu = actor.gpu, machine.gpu()
            actor.move_to(gpu)
            stage.renew(200 + number)
            stage.take()
            await group.sync()
            assert stage.arrived()
            (session,) = actor.agent._runs._sessions.values()
            board, puller = session.announcer.board, session.equipment.puller
            assert board is not None
            assert puller is not None
            assert (board._stream.gpu, puller.device) == (gpu, gpu)  # type: ignore[attr-defined, comparison-overlap]
            # Nothing is queued any more on the device that was left.
            queued = left.queued
            await sync_twice(stage, group)
            assert stage.arrived()
            assert left.queued == queued
