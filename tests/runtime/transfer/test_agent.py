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
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, Fence, Move
from wavecast.runtime.transfer.copying import unpack
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.messages import (
    Abort,
    Addresses,
    Attach,
    Began,
    Begin,
    Close,
    Commit,
    Compare,
    Describe,
    Described,
    Disconnect,
    Done,
    Excerpt,
    Export,
    Exported,
    Failure,
    HostStore,
    Load,
    Probe,
    Reply,
    Request,
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


async def test_steps_run_in_program_order_whatever_order_they_are_asked_in() -> None:
    world, wires = World(), Wires()
    crew = world.crew(wires)
    world.fill(1)
    await crew.sync(1, connect=True, backwards=True)
    assert world.arrived()
    (fabric,) = wires.fabrics.values()
    for program in crew.programs:
        sent = [
            receiver
            for step in program.steps
            if step.sender == program.actor
            for _ in crew.buckets(program.actor, step)
            for receiver in step.receivers
        ]
        assert [receiver for sender, receiver, _ in fabric.log if sender == program.actor] == sent


async def test_threads_may_ask_in_any_order_too() -> None:
    """What a threaded actor does: a thread a request, the last step first."""
    world = World()
    crew = world.crew(Wires())
    world.fill(1)
    await crew.begin()
    await crew.connect()
    loop = asyncio.get_running_loop()
    requests = [(program.actor, step) for program in crew.programs for step in range(len(program.steps))]
    replies: list[asyncio.Future[Reply]] = []
    for actor, step in reversed(requests):
        future: asyncio.Future[Reply] = loop.create_future()

        def answer(actor: int = actor, step: int = step, future: asyncio.Future[Reply] = future) -> None:
            reply = crew.agents[actor].serve(crew.step(actor, step), crew.host)
            loop.call_soon_threadsafe(future.set_result, reply)

        threading.Thread(target=answer, daemon=True).start()
        replies.append(future)

    done = expect(StepDone, await asyncio.wait_for(asyncio.gather(*replies), SECONDS))
    crew.finished = {
        actor: reply.finished
        for (actor, _), reply in zip(reversed(requests), done, strict=True)
        if reply.finished is not None
    }
    assert crew.mismatches(crew.finish()) == []
    assert world.arrived()


def relay() -> tuple[list[torch.Tensor], list[list[Shard]], Schedule]:
    """Actor 0 sends two halves to 1, which forwards each to 2 and 3 as soon as it has it."""
    views = [torch.zeros(80, dtype=torch.int32) for _ in range(4)]
    shards = [[Shard("w", view, (0,), (80,))] for view in views]

    def task(id: int, sender: int, *receivers: int, half: int, after: tuple[int, ...] = ()) -> Task:
        route = Route(sender, receivers, "w", (40 * half,), (40,), "int32", 160)
        return Task(id, (sender,), receivers, 160, after=after, payload=(route,))

    waves = (
        Wave((task(0, 0, 1, half=0),)),
        Wave((task(2, 1, 2, 3, half=0, after=(0,)),)),
        Wave((task(1, 0, 1, half=1),)),
        Wave((task(3, 1, 2, 3, half=1, after=(1,)),)),
    )
    return views, shards, Schedule(waves)


@pytest.mark.parametrize("wire", ["fake", "gloo"])
async def test_a_receiver_forwards_what_it_has_just_received(wire: str) -> None:
    """Never what it held before: nothing is packed ahead of its arrival."""
    views, shards, schedule = relay()
    crew = Crew(shards, compiled(schedule, 4, bucket_bytes=64), wires=Wires() if wire == "fake" else None)
    for version in range(3):
        views[0].copy_(torch.arange(80) + 1000 * version)
        await crew.sync(version, connect=version == 0)
        assert all(torch.equal(view, views[0]) for view in views)


async def test_a_corrupted_destination_shows_in_its_sum_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit flips in the destination's memory between writing and reading back."""
    world = World()
    crew = world.crew(Wires())
    world.fill(1)
    memories: list[Memory] = []

    def spoil(bucket: Bucket, memory: Memory, buffer: torch.Tensor, *, check: Callable[[], None]) -> None:
        unpack(bucket, memory, buffer, check=check)
        if bucket.items[0].cut.tensor == "w" and not memories:
            memories.append(memory)
            as_bits(memory.targets(bucket.items[0].cut)[0]).view(-1)[3] ^= 1

    monkeypatch.setattr("wavecast.runtime.transfer.copying.unpack", spoil)
    await crew.begin()
    await crew.connect()
    await crew.move()
    ((_, receiver),) = crew.mismatches(crew.finish())
    assert memories[0].shards[0].view is world.destinations[receiver - 3]
    assert not world.arrived()


async def test_two_tensors_in_one_memory_show_in_the_sums() -> None:
    """A user's mistake: what one tensor wrote, the other has overwritten."""
    source = [Shard(name, torch.full((8,), value), (0,), (8,)) for name, value in (("a", 1.0), ("b", 2.0))]
    shared = torch.zeros(8)
    target = [Shard(name, shared, (0,), (8,)) for name in ("a", "b")]
    crew = Crew([source, target], planned([source], [target], chunk_bytes=1 << 20, bucket_bytes=64), wires=Wires())
    await crew.begin()
    await crew.connect()
    await crew.move()
    assert crew.mismatches(crew.finish()) == [(0, 1)]


async def test_sums_can_be_left_out() -> None:
    world = World()
    crew = Crew(world.shards, world.programs(checksum=False), wires=Wires())
    world.fill(1)
    await crew.begin()
    await crew.connect()
    await crew.move()
    assert [reply.checksums for reply in crew.finish()] == [()] * 5
    assert world.arrived()


# Giving up.


async def test_an_aborted_run_writes_nothing_after_the_abort_has_returned() -> None:
    world, wires = World(), Wires()
    crew = world.crew(wires)
    world.fill(1)
    await crew.begin()
    await crew.connect()
    receiver = 3
    steps = [
        asyncio.ensure_future(crew.ask(receiver, crew.step(receiver, step)))
        for step in range(len(crew.programs[receiver].steps))
    ]
    # It has begun to wait for its first bucket, and the other steps wait for it.
    await until(lambda: crew.agents[receiver].torn)
    expect(Done, [await crew.ask(receiver, Abort(crew.run, "the test gave it up"))])
    assert [kind_of(reply) for reply in await asyncio.gather(*steps)] == ["SyncAborted"] * len(steps)
    # The bytes come too late.
    (fabric,) = wires.fabrics.values()
    with pytest.raises(CommunicatorError):
        fabric.post(0, (receiver,), torch.ones(48, dtype=torch.uint8))

    assert world.untouched()
    assert crew.agents[receiver].version is None
    assert crew.agents[receiver].torn


class Stubborn:
    """A communicator that no abort wakes, as gloo's receive: it comes back when it pleases, with bytes."""

    def __init__(self, communicator: Communicator, gate: threading.Event, entered: threading.Event) -> None:
        self._communicator = communicator
        self._gate = gate
        self._entered = entered
        self.rank = communicator.rank
        self.device = communicator.device
        self.device_bytes = 0
        self.exports = False

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        buffer.fill_(0xFF)
        return self

    def finish(self, deadline: Deadline) -> None:
        self._entered.set()
        assert self._gate.wait(SECONDS)

    def fence(self) -> Fence:
        return self._communicator.fence()

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


async def test_a_transport_that_cannot_be_woken_is_left_behind_and_never_writes() -> None:
    world, gate, entered = World(), threading.Event(), threading.Event()
    wires = Wires(wrap=lambda communicator: Stubborn(communicator, gate, entered))
    crew = world.crew(wires)
    await crew.begin()
    await crew.connect()
    receiver = 4
    stuck = asyncio.ensure_future(crew.ask(receiver, crew.step(receiver, 0)))
    await asyncio.to_thread(entered.wait, SECONDS)
    before = time.monotonic()
    await crew.abort()
    # A third of a second for one stuck actor; the rest is what a busy machine may add.
    assert time.monotonic() - before < 5.0
    assert world.untouched()

    # The next run is served by another thread while the old one is still stuck.
    wires.wrap = lambda communicator: communicator
    world.fill(2)
    await crew.sync(2, connect=True)
    assert world.arrived()
    gate.set()
    assert kind_of(await stuck) == "SyncAborted"
    assert world.arrived()
    assert [agent.version for agent in crew.agents] == [2] * 5


async def test_a_run_given_up_in_the_middle_of_a_bucket_stops_between_two_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = [Shard(f"t{i}", torch.ones(4), (0,), (4,)) for i in range(6)]
    target = [Shard(f"t{i}", torch.zeros(4), (0,), (4,)) for i in range(6)]
    crew = Crew([source, target], planned([source], [target], chunk_bytes=1 << 20, bucket_bytes=256), wires=Wires())
    writing, gate = threading.Event(), threading.Event()

    def halting(bucket: Bucket, memory: Memory, buffer: torch.Tensor, *, check: Callable[[], None]) -> None:
        written = iter(range(100))

        def check_and_halt() -> None:
            if next(written) == 2:
                writing.set()
                assert gate.wait(SECONDS)

            check()

        unpack(bucket, memory, buffer, check=check_and_halt)

    monkeypatch.setattr("wavecast.runtime.transfer.copying.unpack", halting)
    await crew.begin()
    await crew.connect()
    moving = asyncio.ensure_future(asyncio.gather(crew.ask(0, crew.step(0, 0)), crew.ask(1, crew.step(1, 0))))
    await asyncio.to_thread(writing.wait, SECONDS)
    await crew.abort()
    gate.set()
    _, reply = await moving
    assert kind_of(reply) == "SyncAborted"
    assert [bool(torch.as_tensor(shard.view).any()) for shard in target] == [True, True, False, False, False, False]


async def test_a_cancelled_step_ends_the_run_and_answers_those_that_wait(caplog: pytest.LogCaptureFixture) -> None:
    """On an asyncio actor the driver's cancel arrives in the await itself, here in a step whose turn has not come."""
    world, wires = World(), Wires()
    crew = world.crew(wires)
    await crew.begin()
    await crew.connect()
    receiver = 3
    steps = [asyncio.ensure_future(crew.ask(receiver, crew.step(receiver, step))) for step in (0, 2, 3)]
    await until(lambda: crew.agents[receiver].torn)
    with caplog.at_level(logging.DEBUG):
        steps[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await steps[1]

        assert kind_of(await steps[0]) == "SyncAborted"
        assert kind_of(await steps[2]) == "SyncAborted"

    # Cancelled too is the call whose step is running.
    assert caplog.records == []
    (fabric,) = wires.fabrics.values()
    with pytest.raises(CommunicatorError, match="abort"):
        fabric.post(0, (1,), torch.zeros(1))


async def test_cancelling_the_step_that_runs_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    running = asyncio.ensure_future(crew.ask(3, crew.step(3, 0)))
    await until(lambda: crew.agents[3].torn)
    with caplog.at_level(logging.DEBUG):
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

        expect(Done, await crew.ask_all(lambda actor: Close(crew.group)))

    assert caplog.records == []
    world.fill(1)
    await crew.sync(1, connect=True)
    assert world.arrived()


async def test_a_blocked_call_that_the_driver_cancels_returns_at_once() -> None:
    """What a plain actor does: its one thread looks at the host while bytes move."""
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    host = ThreadHost()
    reply = asyncio.ensure_future(asyncio.to_thread(crew.agents[4].serve, crew.step(4, 0), host))
    await until(lambda: crew.agents[4].torn)
    host.ended = True
    failure = await asyncio.wait_for(reply, SECONDS)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.message) == ("SyncAborted", "the driver cancelled the call")
    assert kind_of(await crew.ask(4, crew.step(4, 1))) == "SyncAborted"
    assert world.untouched()


async def test_a_move_past_its_deadline_is_a_timeout_and_ends_the_run() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    failure = await crew.ask(3, crew.step(3, 0, seconds=0.05))
    assert isinstance(failure, Failure)
    assert failure.kind == "SyncTimeout"
    assert "nothing came from actor" in failure.message
    assert "take" in failure.detail
    assert kind_of(await crew.ask(3, crew.step(3, 1))) == "SyncAborted"


async def test_a_connection_given_up_while_it_is_made_is_not_kept() -> None:
    gate, entered = threading.Event(), threading.Event()
    made: list[Communicator] = []

    def hold(communicator: Communicator) -> Communicator:
        entered.set()
        assert gate.wait(SECONDS)
        made.append(communicator)
        return communicator

    world, wires = World(), Wires(wrap=hold)
    crew = world.crew(wires)
    await crew.begin()
    crew.connection = "slow"
    connecting = asyncio.ensure_future(crew.ask(0, crew.connect_request(0)))
    await asyncio.to_thread(entered.wait, SECONDS)
    expect(Done, [await crew.ask(0, Abort(crew.run, "too slow"))])
    gate.set()
    failure = await connecting
    assert isinstance(failure, Failure)
    assert failure.kind == "SyncAborted"
    with pytest.raises(CommunicatorError, match="abort"):
        made[0].start(torch.zeros(1, dtype=torch.uint8), sender=0, receivers=(1,), deadline=Deadline(1))


# What belongs to another run.


async def test_requests_of_an_older_run_are_refused_and_harm_nothing() -> None:
    world, wires = World(), Wires()
    crew = world.crew(wires)
    world.fill(1)
    await crew.begin()
    await crew.connect()
    old = crew.run
    connect = crew.connect_request(3)
    await crew.begin()
    await crew.connect()
    packed = pack_programs(planned([world.shards[0][1:]], [world.shards[3][1:]], chunk_bytes=80, bucket_bytes=64))
    stale: list[Request] = [
        RunStep(old, 0, "digest", SECONDS),
        connect,
        Load(old, packed[1]),
        HostStore(old, "another", SECONDS),
        Describe(old),
        Export(old),
        Attach(old, ()),
        Disconnect(old),
        Probe(old, 0),
        Commit(old, 99),
        Commit(old, None),
    ]
    for request in stale:
        assert kind_of(await crew.ask(3, request)) == "SyncAborted", request

    assert kind_of(await crew.ask(3, Compare(old, 0), Excerpt(b""))) == "SyncAborted"
    expect(Done, [await crew.ask(3, Abort(old, "late"))])
    assert kind_of(await crew.ask(3, Begin(old, 3))) == "SyncAborted"

    await crew.move()
    assert crew.mismatches(crew.finish()) == []
    await crew.commit(7)
    assert world.arrived()
    assert [agent.version for agent in crew.agents] == [7] * 5


async def test_a_run_that_begins_ends_an_older_one_of_another_group() -> None:
    """Its driver is gone, or wants the same actors: either way one writer is enough."""
    world, wires = World(), Wires()
    crew = world.crew(wires)
    await crew.begin()
    await crew.connect()
    waiting = [asyncio.ensure_future(crew.ask(3, crew.step(3, step))) for step in range(2)]
    await until(lambda: crew.agents[3].torn)
    other = Crew(world.shards, crew.programs, wires=wires, group="other", agents=crew.agents)
    began = await other.begin()
    assert [kind_of(reply) for reply in await asyncio.gather(*waiting)] == ["SyncAborted"] * 2
    assert [reply.torn for reply in began] == [False, False, False, True, False]
    world.fill(3)
    await other.connect()
    await other.move()
    assert other.mismatches(other.finish()) == []
    await other.commit(3)
    assert world.arrived()


async def test_two_groups_keep_their_own_connections_and_programs() -> None:
    world, wires = World(), Wires()
    first = world.crew(wires)
    second = Crew(world.shards, world.programs(), wires=wires, group="second", agents=first.agents)
    for version, crew in enumerate((first, second, first, second)):
        world.fill(version)
        await crew.sync(version, connect=version < 2)
        assert world.arrived()

    expect(Done, await first.ask_all(lambda actor: Close(first.group)))
    world.fill(9)
    await second.sync(9, connect=False)
    assert world.arrived()


async def test_a_step_asked_for_twice_is_refused() -> None:
    world = World()
    crew = world.crew(Wires())
    world.fill(1)
    await crew.begin()
    await crew.connect()
    last = len(crew.programs[3].steps) - 1
    waiting = asyncio.ensure_future(crew.ask(3, crew.step(3, last)))
    await asyncio.sleep(0)
    failure = await crew.ask(3, crew.step(3, last))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.message) == ("SyncError", f"step {last} of the run was asked for twice")
    assert kind_of(await waiting) == "SyncAborted"


