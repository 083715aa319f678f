"""Whole syncs over GPUs of host memory: what is pulled, and steps that are asked for before begins are answered."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.runtime import host_gpus
from tests.runtime.host_gpus import GpuActor, GpuStage, Kept, Machine, bits, kept, move
from tests.runtime.local_actors import ELEMENTS, Holder, LocalActor, holder, local
from wavecast.runtime import (
    ActorDied,
    ActorFailed,
    ChecksumMismatch,
    ModelGroup,
    ParameterSyncGroup,
    Shard,
    SyncError,
    SyncOptions,
    SyncTimeout,
    Torn,
)
from wavecast.runtime.transfer import arrivals
from wavecast.runtime.transfer.messages import Begin, Commit, Request

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

#: Two rows of 384 bytes and a scale, in chunks of at most 256, to one engine.
STEPS = 4
#: The receivers end it among themselves, and each sender by itself: nobody is asked to commit.
WARM = ["Begin", *["RunStep"] * STEPS]
#: In shadow the driver commits, and the engines are asked first whether they can.
COMMITTED = [*WARM, "Commit"]
VOTED = [*WARM, "RunHook", "Commit"]
POISON = 0x0BADF00D


@pytest.fixture(params=["kernel", "engine"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Streams that run into each other do it in either order; copies go either way."""
    if request.param == "engine":
        monkeypatch.setattr(arrivals, "_ENGINE_NBYTES", 64)

    before = set(threading.enumerate())
    found = host_gpus.install(monkeypatch, backwards=request.param == "engine")
    yield found
    # A lane that was left behind must not come to the machine of the next test.
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("wavecast-")]
    for thread in left:
        thread.join(5)

    assert not any(thread.is_alive() for thread in left)
    assert found.strays == []


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as found:
        yield found


