"""Warm syncs that the actors end among themselves: when they do, when they must not, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.runtime.host_gpus import GpuStage, Kept, Machine, bits, kept, move
from tests.runtime.local_actors import ELEMENTS, LocalActor, holder, local
from tests.runtime.test_ahead import (
    POISON,
    STEPS,
    corrupt,
    gpu_actor,
    group_of,
    is_ahead,
    listening,
    machine,
    pool,
    warm,
)
from tests.runtime.transfer.crew import ThreadHost
from wavecast.runtime import (
    ActorDied,
    ChecksumMismatch,
    GroupClosed,
    LayoutError,
    Shard,
    SyncAborted,
    SyncError,
    SyncTimeout,
    Torn,
)
from wavecast.runtime.opening import head_starts
from wavecast.runtime.transfer.board import AGREED, BEGUN
from wavecast.runtime.transfer.comm import Deadline, Fence
from wavecast.runtime.transfer.messages import Abort, Began, Begin, Close, Commit, Request, RunId, RunStep, Standing
from wavecast.runtime.transfer.program import Step
from wavecast.runtime.transfer.pull import Puller, Turn
from wavecast.runtime.transfer.slip import Slip

__all__ = ("local", "machine", "pool")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


def standings(stage: GpuStage) -> list[Standing]:
    return [actor.agent.standing for replica in stage.replicas for actor in replica]


def commits(stage: GpuStage) -> list[list[int | None]]:
    """What the engines have committed, each."""
    return [gpu_actor(actor).agent._runs.commits for replica in stage.replicas for actor in replica]


def agreeing(stage: GpuStage, reader: LocalActor, peer: LocalActor) -> asyncio.Event:
    """Return what is set once ``reader`` has looked whether ``peer`` agrees, a second time too."""
    found, loop = asyncio.Event(), asyncio.get_running_loop()
    (session,) = peer.agent._runs._sessions.values()
    assert session.announcer.board is not None
    # Of an engine's board nothing else is of use to another engine.
    board = session.announcer.board.page.data_ptr()
    looks: list[int] = []

    def look(gpu: int, address: int) -> None:
        if (gpu, address) == (gpu_actor(reader).gpu.index, board):
            looks.append(address)
            if len(looks) == 2:
                loop.call_soon_threadsafe(found.set)

    stage.machine.on_listen = look
    return found


def committed(stage: GpuStage) -> asyncio.Event:
    """Return what is set once every actor has committed once more."""
    found, loop = asyncio.Event(), asyncio.get_running_loop()
    before = sum(len(gpu_actor(actor).agent._runs.commits) for actor in stage.actors)

    def look() -> None:
        if sum(len(gpu_actor(actor).agent._runs.commits) for actor in stage.actors) == before + len(stage.actors):
            loop.call_soon_threadsafe(found.set)

    for actor in stage.actors:
        gpu_actor(actor).agent._runs.on_commit = look

    return found


# All end it.


@pytest.mark.parametrize("threaded", [False, True])
async def test_all_receivers_commit_by_themselves_and_say_their_version(
    machine: Machine, pool: ThreadPoolExecutor, threaded: bool
) -> None:
    stage = GpuStage(machine, trainers=4, replicas=2, pool=pool if threaded else None)
    async with group_of(stage) as group:
        await warm(stage, group)
        report = await group.sync(7)
        assert stage.arrived()
        assert [kinds.count("Commit") for kinds in stage.take()] == [0] * 8
        assert standings(stage) == [Standing(7, False, None)] * 4
        assert report.version == 7
        assert group.versions() == await group.refresh() == {0: 7, 1: 7}
        assert commits(stage) == [[1, 7]] * 4
        # Nothing is left of the run on any of them.
        assert [session.run for actor in stage.actors for session in actor.agent._runs._sessions.values()] == [None] * 8


async def test_steps_that_are_asked_for_after_their_run_has_closed_are_answered(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        gates = [actor.held.setdefault(RunStep, asyncio.Event()) for actor in map(gpu_actor, stage.actors)]
        over = committed(stage)
        sync = asyncio.ensure_future(group.sync())
        await over.wait()
        assert stage.arrived()
        assert [entry for entry in stage.log if entry[::2] == ("answered", "RunStep")] == []
        for gate in gates:
            gate.set()

        report = await sync
        assert (report.version, group.versions()) == (2, {0: 2})
        for actor in stage.actors:
            gpu_actor(actor).held.clear()

        await is_ahead(stage, group)


async def test_a_step_that_is_asked_for_while_its_begin_starts_it_is_done_once(
    machine: Machine, pool: ThreadPoolExecutor
) -> None:
    stage = GpuStage(machine, pool=pool)
    async with group_of(stage) as group:
        await warm(stage, group)
        engine = gpu_actor(stage.replicas[0][0])
        came = threading.Event()
        engine.agent._runs.on_step = came.set
        # Another thread is at the door by then.
        engine.agent._runs.on_let_close = lambda: came.wait(5)
        await group.sync()
        assert came.is_set()
        assert stage.arrived()
        assert standings(stage) == [Standing(2, False, None)] * 2


class Idle(Kept):
    """Holds nothing, when told to."""

    idle = False

    def transfer_shards(self) -> Sequence[Shard]:
        return [] if self.idle else super().transfer_shards()


async def test_an_actor_with_nothing_to_do_is_through_at_its_begin(machine: Machine) -> None:
    stage = GpuStage(machine, kind=Idle)
    async with group_of(stage) as group:
        kept(stage.trainers[0]).hold(0, 4)
        idle = stage.trainers[1].worker
        assert isinstance(idle, Idle)
        idle.idle = True
        stage.renew(1)
        await warm(stage, group)
        begun = stage.answered(stage.trainers[1], "Begin")
        held = gpu_actor(stage.replicas[0][1]).held[Begin] = asyncio.Event()
        sync = asyncio.ensure_future(group.sync())
        await begun.wait()
        (session,) = stage.trainers[1].agent._runs._sessions.values()
        assert session.run is None
        held.set()
        await sync
        assert stage.arrived()
        assert stage.take() == [
            ["Begin", *["RunStep"] * 2 * STEPS],
            ["Begin"],
            *[["Begin", *["RunStep"] * STEPS]] * 2,
        ]


# None does.


@pytest.mark.parametrize("number", [0, 1])
async def test_a_byte_that_differs_at_one_receiver_lets_none_commit(machine: Machine, number: int) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        corrupt(machine, stage.replicas[0][number])
        with pytest.raises(ChecksumMismatch) as caught:
            await group.sync(2)

        assert caught.value.versions == await group.refresh() == {0: Torn(1, 2)}
        assert standings(stage) == [Standing(1, True, 2)] * 2
        assert commits(stage) == [[1]] * 2
        await group.sync(3)
        assert stage.arrived()
        await is_ahead(stage, group)


async def test_a_retry_that_heals_is_the_first_to_commit_anywhere(machine: Machine) -> None:
    stage = GpuStage(machine, trainers=4, replicas=2)
    async with group_of(stage, retries=1) as group:
        await warm(stage, group)
        corrupt(machine, stage.replicas[1][0])
        report = await group.sync(2)
        assert report.attempts == 2
        assert stage.arrived()
        assert commits(stage) == [[1, 2]] * 4


@pytest.mark.parametrize("lost", [0, 1])
async def test_where_a_step_has_failed_nobody_commits_though_nothing_is_summed_up(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The later steps go well, and the driver hears of the failure after the last of them."""
    stage = GpuStage(machine)
    async with group_of(stage, checksum=False) as group:
        await warm(stage, group)
        engine = gpu_actor(stage.replicas[0][lost])
        receive = Puller.receive

        def fail_once(puller: Puller, step: Step, total: torch.Tensor | None, turn: Turn) -> Iterator[Fence]:
            if puller.device is engine.gpu and not failed:
                failed.append(step)
                yield Broken()

            yield from receive(puller, step, total, turn)

        failed: list[object] = []
        monkeypatch.setattr(Puller, "receive", fail_once)
        gate = engine.held[RunStep] = asyncio.Event()
        # The other engine's answer to its last step comes once it knows that this one does not agree.
        other = stage.replicas[0][1 - lost]
        stage.log.clear()
        asked = asyncio.ensure_future(answers(stage, other, STEPS))
        sync = asyncio.ensure_future(group.sync())
        await asked
        gate.set()
        with pytest.raises(SyncError, match="the copy was refused"):
            await sync

        assert commits(stage) == [[1]] * 2
        assert group.versions() == await group.refresh() == {0: Torn(1, 2)}
        del engine.held[RunStep]
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