async def test_a_step_of_another_program_or_before_any_is_refused() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    early = await crew.ask(0, crew.step(0, 0))
    assert isinstance(early, Failure)
    assert early.message == "the actor has no program"
    await crew.begin()
    expect(Done, await crew.load())
    early = await crew.ask(0, crew.step(0, 0))
    assert isinstance(early, Failure)
    assert "before it was connected" in early.message
    await crew.begin()
    await crew.connect()
    other = await crew.ask(0, RunStep(crew.run, 0, "another", SECONDS))
    assert isinstance(other, Failure)
    assert other.message == "the actor has program digest, it was asked to run another"


# Versions.


async def test_versions_and_torn_follow_what_was_written() -> None:
    world = World()
    crew = world.crew(Wires())
    world.fill(1)

    async def seen() -> tuple[list[int | None], list[bool]]:
        began = await crew.begin()
        return [reply.version for reply in began], [reply.torn for reply in began]

    # A dry run: all is set up, none is moved.
    assert await seen() == ([None] * 5, [False] * 5)
    await crew.connect()
    await crew.commit(None)
    assert await seen() == ([None] * 5, [False] * 5)
    # Connections outlive a dry run.
    await crew.move()
    crew.finish()
    await crew.commit(4)
    assert await seen() == ([4] * 5, [False] * 5)
    # Bytes arrived, and nobody verified them.
    await crew.move()
    await crew.abort()
    torn = ([4] * 5, [False, False, False, True, True])
    assert await seen() == torn
    # A dry run mends nothing.
    await crew.commit(None)
    assert await seen() == torn
    await crew.connect()
    await crew.move()
    crew.finish()
    await crew.commit(5)
    assert await seen() == ([5] * 5, [False] * 5)