def group_of(stage: GpuStage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


def gpu_actor(actor: LocalActor) -> GpuActor:
    assert isinstance(actor, GpuActor)
    return actor


async def warm(stage: GpuStage, group: ParameterSyncGroup) -> None:
    """Sync once, so that the next may run ahead, and give the trainers new weights."""
    await group.sync(1)
    assert stage.arrived()
    for actor in stage.actors:
        await actor.settled()

    stage.take()
    stage.machine.reads.clear()
    stage.renew(100)


async def is_ahead(stage: GpuStage, group: ParameterSyncGroup, seed: int = 200, *, voting: int = 0) -> None:
    """Sync new weights, and require that it was warm."""
    stage.renew(seed)
    stage.take()
    report = await group.sync()
    assert stage.arrived()
    assert stage.ran_ahead()
    assert {actor.agent.version for replica in stage.replicas for actor in replica} == {report.version}
    plain = len(stage.actors) - voting
    assert stage.take() == [COMMITTED if voting else WARM] * plain + [VOTED] * voting


# What a warm sync asks.


async def test_a_warm_sync_is_one_begin_and_the_steps_and_the_receivers_commit_among_themselves(
    machine: Machine,
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await group.sync()
        cold = ["RunStep"] * STEPS
        assert stage.take() == [
            *[["Begin", "Load", "Export", *cold, "Commit"]] * 2,
            # The second engine's layout is another than the first's, both trainers' are those of the engines. Engines
            # read each other's boards, so they say where those are as well.
            *[["Status", "Begin", "Describe", "Load", "Export", "Attach", *cold, "Commit"]] * 2,
        ]
        for number in range(1, 4):
            stage.renew(number)
            report = await group.sync()
            assert stage.ran_ahead()
            assert stage.take() == [WARM] * 4
            assert (report.version, report.planned, report.connected) == (number, False, False)
            assert [actor.agent.version for actor in stage.actors] == [None, None, number, number]


async def test_weights_arrive_bit_for_bit_and_all_of_them_are_pulled(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        for number in range(5):
            stage.renew(number)
            report = await group.sync()
            assert stage.arrived()
            assert group.versions() == await group.refresh() == {0: number}
            # Two engines, two rows and a scale each.
            assert report.nbytes == report.pulled_nbytes == 2 * (2 * ELEMENTS * 4 + 4)
            assert (report.transport, report.transport_reasons) == ("ipc", ())
            assert (report.staging_bytes, report.communicator_bytes) == (0, 0)


async def test_a_sync_pulls_what_the_trainers_own_stream_has_yet_to_write(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        gates: list[list[bool]] = []
        for actor in stage.trainers:
            gate = [False]
            gates.append(gate)
            stream = gpu_actor(actor).gpu.default
            stream.put_waiting(functools.partial(all, gate))
            stream.put(functools.partial(stage.fill_in, actor))

        stage.renew(3)
        for actor in stage.trainers:
            holder(actor).matrix.view(torch.int32).fill_(POISON)

        looking = listening(machine, {2, 3})
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        assert stage.bits() == before
        assert machine.reads == []
        for gate in gates:
            machine.open_gate(gate)

        await sync
        assert stage.arrived()


async def test_sums_are_optional_and_a_chunk_may_be_all_there_is(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, checksum=False, chunk_bytes=1 << 20) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            await group.sync()
            assert stage.arrived()

        assert stage.ran_ahead()
        assert stage.take() == [["Begin", "RunStep"]] * 4


# What has changed meanwhile.


@pytest.mark.parametrize("name", ["matrix", "scale"])
async def test_a_senders_storage_that_moved_is_noticed_and_nothing_stale_is_pulled(machine: Machine, name: str) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        old = [move(getattr(holder(actor), name), POISON) for actor in stage.trainers]
        report = await group.sync()
        assert stage.arrived()
        assert (report.version, report.planned, report.connected) == (2, False, False)
        ahead = stage.take()
        assert [kinds.count("Begin") for kinds in ahead] == [2] * 4
        assert [kinds.count("Abort") for kinds in ahead] == [1] * 4
        # Engines too, whose boards are mapped anew after the run that was given up.
        assert [kinds.count("Export") for kinds in ahead] == [1, 1, 1, 1]
        assert [kinds.count("Attach") for kinds in ahead] == [0, 0, 1, 1]
        ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * 4) for tensor in old]
        assert machine.reads
        assert not [
            read for read in machine.reads for low, high in ranges if read[0] < high and low < read[0] + read[1]
        ]
        await is_ahead(stage, group)


async def test_a_receivers_storage_that_moved_is_written_where_it_is_now(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        old = [move(holder(actor).matrix, POISON) for actor in stage.replicas[0]]
        await group.sync()
        assert stage.arrived()
        assert all(set(bits(tensor).flatten().tolist()) == {POISON} for tensor in old)
        assert stage.take() == [WARM] * 4
        await is_ahead(stage, group)


async def test_shards_that_are_made_anew_for_each_sync_arrive_too(machine: Machine) -> None:
    stage = GpuStage(machine, kind=Holder)
    async with group_of(stage) as group:
        for number in range(3):
            stage.renew(number)
            await group.sync()
            assert stage.arrived()


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("rows", [(0, 3), (1, 3)])
async def test_a_layout_that_changed_is_planned_anew_in_the_same_call(
    machine: Machine, side: str, rows: tuple[int, int]
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        actors = stage.trainers if side == "source" else stage.replicas[0]
        if rows == (0, 3):
            kept(actors[0]).hold(0, 3)
            kept(actors[1]).hold(3, 1)
        else:
            # Both hold rows that the other holds as well.
            kept(actors[0]).hold(0, 3)
            kept(actors[1]).hold(1, 3)

        stage.renew(7)
        report = await group.sync()
        assert stage.arrived()
        assert (report.version, report.planned) == (2, True)
        assert stage.ran_ahead()
        stage.take()
        stage.renew(8)
        report = await group.sync()
        assert stage.arrived()
        assert stage.ran_ahead()
        assert not report.planned
        assert [kinds.count("Begin") for kinds in stage.take()] == [1] * 4


async def test_a_layout_that_changed_is_planned_anew_though_a_step_fails_before_all_have_begun(
    machine: Machine,
) -> None:
    """The engines no longer hold what the old plan has them write; one peer is slow to begin."""
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        kept(stage.replicas[0][0]).hold(0, 1)
        kept(stage.replicas[0][1]).hold(1, 3)
        stage.renew(7)
        slow = gpu_actor(stage.trainers[1])
        gate = slow.held[Begin] = asyncio.Event()
        failed = stage.answered(stage.replicas[0][0], "RunStep")
        sync = asyncio.ensure_future(group.sync())
        await failed.wait()
        gate.set()
        report = await sync
        assert stage.arrived()
        assert report.planned


async def test_a_version_that_another_group_brought_meanwhile_is_noticed(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group, group_of(stage) as other:
        await warm(stage, group)
        await other.sync(5)
        stage.renew(6)
        report = await group.sync()
        assert stage.arrived()
        assert report.version == 6
        assert await other.refresh() == {0: 6}
        await is_ahead(stage, group)


# Failures.


class Failing(Kept):
    """Fails when told to."""

    failing = False

    def transfer_shards(self) -> Sequence[Shard]:
        if self.failing:
            raise ValueError("the engine would not pause")

        return super().transfer_shards()


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_a_hook_that_raises_ends_the_sync_as_the_actors_failure_and_the_next_one_heals(
    machine: Machine, number: int
) -> None:
    stage = GpuStage(machine, kind=Failing)
    async with group_of(stage) as group:
        await warm(stage, group)
        worker = kept(stage.actors[number])
        assert isinstance(worker, Failing)
        worker.failing = True
        with pytest.raises(ActorFailed, match="ValueError: the engine would not pause") as caught:
            await group.sync()

        assert caught.value.actors == (number,)
        assert stage.ran_ahead()
        worker.failing = False
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


class Slow(Kept):
    """Waits in its hook when told to."""

    gate: asyncio.Event | None = None

    async def before_sync(self, version: int) -> None:
        self.calls.append(f"before_sync {version}")
        if self.gate is not None:
            await self.gate.wait()
            raise ValueError("the engine would not pause")

    def after_commit(self, version: int) -> None:
        self.calls.append(f"after_commit {version}")

    def after_abort(self, version: int) -> None:
        self.calls.append(f"after_abort {version}")


async def test_no_engine_is_written_before_all_engines_hooks_have_returned(machine: Machine) -> None:
    stage = GpuStage(machine, kind=Slow)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        engine = kept(stage.replicas[0][0])
        assert isinstance(engine, Slow)
        engine.gate = asyncio.Event()
        # The other one is either asked for no step yet, or does one.
        begun = stage.answered(stage.replicas[0][1], "Begin")
        sync = asyncio.ensure_future(group.sync())
        await begun.wait()
        if stage.ran_ahead():
            await stage.answered(stage.replicas[0][1], "RunStep").wait()

        engine.gate.set()
        with pytest.raises(ActorFailed, match="would not pause"):
            await sync

        assert stage.bits() == before
        assert group.versions() == {0: 1}


async def test_where_an_engine_pauses_first_nothing_is_asked_for_ahead_and_each_hook_runs_once(
    machine: Machine,
) -> None:
    stage = GpuStage(machine, kind=Slow)
    async with group_of(stage) as group:
        await warm(stage, group)
        for actor in stage.actors:
            kept(actor).calls.clear()

        for actor in stage.trainers:
            move(holder(actor).matrix, POISON)

        await group.sync()
        assert stage.arrived()
        assert [kept(actor).calls for actor in stage.actors] == [["before_sync 2", "after_commit 2"]] * 4
        assert not stage.ran_ahead()


async def test_a_receiver_waits_at_the_bell_of_a_sender_that_never_begins_until_the_deadline(
    machine: Machine,
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        gates = [actor.held.setdefault(Begin, asyncio.Event()) for actor in map(gpu_actor, stage.trainers)]
        looking = listening(machine, {2, 3})
        start = time.monotonic()
        with pytest.raises(SyncError) as caught:
            await group.sync(deadline=0.3)

        assert 0.3 <= time.monotonic() - start < 1.3
        assert looking.is_set()
        assert caught.value.phase == "transfer"
        assert caught.value.versions == {0: Torn(1, 2)}
        assert stage.bits() == before
        assert machine.reads == []
        for gate in gates:
            gate.set()

        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


@pytest.mark.parametrize("number", [0, 2])
async def test_an_actor_that_never_begins_is_named_by_a_timeout(machine: Machine, number: int) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        gpu_actor(stage.actors[number]).held[Begin] = asyncio.Event()
        with pytest.raises(SyncTimeout) as caught:
            await group.sync(deadline=0.3)

        assert number in caught.value.actors


async def test_a_death_before_all_have_begun_is_told_as_such(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        gpu_actor(stage.trainers[0]).held[Begin] = asyncio.Event()
        begun = stage.answered(stage.replicas[0][1], "Begin")
        sync = asyncio.ensure_future(group.sync())
        await begun.wait()
        stage.replicas[0][1].kill()
        with pytest.raises(ActorDied) as caught:
            await sync

        assert caught.value.actors == (3,)

    # As the end of its process would.
    for session in stage.replicas[0][1].agent._runs._sessions.values():
        session.close()


async def test_a_caller_that_is_cancelled_while_receivers_wait_at_the_bell(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        before = stage.bits()
        gates = [actor.held.setdefault(Begin, asyncio.Event()) for actor in map(gpu_actor, stage.trainers)]
        looking = listening(machine, {2, 3})
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        start = time.monotonic()
        sync.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sync

        assert time.monotonic() - start < 1
        assert stage.bits() == before
        assert machine.reads == []
        for gate in gates:
            gate.set()

        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("number", [0, 2])
async def test_a_step_that_comes_before_its_begin_waits_for_it(
    machine: Machine, pool: ThreadPoolExecutor, threaded: bool, number: int
) -> None:
    stage = GpuStage(machine, pool=pool if threaded else None)
    async with group_of(stage) as group:
        await warm(stage, group)
        early = gpu_actor(stage.actors[number])
        gate = early.held[Begin] = asyncio.Event()
        came, loop = asyncio.Event(), asyncio.get_running_loop()
        early.agent._runs.on_early = lambda: loop.call_soon_threadsafe(came.set)
        sync = asyncio.ensure_future(group.sync())
        await came.wait()
        assert len(early.agent._runs._early) > 0
        gate.set()
        await sync
        assert stage.arrived()
        assert early.agent._runs._early == []
        assert stage.take() == [WARM] * 4


async def test_a_byte_that_is_not_what_was_sent_is_found_and_the_next_sync_heals(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        corrupt(machine, stage.replicas[0][1])
        with pytest.raises(ChecksumMismatch) as caught:
            await group.sync(2)

        assert caught.value.tensor == "matrix"
        assert caught.value.actors == (1, 3)
        assert caught.value.versions == {0: Torn(1, 2)}
        await group.sync(3)
        assert stage.arrived()
        await is_ahead(stage, group)


async def test_a_retry_heals_it_in_the_same_call(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, retries=1) as group:
        await warm(stage, group)
        corrupt(machine, stage.replicas[0][0])
        report = await group.sync(2)
        assert report.attempts == 2
        assert stage.arrived()
        await is_ahead(stage, group)


# Plans of other kinds.


async def test_two_replicas_pull_routes_that_were_parted(machine: Machine) -> None:
    stage = GpuStage(machine, trainers=4, replicas=2)
    async with group_of(stage) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            report = await group.sync()
            assert stage.arrived()
            assert report.transport == "ipc"
            assert report.nbytes == report.pulled_nbytes == 4 * (2 * ELEMENTS * 4 + 4)
            assert report.routes == 12
            assert stage.ran_ahead() is (number > 0)

        assert [kinds.count("Begin") for kinds in stage.take()] == [1] * 8
        assert group.versions() == {0: 2, 1: 2}


@pytest.mark.parametrize("transport", ["nccl", "gloo"])
async def test_what_is_moved_runs_ahead_where_its_members_can_meet_before_it(machine: Machine, transport: str) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, transport=transport) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            report = await group.sync()
            assert stage.arrived()
            assert (report.transport, report.pulled_nbytes) == (transport, 0)
            assert stage.ran_ahead() is (transport == "nccl" and number > 0)

        assert [kinds.count("Commit") for kinds in stage.take()] == [int(transport == "gloo")] * 4


async def test_what_is_moved_beside_what_is_pulled_runs_ahead_with_it(machine: Machine) -> None:
    """Each row goes to two engines from one trainer, which sends it once by a broadcast; the rest is pulled."""
    stage = GpuStage(machine, replicas=2)
    async with group_of(stage) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            report = await group.sync()
            assert stage.arrived()
            assert report.pulled_nbytes < report.nbytes
            assert stage.ran_ahead() is (number > 0)


@pytest.mark.parametrize("asked", [{"only": {"scale"}}, {"validate": True}, {"dry_run": True}])
async def test_only_validate_and_dry_run_never_run_ahead(machine: Machine, asked: dict[str, object]) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        stage.renew(101, finite=True)
        before = stage.bits()
        await group.sync(**asked)  # type: ignore[arg-type]
        assert not stage.ran_ahead()
        assert [kinds.count("Begin") for kinds in stage.take()] == [1] * 4
        assert (stage.bits() == before) is ("validate" not in asked)
        assert stage.arrived() is ("validate" in asked)
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


async def test_in_shadow_the_weights_stay_whole_until_the_commit(machine: Machine) -> None:
    stage = GpuStage(machine)
    seen: list[list[list[int]]] = []

    def look(request: Request) -> None:
        if isinstance(request, Commit):
            seen.append(stage.bits())

    async with group_of(stage, staging="shadow") as group:
        await warm(stage, group)
        before = stage.bits()
        stage.trainers[0].on_request = look
        report = await group.sync()
        assert seen == [before]
        assert stage.arrived()
        assert stage.ran_ahead()
        assert stage.take() == [COMMITTED, COMMITTED, VOTED, VOTED]
        assert report.shadow_bytes == 2 * ELEMENTS * 4 + 4
        corrupt(machine, stage.replicas[0][0])
        old = stage.bits()
        stage.renew(3)
        with pytest.raises(ChecksumMismatch) as caught:
            await group.sync()

        assert caught.value.versions == {0: 2}
        assert stage.bits() == old
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group, voting=2)


# Mappings.


async def test_every_mapping_is_given_back_when_the_group_is_closed(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        kept_open = machine.opened.total()
        assert kept_open > 0
        await group.sync()
        assert machine.opened.total() == kept_open
        corrupt(machine, stage.replicas[0][0])
        with pytest.raises(ChecksumMismatch):
            await group.sync()

        for number in range(3):
            for actor in stage.trainers:
                move(holder(actor).matrix, POISON)

            stage.renew(number)
            await group.sync()
            assert stage.arrived()
            # Memory that moved may lie in another page, but nothing stays open twice.
            assert set(machine.opened.values()) <= {0, 1}

        lanes = stage.lanes()

    for lane in lanes:
        lane.join(5)

    assert machine.opened.total() == 0


async def test_a_receiver_that_cannot_map_a_sender_gets_its_bytes_over_the_communicator(machine: Machine) -> None:
    stage = GpuStage(machine)
    machine.refused.add(3)
    async with group_of(stage) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            report = await group.sync()
            assert stage.arrived()
            assert report.transport == "ipc+nccl"
            # The scale goes to both engines, and one of them cannot pull it.
            assert report.pulled_nbytes == 2 * ELEMENTS * 4
            assert "actor 3 cannot read the memory of actor 1" in report.transport_reasons
            assert report.planned is report.connected is (number == 0)
            assert not stage.ran_ahead()

        lanes = stage.lanes()

    for lane in lanes:
        lane.join(5)

    assert machine.opened.total() == 0


async def test_a_mapping_that_is_refused_later_is_planned_around_in_the_same_call(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        machine.refused.add(2)
        for actor in stage.trainers:
            move(holder(actor).matrix, POISON)

        report = await group.sync()
        assert stage.arrived()
        assert report.transport == "ipc+nccl"
        assert (report.planned, report.connected) == (True, True)


@pytest.mark.parametrize("later", [False, True])
async def test_nccl_alone_does_without_boards_that_cannot_be_mapped(machine: Machine, later: bool) -> None:
    """Nothing is pulled, so nothing is lost but the head start that boards give; it is said once and for all."""
    stage = GpuStage(machine)
    everyone = set(range(len(stage.actors)))
    async with group_of(stage, transport="nccl") as group:
        if later:
            await group.sync()
            machine.refused |= everyone
            # What is mapped stays so until something has failed.
            corrupt(machine, stage.replicas[0][0])
            with pytest.raises(ChecksumMismatch):
                await group.sync()

        machine.refused |= everyone
        for number in range(3):
            stage.renew(number)
            stage.take()
            report = await group.sync()
            assert stage.arrived()
            assert report.transport == "nccl"
            # As soon as one is missing the others are of no use.
            assert any("cannot read the memory of actor" in reason for reason in report.transport_reasons)
            assert report.planned is (number == 0)
            assert not stage.ran_ahead()


# What the tests look for.


def listening(machine: Machine, gpus: set[int]) -> asyncio.Event:
    """Return what is set once all of ``gpus`` have looked at a bell since now, a second time too."""
    found, loop = asyncio.Event(), asyncio.get_running_loop()
    looks: dict[int, int] = dict.fromkeys(gpus, 0)

    def look(gpu: int, address: int) -> None:
        if gpu not in looks:
            return

        looks[gpu] += 1
        if min(looks.values()) == 2 and looks[gpu] == 2:
            loop.call_soon_threadsafe(found.set)

    machine.on_listen = look
    return found


def corrupt(machine: Machine, actor: LocalActor) -> None:
    """Flip a bit of the next bytes of the matrix that ``actor`` is written to."""
    shadow = actor.agent._weights._shadow
    own = shadow.memory.shards[0].view if shadow is not None else holder(actor).matrix
    assert isinstance(own, torch.Tensor)
    low, high = own.data_ptr(), own.data_ptr() + own.numel() * 4

    def flip(address: int) -> None:
        if low <= address < high:
            machine.on_copy = lambda address: None
            (byte,) = ctypes.string_at(address, 1)
            ctypes.memmove(address, bytes([byte ^ 1]), 1)

    machine.on_copy = flip