class Broken:
    """What a copy that failed on the device is waited for by."""

    def wait(self, deadline: Deadline) -> None:
        raise SyncError("the copy was refused")


async def answers(stage: GpuStage, actor: LocalActor, count: int) -> None:
    """Wait until ``actor`` has answered so many steps."""
    wanted = ("answered", stage.actors.index(actor), "RunStep")
    while stage.log.count(wanted) < count:
        await stage.log.grown()


@pytest.mark.parametrize("asked", [None, 9])
@pytest.mark.parametrize("brought", [2, 5])
async def test_over_a_version_that_the_driver_does_not_know_of_no_actor_commits_by_itself(
    machine: Machine, asked: int | None, brought: int
) -> None:
    """Also not under the very number that another driver has given to other weights."""
    stage = GpuStage(machine)
    async with group_of(stage) as group, group_of(stage) as other:
        await warm(stage, group)
        await other.sync(brought)
        stage.renew(6)
        stage.take()
        report = await group.sync(asked)
        assert stage.arrived()
        assert report.version == (asked or brought + 1)
        assert commits(stage) == [[1, brought, report.version]] * 2
        # Told to by the driver.
        assert [kinds.count("Commit") for kinds in stage.take()][2:] == [1, 1]
        await is_ahead(stage, group)