async def test_a_commit_is_taken_once() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.sync(1, connect=True)
    assert kind_of(await crew.ask(0, Commit(crew.run, 2))) == "SyncAborted"
    assert crew.agents[0].version == 1


# What is kept, and what is not.


async def test_close_lets_go_of_staging_connection_and_thread() -> None:
    before = transfer_threads()
    world, wires = World(), Wires()
    crew = world.crew(wires)
    await crew.sync(1, connect=True)
    threads = transfer_threads() - before
    assert len(threads) == 5
    # The only way to see that memory is given back is to see that nothing holds it.
    staging = [
        weakref.ref(session.equipment.staging) for agent in crew.agents for session in agent._runs._sessions.values()
    ]
    assert all(ref() is not None for ref in staging)
    expect(Done, await crew.ask_all(lambda actor: Close(crew.group)))
    await until(lambda: not any(thread.is_alive() for thread in threads))
    gc.collect()
    assert [ref() for ref in staging] == [None] * 5
    (fabric,) = wires.fabrics.values()
    with pytest.raises(CommunicatorError):
        fabric.post(0, (1,), torch.zeros(1))

    expect(Done, await crew.ask_all(lambda actor: Close(crew.group)))
    assert kind_of(await crew.ask(0, Export(crew.run))) == "SyncAborted"
    assert [agent.version for agent in crew.agents] == [1] * 5
    world.fill(2)
    await crew.sync(2, connect=True)
    assert world.arrived()


