"""Syncs that run ahead, against what is slow beside them: a peer's begin, an engine's own stream."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence

import anyio
import pytest
import torch

from tests.runtime.host_gpus import GpuStage, Machine, kept
from tests.runtime.local_actors import Answer, holder, local
from tests.runtime.test_ahead import POISON, gpu_actor, group_of, is_ahead, machine, warm
from tests.runtime.transfer.crew import ThreadHost
from wavecast.runtime import LayoutError, Shard, Torn
from wavecast.runtime.transfer import tables
from wavecast.runtime.transfer.messages import Abort, Begin, Request

__all__ = ("local", "machine")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


async def test_a_pull_comes_after_what_the_engines_own_stream_had_to_do(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        gate = [False]
        for actor in stage.replicas[0]:
            stream = gpu_actor(actor).gpu.default
            stream.put_waiting(functools.partial(all, gate))
            stream.put(functools.partial(holder(actor).matrix.view(torch.int32).fill_, POISON))

        queued = pulls_queued(machine, monkeypatch, len(stage.replicas[0]))
        sync = asyncio.ensure_future(group.sync())
        await queued.wait()
        machine.advance()
        assert stage.bits() == before
        assert machine.reads == []
        machine.open_gate(gate)
        await sync
        assert stage.arrived()


async def test_a_layout_that_changed_is_planned_anew_though_a_peer_is_still_busy_when_a_step_has_failed(
    machine: Machine,
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        kept(stage.replicas[0][0]).hold(0, 1)
        kept(stage.replicas[0][1]).hold(1, 3)
        stage.renew(7)
        busy = gpu_actor(stage.trainers[1])
        gate = busy.held[Begin] = asyncio.Event()
        # It is through as soon as the driver has come to a conclusion.
        busy.on_request = lambda request: gate.set() if isinstance(request, Abort) else None
        report = await group.sync()
        assert stage.arrived()
        assert report.planned


async def test_a_layout_that_can_no_longer_be_served_leaves_a_replica_torn_that_was_written_to(
    machine: Machine,
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        changed = gpu_actor(stage.replicas[0][0])
        kept(changed).kept = [*kept(changed).transfer_shards(), Shard("more", torch.zeros(4), (0,), (4,))]
        gate = changed.held[Begin] = asyncio.Event()
        written = stage.answered(stage.replicas[0][1], "RunStep")
        sync = asyncio.ensure_future(group.sync())
        await written.wait()
        gate.set()
        with pytest.raises(LayoutError, match="more") as caught:
            await sync

        # By then an engine had been written to: it says so, and so does the group.
        assert stage.bits()[1] != before[1]
        assert caught.value.versions == await group.refresh() == {0: Torn(1, 2)}
        kept(changed).kept = None
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


def pulls_queued(machine: Machine, monkeypatch: pytest.MonkeyPatch, receivers: int) -> asyncio.Event:
    """Return what is set once copies were queued on the streams of so many receivers."""
    found, loop = asyncio.Event(), asyncio.get_running_loop()
    launch, copy = tables._launch, machine.copy
    streams: set[int] = set()

    def note(stream: int) -> None:
        streams.add(stream)
        if len(streams) == receivers:
            loop.call_soon_threadsafe(found.set)

    def launched(*of: object) -> None:
        launch(*of)  # type: ignore[arg-type]
        if of[4] == "COPY":
            note(machine.current_stream().cuda_stream)

    def copied(copies: Sequence[tuple[int, int, int]], stream: int) -> None:
        copy(copies, stream)
        note(stream)

    monkeypatch.setattr(tables, "_launch", launched)
    monkeypatch.setattr(machine, "copy", copied)
    return found


@pytest.mark.parametrize(("needs", "brings"), [("Compare", "Probe"), ("Attach", "Export")])
async def test_what_takes_an_answer_along_is_asked_once_that_is_there(
    machine: Machine, needs: str, brings: str
) -> None:
    """A call that waits for its attachment has not been delivered, and cannot be cancelled."""
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        stage.renew(1, finite=True)
        await group.sync(validate=True)

    owed, taken = 0, 0
    for what, _, name in stage.log:
        owed += (what == "asked") - (what == "answered") if name == brings else 0
        if (what, name) == ("asked", needs):
            taken += 1
            assert owed == 0

    assert taken >= 2


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("options", [{}, {"task_allowance": 1000.0}])
async def test_what_a_begin_said_is_not_noted_over_how_the_run_ended(
    machine: Machine, options: dict[str, object], turns: int
) -> None:
    """The caller is cancelled in any turn of the loop around the last answer to a begin, all steps being through."""
    stage = GpuStage(machine)
    async with group_of(stage, **options) as group:
        await warm(stage, group)
        gate, slow = asyncio.Event(), stage.trainers[0]
        serve = slow._serve

        async def late(request: Request, host: ThreadHost, attachments: Sequence[Answer]) -> bytes:
            answer = await serve(request, host, attachments)
            if isinstance(request, Begin):
                await gate.wait()

            return answer

        slow._serve = late  # type: ignore[method-assign]
        sync = asyncio.ensure_future(group.sync(2))
        await asyncio.sleep(0)
        run = group._runner._run
        assert run is not None
        with anyio.fail_after(10):
            while len(run._moving.finished) < len(stage.actors):  # noqa: ASYNC110
                await asyncio.sleep(0)

        gate.set()
        for _ in range(turns):
            await asyncio.sleep(0)

        sync.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sync

        said = group.versions()[0]
        # A driver that was not told of the end takes the replica for torn; never for what it was before.
        assert isinstance(said, Torn) or said == (await group.refresh())[0]