async def test_torn_weights_of_a_source_are_refused_and_no_receiver_is_left_waiting(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        source = stage.trainers[0].agent
        source._weights._written_by, source._weights._was_torn = None, True
        # It may be a while until the driver hears of it: the others have begun, and done all they can.
        gate = gpu_actor(stage.trainers[1]).held[Begin] = asyncio.Event()
        # The second engine's rows are the second trainer's.
        looking, begun = listening(machine, {3}), stage.answered(stage.trainers[0], "Begin")
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        await begun.wait()
        machine.advance()
        (session,) = source._runs._sessions.values()
        assert session.announcer.board is not None
        serial = int(session.announcer.board.page[BEGUN])
        assert session.announcer.board.page[: AGREED + 1].tolist() == [serial, -serial, -serial]
        gate.set()
        start = time.monotonic()
        with pytest.raises(SyncError, match="a source's weights are torn"):
            await sync

        assert time.monotonic() - start < 1
        assert commits(stage) == [[1]] * 2
        source._weights._written_by, source._weights._was_torn = None, False
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_an_actor_of_another_layout_lets_nobody_commit_before_it_is_planned_anew(
    machine: Machine, side: str
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        actors = stage.trainers if side == "source" else stage.replicas[0]
        kept(actors[0]).hold(0, 3)
        kept(actors[1]).hold(3, 1)
        stage.renew(7)
        report = await group.sync()
        assert stage.arrived()
        assert (report.version, report.planned) == (2, True)
        assert commits(stage) == [[1, 2]] * 2


async def test_a_shape_that_changed_in_place_is_found_on_the_way_and_planned_anew_in_the_same_call(
    machine: Machine,
) -> None:
    """The same object, address and bytes: a begin that is in haste does not see it."""
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        engine = holder(stage.replicas[0][0])
        address = engine.matrix.data_ptr()
        # What held rows 0 and 1 holds the left parts of rows 0 to 2 from now on.
        engine.matrix.data = engine.matrix.data.view(3, ELEMENTS * 2 // 3)
        assert engine.matrix.data_ptr() == address
        report = await group.sync()
        rows, columns = engine.matrix.shape
        assert torch.equal(bits(engine.matrix), stage.whole[engine.first : engine.first + rows, :columns])
        assert (report.version, report.planned) == (2, True)
        assert commits(stage) == [[1, 2]] * 2


async def test_a_sources_shape_that_changed_in_place_and_can_no_longer_be_served_lets_nobody_commit(
    machine: Machine,
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        trainer = holder(stage.trainers[0])
        trainer.matrix.data = trainer.matrix.data.view(3, ELEMENTS * 2 // 3)
        with pytest.raises(LayoutError, match="matrix"):
            await group.sync()

        assert commits(stage) == [[1]] * 2
        assert group.versions() == await group.refresh() == {0: Torn(1, 2)}
        trainer.matrix.data = trainer.matrix.data.view(2, ELEMENTS)
        stage.renew(5)
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


# Nobody waits for ever.


async def test_a_receiver_whose_peer_dies_before_it_agrees_is_freed_and_does_not_commit(machine: Machine) -> None:
    stage = GpuStage(machine)
    waiting, dying = stage.replicas[0]
    async with group_of(stage) as group:
        await warm(stage, group)
        gpu_actor(dying).held[Begin] = asyncio.Event()
        looking = agreeing(stage, waiting, dying)
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        start = time.monotonic()
        dying.kill()
        with pytest.raises(ActorDied) as caught:
            await sync

        assert time.monotonic() - start < 1
        assert caught.value.actors == (3,)
        assert caught.value.versions == {0: Torn(1, 2)}
        assert waiting.agent.standing == Standing(1, True, 2)

    # As the end of its process would.
    for session in dying.agent._runs._sessions.values():
        session.close()


async def test_a_receiver_whose_peer_is_taken_by_another_sync_is_freed_and_does_not_commit(machine: Machine) -> None:
    stage = GpuStage(machine)
    waiting, taken = stage.replicas[0]
    async with group_of(stage) as group:
        await warm(stage, group)
        # Its own stream has something to do before it may be written to.
        gate = [False]
        gpu_actor(taken).gpu.default.put_waiting(lambda: gate[0])
        looking = agreeing(stage, waiting, taken)
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        begin = Begin(RunId("another group", time.time_ns()), 0, version=8)
        assert isinstance(await taken.agent.serve_async(begin, ThreadHost()), Began)
        with pytest.raises(SyncAborted) as caught:
            await sync

        assert caught.value.versions == {0: Torn(1, 2)}
        assert [actor.agent.version for actor in stage.replicas[0]] == [1, 1]
        machine.open_gate(gate)
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)
        await taken.agent.serve_async(Close("another group"), ThreadHost())


async def test_a_caller_that_is_cancelled_while_receivers_wait_for_each_other(machine: Machine) -> None:
    stage = GpuStage(machine)
    waiting, slow = stage.replicas[0]
    async with group_of(stage) as group:
        await warm(stage, group)
        gate = gpu_actor(slow).held[Begin] = asyncio.Event()
        looking = agreeing(stage, waiting, slow)
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        start = time.monotonic()
        sync.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sync

        assert time.monotonic() - start < 1
        assert commits(stage) == [[1]] * 2
        assert group.versions() == {0: Torn(1, 2)}
        gate.set()
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


async def test_a_peer_that_never_agrees_is_waited_for_until_the_deadline(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        gate = gpu_actor(stage.replicas[0][1]).held[Begin] = asyncio.Event()
        start = time.monotonic()
        with pytest.raises(SyncError) as caught:
            await group.sync(deadline=0.3)

        assert 0.3 <= time.monotonic() - start < 1.3
        assert caught.value.versions == {0: Torn(1, 2)}
        assert commits(stage) == [[1]] * 2
        gate.set()
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


async def test_a_driver_that_dies_while_receivers_wait_leaves_them_free_for_the_next_one(machine: Machine) -> None:
    stage = GpuStage(machine)
    waiting, slow = stage.replicas[0]
    group = group_of(stage)
    await warm(stage, group)
    name = group._name
    looking = agreeing(stage, waiting, slow)
    # All that it ever sent: begins to all but one.
    run = RunId(name, time.time_ns())
    known = group._lineup.known
    assert known.prepared is not None
    starts = head_starts(known, known.prepared[1], run, {0: None, 1: None, 2: 2, 3: 2}, seconds=60)
    for number, actor in enumerate(stage.actors):
        if actor is not slow:
            begin = Begin(run, number, version=2, ahead=starts[number].ahead, close=starts[number].close)
            assert isinstance(await actor.agent.serve_async(begin, ThreadHost()), Began)

    await looking.wait()
    assert [actor.agent.version for actor in stage.replicas[0]] == [1, 1]
    async with group_of(stage) as fresh:
        stage.renew(9)
        await fresh.sync()
        assert stage.arrived()
        assert commits(stage) == [[1, 2]] * 2

    lanes = stage.lanes()
    await group.aclose()
    for lane in lanes:
        lane.join(5)


@pytest.mark.parametrize("checksum", [True, False])
async def test_an_actor_that_begins_after_the_others_were_given_up_reads_nothing_and_does_not_commit(
    machine: Machine, checksum: bool
) -> None:
    """As one that was stopped meanwhile. Senders had ended the run by then, and the peer had found all in place."""
    stage = GpuStage(machine)
    waiting, late = stage.replicas[0]
    async with group_of(stage, checksum=checksum) as group:
        await warm(stage, group)
        # It comes to neither before it goes on: calls to a plain actor keep their order.
        gpu_actor(late).held.update({Begin: asyncio.Event(), Abort: asyncio.Event()})
        looking = agreeing(stage, waiting, late)
        sync = asyncio.ensure_future(group.sync())
        await looking.wait()
        sync.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sync

        # The trainers go on.
        stage.renew(55)
        (begin,) = [request for request in late.asked[-STEPS - 2 :] if isinstance(request, Begin)]
        (abort,) = [request for request in late.asked if isinstance(request, Abort)]
        assert begin.close is not None
        before = stage.bits()
        machine.reads.clear()
        looking = listening(machine, {gpu_actor(late).gpu.index})
        assert isinstance(await late.agent.serve_async(begin, ThreadHost()), Began)
        await looking.wait()
        assert machine.reads == []
        assert stage.bits() == before
        await late.agent.serve_async(abort, ThreadHost())
        assert commits(stage) == [[1]] * 2
        gpu_actor(late).held.pop(Abort).set()
        gpu_actor(late).held.clear()
        await group.sync()
        assert stage.arrived()
        await is_ahead(stage, group)


# No board is read that is not mapped (the machine of every test here looks at that as well).


async def test_a_group_that_is_closed_while_receivers_wait_for_each_other(machine: Machine) -> None:
    stage = GpuStage(machine)
    waiting, slow = stage.replicas[0]
    group = group_of(stage)
    await warm(stage, group)
    gpu_actor(slow).held[Begin] = asyncio.Event()
    looking = agreeing(stage, waiting, slow)
    lanes = stage.lanes()
    sync = asyncio.ensure_future(group.sync())
    await looking.wait()
    await group.aclose()
    with pytest.raises(GroupClosed):
        await sync

    for lane in lanes:
        lane.join(5)

    assert machine.opened.total() == 0
    assert machine.strays == []
    assert commits(stage) == [[1]] * 2


async def test_boards_are_mapped_anew_where_a_sender_moved_while_receivers_wait(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        for number in range(3):
            stage.renew(number)
            move(holder(stage.trainers[0]).matrix, POISON)
            await group.sync()
            assert stage.arrived()
            assert set(machine.opened.values()) <= {0, 1}
            assert machine.strays == []
            await is_ahead(stage, group, 300 + number)


# When the driver commits.


class Hooked(Kept):
    def after_commit(self, version: int) -> None:
        self.calls.append(f"after_commit {version}")


def closes(stage: GpuStage) -> list[object]:
    """Of every begin that was asked for: how its run might close."""
    return [request.close for actor in stage.actors for request in actor.asked if isinstance(request, Begin)]


@pytest.mark.parametrize(
    "options",
    [
        {"staging": "shadow"},
        {"lookahead": 0},
        {"in_flight": 1},
        {"in_flight": STEPS - 1},
        {"task_allowance": 1000.0},
        {"transport": "gloo"},
    ],
    ids=lambda options: "-".join(options),
)
async def test_where_the_receivers_cannot_or_may_not_agree_the_driver_commits(
    machine: Machine, options: dict[str, object]
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, **options) as group:
        for number in range(3):
            stage.renew(number)
            stage.take()
            await group.sync(deadline=20)
            assert stage.arrived()
            assert [kinds.count("Commit") for kinds in stage.take()] == [1] * 4

    assert set(closes(stage)) == {None}


async def test_where_somebody_has_a_hook_the_driver_commits_and_calls_it(machine: Machine) -> None:
    stage = GpuStage(machine, kind=Hooked)
    async with group_of(stage) as group:
        await warm(stage, group)
        await group.sync()
        assert stage.ran_ahead()
        assert [kinds.count("Commit") for kinds in stage.take()] == [1] * 4

    assert [call for call in kept(stage.replicas[0][0]).calls if "commit" in call] == [
        "after_commit 1",
        "after_commit 2",
    ]
    assert set(closes(stage)) == {None}


@pytest.mark.parametrize("asked", [{"only": {"scale"}}, {"validate": True}, {"dry_run": True}], ids="-".join)
async def test_a_sync_that_is_not_plain_is_committed_by_the_driver(machine: Machine, asked: dict[str, object]) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        stage.renew(101, finite=True)
        await group.sync(**asked)  # type: ignore[arg-type]
        assert [kinds.count("Commit") for kinds in stage.take()] == [1] * 4

    assert set(closes(stage)) == {None}


async def test_a_replica_that_is_copied_from_a_peer_is_committed_by_the_driver(machine: Machine) -> None:
    stage = GpuStage(machine, trainers=4, replicas=2)
    async with group_of(stage) as group:
        await warm(stage, group)
        for actor in stage.replicas[1]:
            actor.agent._weights.version = 0

        await group.refresh()
        stage.renew(0)
        await group.sync_replica(1)
        commits = [request for actor in stage.actors for request in actor.asked if isinstance(request, Commit)]
        assert len(commits) == 8 + 4
        assert group.versions() == {0: 1, 1: 1}

    assert set(closes(stage)) == {None}


@pytest.mark.parametrize("lookahead", [None, 0, 1, 2])
@pytest.mark.parametrize("in_flight", [None, 1, 2, STEPS, 100])
async def test_receivers_agree_only_where_every_step_starts_with_the_run(
    machine: Machine, lookahead: int | None, in_flight: int | None
) -> None:
    """One that waited for a step which comes after another's end would keep out that end: nobody would ever finish."""
    stage = GpuStage(machine)
    async with group_of(stage, lookahead=lookahead, in_flight=in_flight) as group:
        await warm(stage, group)
        prepared = group._lineup.known.prepared
        assert prepared is not None
        preparation = prepared[1]
        assert [len(program.steps) for program in preparation.programs] == [STEPS] * 4
        at_once = preparation.ahead == (STEPS,) * 4
        assert at_once is (lookahead is None and in_flight not in (1, 2))
        assert preparation.agreeing == ((2, 3) if at_once else ())
        await group.sync(deadline=20)
        assert stage.arrived()
        assert [kinds.count("Commit") for kinds in stage.take()] == [0 if at_once else 1] * 4


async def test_what_receivers_have_ended_stands_although_their_sender_is_never_heard_of(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = GpuStage(machine)
    async with group_of(stage) as group:
        await warm(stage, group)
        lost, serve, never = stage.trainers[1], stage.trainers[1]._serve, asyncio.Event()

        async def late(request: Request, *rest: object) -> bytes:
            answer = await serve(request, *rest)  # type: ignore[arg-type]
            if isinstance(request, RunStep):
                await never.wait()

            return answer

        monkeypatch.setattr(Slip, "send", lambda self, reply: None)
        monkeypatch.setattr(lost, "_serve", late)
        with pytest.raises(SyncTimeout) as raised:
            await group.sync(7, deadline=0.5)

        assert stage.arrived()
        assert standings(stage)[-2:] == [Standing(7, False, None)] * 2
        assert raised.value.versions == group.versions() == await group.refresh() == {0: 7}
        monkeypatch.setattr(lost, "_serve", serve)
        never.set()
        stage.renew(300)
        assert (await group.sync()).version == 8
        assert stage.arrived()