async def test_close_answers_the_steps_that_wait() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    waiting = [asyncio.ensure_future(crew.ask(3, crew.step(3, step))) for step in (0, 2)]
    await until(lambda: crew.agents[3].torn)
    expect(Done, [await crew.ask(3, Close(crew.group))])
    assert [kind_of(reply) for reply in await asyncio.gather(*waiting)] == ["SyncAborted"] * 2
    assert world.untouched()


async def test_runs_leave_no_thread_behind() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.sync(0, connect=True)
    before = transfer_threads()
    for version in range(1, 6):
        await crew.sync(version, connect=False)

    assert transfer_threads() <= before


async def test_staging_is_no_larger_than_what_travels() -> None:
    world = World()
    crew = Crew(
        world.shards, planned(world.shards[:3], world.shards[3:], chunk_bytes=80, bucket_bytes=1 << 20), wires=Wires()
    )
    finished = await crew.sync(0, connect=True)
    # The largest step of each: a row of 80 bytes and the scale's 16, or the row alone.
    assert {reply.staging_bytes for reply in finished} <= {2 * 80, 2 * 96}


# Describing and comparing.


async def test_a_layout_is_told_with_a_digest_that_follows_it() -> None:
    world = World()
    crew = world.crew(Wires())
    first = await crew.begin()
    (described,) = expect(Described, [await crew.ask(0, Describe(crew.run))])
    assert [(piece.tensor, piece.box.extent, piece.dtype) for piece in described.layout().pieces] == [
        ("w", (2, 40), "bfloat16"),
        ("scale", (), "float32"),
    ]
    assert [reply.digest for reply in await crew.begin()] == [reply.digest for reply in first]
    # The same place of another tensor's memory is the same layout; a shard less is another.
    world.shards[0][0] = Shard("w", world.sources[0].clone(), (0, 0), (6, 40))
    assert (await crew.begin())[0].digest == first[0].digest
    # What is frozen is part of the layout as well.
    world.shards[0][0] = Shard("w", world.sources[0], (0, 0), (6, 40), trainable=False)
    assert (await crew.begin())[0].digest != first[0].digest
    (described,) = expect(Described, [await crew.ask(0, Describe(crew.run))])
    assert described.layout().frozen == ("w",)
    world.shards[0].pop()
    assert (await crew.begin())[0].digest != first[0].digest
    assert first[0].digest != first[1].digest
    assert first[0].place.node == "node-0"
    assert first[0].place.device == "cpu"


async def test_a_scan_counts_nan_and_only_when_asked() -> None:
    world = World()
    world.sources[1][0, :3] = float("nan")
    crew = world.crew(Wires())
    assert [reply.nan for reply in await crew.begin()] == [()] * 5
    assert [reply.nan for reply in await crew.begin(scan=True)] == [(), (("w", 3),), (), (), ()]


async def test_the_whole_check_names_what_differs() -> None:
    world = World()
    crew = world.crew(Wires())
    world.fill(1)
    await crew.begin()
    await crew.connect()
    await crew.move()
    crew.finish()
    world.destinations[0][0, 0] = 1.0
    world.scales[4].fill_(-1)
    found: list[str] = []
    for program in crew.programs[3:]:
        for index, step in enumerate(program.steps):
            there = [step.task for step in crew.programs[step.sender].steps].index(step.task)
            excerpt = await crew.ask(step.sender, Probe(crew.run, there))
            assert isinstance(excerpt, Excerpt)
            (done,) = expect(Done, [await crew.ask(program.actor, Compare(crew.run, index), excerpt)])
            found += done.differing

    assert len(found) == 2
    assert any(line.endswith("bytes of 'w' at offset (0, 0) with extent (1, 24)") for line in found)
    assert any("bytes of 'scale'" in line for line in found)


async def test_a_failed_probe_is_passed_on_by_the_comparison() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    failure = Failure("ActorFailed", "the sender's own trouble")
    assert await crew.ask(3, Compare(crew.run, 0), failure) == failure
    odd = await crew.ask(3, Compare(crew.run, 0), "an answer of another kind")
    assert isinstance(odd, Failure)
    assert odd.message == "TypeError: expected the sender's excerpt, got str"


# Addresses, for those that pull.


def an_export() -> Exported:
    return Exported(Addresses((b"handle",), {0: b""}, (0, 0, 0), {}))


async def test_a_senders_failure_is_passed_on_by_the_receiver_that_wanted_its_addresses() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    failure = Failure("TransportUnavailable", "cuIpcGetMemHandle failed")
    assert await crew.ask(3, Attach(crew.run, (0, 1)), an_export(), failure) == failure
    odd = await crew.ask(3, Attach(crew.run, (0,)), Done())
    assert isinstance(odd, Failure)
    assert odd.message == "TypeError: expected a sender's addresses, got Done"
    few = await crew.ask(3, Attach(crew.run, (0, 1)), an_export())
    assert kind_of(few) == "ActorFailed"
    # The run goes on: nothing was entered into with anybody.
    world.fill(1)
    await crew.move()
    assert crew.mismatches(crew.finish()) == []
    assert world.arrived()


async def test_addresses_are_asked_for_once_there_is_a_program() -> None:
    crew = World().crew(Wires())
    await crew.begin()
    failure = await crew.ask(0, Export(crew.run))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.message) == ("SyncError", "the actor has no program")
    attach = await crew.ask(3, Attach(crew.run, ()))
    assert isinstance(attach, Failure)
    assert attach.message == "the actor has no program"


async def test_host_memory_is_offered_to_nobody() -> None:
    world = World()
    crew = world.crew(Wires())
    first = await crew.begin()
    assert {(reply.unshared, reply.kernels, reply.addresses) for reply in first} == {("it is host memory", False, 1)}
    # The same shards in the same place have not moved; one that was made anew has.
    world.shards[0][0] = Shard("w", world.sources[0], (0, 0), (6, 40))
    assert [reply.addresses for reply in await crew.begin()] == [2, 1, 1, 1, 1]
    world.scales[1].data = torch.zeros(())
    assert [reply.addresses for reply in await crew.begin()] == [2, 2, 1, 1, 1]


async def test_communicators_are_given_back_and_made_anew() -> None:
    world, wires = World(), Wires()
    crew = world.crew(wires)
    world.fill(1)
    await crew.sync(1, connect=True)
    await crew.begin()
    staging = [
        weakref.ref(session.equipment.staging) for agent in crew.agents for session in agent._runs._sessions.values()
    ]
    expect(Done, await crew.ask_all(lambda actor: Disconnect(crew.run)))
    gc.collect()
    assert [ref() for ref in staging] == [None] * 5
    (fabric,) = wires.fabrics.values()
    with pytest.raises(CommunicatorError):
        fabric.post(0, (1,), torch.zeros(1))

    early = await crew.ask(0, crew.step(0, 0))
    assert isinstance(early, Failure)
    assert "before it was connected" in early.message
    world.fill(2)
    await crew.sync(2, connect=True)
    assert world.arrived()


# Steps that come before the begin of their run.


async def test_a_step_that_comes_before_its_begin_waits_for_it() -> None:
    world = World()
    crew = world.crew(Wires())
    world.fill(1)
    await crew.sync(1, connect=True)
    world.fill(2)
    crew.run = RunId(crew.group, crew.run.serial + 1_000_000)
    requests = [
        (program.actor, crew.step(program.actor, step))
        for program in crew.programs
        for step in range(len(program.steps))
    ]
    early = [asyncio.ensure_future(crew.ask(actor, request)) for actor, request in requests]
    await asyncio.sleep(0)
    assert not any(reply.done() for reply in early)
    expect(Began, await crew.ask_all(lambda actor: Begin(crew.run, actor)))
    expect(StepDone, await asyncio.gather(*early))
    assert crew.mismatches(crew.finish()) == []
    await crew.commit(2)
    assert world.arrived()


async def test_a_step_that_came_early_for_a_run_that_another_overtook_is_refused() -> None:
    world = World()
    crew = world.crew(Wires())
    await crew.begin()
    await crew.connect()
    never = RunId(crew.group, crew.run.serial + 1)
    early = asyncio.ensure_future(crew.ask(3, RunStep(never, 0, "digest", SECONDS)))
    await asyncio.sleep(0)
    assert not early.done()
    later = RunId(crew.group, crew.run.serial + 2)
    assert kind_of(await crew.ask(3, Begin(later, 3))) == "Began"
    assert kind_of(await early) == "SyncAborted"
    assert world.untouched()


async def test_on_an_event_loop_as_well_a_step_waits_for_its_run_until_its_deadline() -> None:
    agent = Agent(lambda: [Shard("w", torch.zeros(4), (0,), (4,))])
    reply = await asyncio.wait_for(agent.serve_async(RunStep(RunId("group", 7), 0, "digest", 0.05), ThreadHost()), 5)
    assert isinstance(reply, Failure)
    assert (reply.kind, reply.message) == ("SyncTimeout", "the step's run had not begun by its deadline")
    assert agent._runs._early == []


async def ask(agent: Agent, request: Request, *, on_loop: bool) -> Reply:
    if on_loop:
        return await agent.serve_async(request, ThreadHost())

    return await asyncio.to_thread(agent.serve, request, ThreadHost())


@pytest.mark.parametrize("on_loop", [True, False])
async def test_a_run_that_was_aborted_before_it_began_never_begins(on_loop: bool) -> None:
    agent = Agent(lambda: [Shard("w", torch.zeros(4), (0,), (4,))])
    first, other = RunId("group", 5), RunId("another", 6)
    step = asyncio.ensure_future(ask(agent, RunStep(first, 0, "digest", SECONDS), on_loop=on_loop))
    unrelated = asyncio.ensure_future(ask(agent, RunStep(other, 0, "digest", SECONDS), on_loop=on_loop))
    await until(lambda: len(agent._runs._early) == 2)
    expect(Done, [await ask(agent, Abort(first, "the driver had enough"), on_loop=on_loop)])
    failure = await asyncio.wait_for(step, 5)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.message) == ("SyncAborted", "the driver had enough")
    assert not unrelated.done()

    late = await ask(agent, Begin(first, 0, version=1), on_loop=on_loop)
    assert isinstance(late, Failure)
    assert (late.kind, late.message) == ("SyncAborted", "the run was given up before it began on this actor")
    assert not unrelated.done()
    # Older runs of other groups, and newer ones of this one, do begin.
    assert kind_of(await ask(agent, Begin(RunId("another", 4), 0), on_loop=on_loop)) == "Began"
    assert kind_of(await ask(agent, Begin(RunId("group", 8), 0), on_loop=on_loop)) == "Began"
    assert kind_of(await asyncio.wait_for(unrelated, 5)) == "SyncAborted"
    expect(Done, await asyncio.gather(*(ask(agent, Close(name), on_loop=on_loop) for name in ("group", "another"))))
    assert agent._runs._given_up == {}


@pytest.mark.parametrize("on_loop", [True, False])
async def test_hooks_are_not_called_for_a_run_that_was_aborted_before_it_began(on_loop: bool) -> None:
    called: list[int] = []
    agent = Agent(lambda: [Shard("w", torch.zeros(4), (0,), (4,))], hooks={"before_sync": called.append})
    run = RunId("group", 5)
    expect(Done, [await ask(agent, Abort(run, "enough"), on_loop=on_loop)])
    assert kind_of(await ask(agent, Begin(run, 0, version=1), on_loop=on_loop)) == "SyncAborted"
    assert called == []
    assert kind_of(await ask(agent, Begin(RunId("group", 6), 0, version=1), on_loop=on_loop)) == "Began"
    assert called == [1]
    expect(Done, [await ask(agent, Close("group"), on_loop=on_loop)])


def test_a_step_that_a_plain_actor_was_sent_again_after_its_run_holds_it_up_until_its_deadline_and_no_longer() -> None:
    """Ray does so, where it is asked to, with an actor that it has started anew: nothing has begun there."""
    fresh = Agent(lambda: [Shard("w", torch.zeros(4), (0,), (4,))])
    run = RunId("group", time.time_ns())
    reply = fresh.serve(RunStep(run, 0, "digest", 0.05), ThreadHost())
    assert isinstance(reply, Failure)
    assert reply.kind == "SyncTimeout"
    assert reply.message == "the step's run had not begun by its deadline"
    # Its run may still come, and finds nothing that waits for it.
    assert fresh._runs._early == []
    assert isinstance(fresh.serve(Begin(run, 0), ThreadHost()), Began)
    assert isinstance(fresh.serve(Close("group"), ThreadHost()), Done)


# The user's hook.


async def never_list() -> list[Shard]:
    return []


def broken() -> list[Shard]:
    raise ValueError("no model yet")


@pytest.mark.parametrize(
    ("hook", "kind", "message"),
    [
        (lambda: [torch.zeros(2)], "LayoutError", "must return Shard values, got Tensor"),
        (lambda: None, "LayoutError", "must return a list of Shard values, got NoneType"),
        (never_list, "LayoutError", "must return a list of Shard values, got coroutine"),
        (broken, "ActorFailed", "ValueError: no model yet"),
    ],
    ids=["tensors", "nothing", "coroutine", "raises"],
)
async def test_a_hook_that_returns_something_else_is_told_so(
    hook: Callable[[], Sequence[Shard]], kind: str, message: str
) -> None:
    agent = Agent(hook)
    failure = await agent.serve_async(Begin(RunId("group", 1), 0), ThreadHost())
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert message in failure.message


async def test_a_hook_may_yield_its_shards() -> None:
    agent = Agent(lambda: (Shard("w", torch.zeros(2), (0,), (2,)) for _ in range(1)))  # type: ignore[arg-type, return-value]
    host = ThreadHost()
    run = RunId("group", 1)
    assert kind_of(await agent.serve_async(Begin(run, 0), host)) == "Began"
    (described,) = expect(Described, [await agent.serve_async(Describe(run), host)])
    assert len(described.layout().pieces) == 1


async def test_an_actor_that_is_in_no_run_says_so() -> None:
    failure = await Agent(list).serve_async(Export(RunId("group", 1)), ThreadHost())
    assert isinstance(failure, Failure)
    assert failure.message == "the actor is in no run of this group: it was closed, or never begun"


# Small things.


def transfer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "wavecast-transfer"}


async def until(condition: Callable[[], bool]) -> None:
    """Let others go on until ``condition`` holds."""
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.001)
