"""Actors of several nodes that share GPUs: one of them owns its GPU's port, what comes from afar goes through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from tests.runtime.local_actors import Stage, local
from wavecast.runtime import SyncError, SyncOptions, Torn
from wavecast.runtime.carriers import Ability, Carriers
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import task_ends, through_owners
from wavecast.runtime.plan.timetable import make_timetable
from wavecast.runtime.preparation import prepare
from wavecast.runtime.transfer.comm import Communicator, Deadline, Move
from wavecast.runtime.transfer.messages import Connect, Load
from wavecast.scheduler import Task, verify

__all__ = ("local",)

#: Two trainers. Beside each is the engine of either replica that wants the other's rows.
OWNERS = (0, 1, 1, 0, 1, 0)


def share(monkeypatch: pytest.MonkeyPatch, owners: tuple[int, ...]) -> None:
    """Let the actors be taken for such as share GPUs."""

    def choose(wanted: str, abilities: Sequence[Ability], **_: object) -> Carriers:
        return Carriers("nccl", owners=owners)

    monkeypatch.setattr("wavecast.runtime.known.choose_carriers", choose)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    share(monkeypatch, OWNERS)


async def sync_twice(stage: Stage, **options: object) -> None:
    async with stage.group(**options) as group:
        for value in (4.0, 5.0):
            stage.fill(value)
            await group.sync(validate=True)
            assert [stage.values(replica) for replica in range(2)] == [{value}, {value}]


@dataclass
class Tap:
    """
    Sees what is moved.

    :ivar moves: rank, sender and receivers of each part taken in a move
    :ivar on_start: called as a part is taken
    """

    moves: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)
    on_start: Callable[[Communicator], object] = lambda communicator: None

    def wrap(self, communicator: Communicator) -> Communicator:
        start = communicator.start

        def tapped(buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
            self.moves.append((communicator.rank, sender, receivers))
            self.on_start(communicator)
            return start(buffer, sender=sender, receivers=receivers, deadline=deadline)

        communicator.start = tapped  # type: ignore[method-assign]
        return communicator


# The plan.


def rows(parts: int, part: int, size: int = 12) -> Layout:
    low, high = size * part // parts, size * (part + 1) // parts
    return Layout((Piece("w", Box((low, 0), (high - low, 4)), (size, 4), "float32"),))


@pytest.mark.parametrize(
    ("ends", "owners", "members"),
    [
        ((0, (3,)), (0, 1, 0, 1), ((0,), (3, 1))),
        ((2, (3,)), (0, 1, 0, 1), ((2, 0), (3, 1))),
        ((0, (2,)), (0, 1, 0, 1), ((0,), (2,))),
        ((2, (0, 3)), (0, 1, 0, 1), ((2, 0), (0, 3, 1))),
        ((0, (1,)), (), ((0,), (1,))),
        ((0, (3, 4, 5)), (0, 1, 2, 1, 1, 2), ((0,), (3, 4, 5, 1, 2))),
    ],
)
def test_owners_of_the_ports_that_bytes_go_through_are_members(
    ends: tuple[int, tuple[int, ...]], owners: tuple[int, ...], members: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    sender, receivers = ends
    route = Route(sender, receivers, "w", (0, 0), (12, 4), "float32", 192)
    moved = Task(7, (sender,), receivers, 192, payload=(route,))
    (wide,) = through_owners([moved], owners)
    assert (wide.senders, wide.receivers) == members
    assert task_ends(wide) == (sender, receivers)
    assert (wide.id, wide.nbytes, wide.payload) == (7, 192, (route,))
    # What is pulled takes nobody along.
    assert through_owners([moved], owners, apart=lambda route: True) == (moved,)


def test_no_two_tasks_of_a_wave_go_through_one_port() -> None:
    # Three trainers, and two engines beside each of two of them; 3 to 2 rows.
    plan = plan_reshard([rows(3, part) for part in range(3)], [rows(2, part) for part in (0, 1, 0, 1)])
    owners = (0, 1, 2, 0, 1, 1, 0)
    for ports in ("half", "full"):
        schedule = make_timetable(plan, owners=owners, ports=ports)  # type: ignore[arg-type]
        verify(schedule, schedule.tasks)
        for wave in schedule.waves:
            out, into = [], []
            for task in wave.tasks:
                sender, receivers = task_ends(task)
                homes = {owners[each] for each in receivers} - {owners[sender]}
                out += [owners[sender]] if homes else []
                into += homes

            used = [*out, *into] if ports == "half" else out
            assert len(used) == len(set(used))
            assert len(into) == len(set(into))


def test_neighbours_try_to_read_each_other_before_it_is_needed() -> None:
    """Each engine wants what the trainer of the other GPU has."""
    near = frozenset({(0, 2), (2, 0), (1, 3), (3, 1)})
    carriers = Carriers("nccl", near, True, owners=(0, 1, 0, 1))
    sources, destinations = [rows(2, 0), rows(2, 1)], [rows(2, 1), rows(2, 0)]
    found = prepare(sources, destinations, SyncOptions(), None, carriers)
    assert found.pulls == ()
    assert {step.through for program in found.programs for step in program.steps} == {(0,), (1,)}
    assert found.readings == {(0, 2), (1, 3)}
    assert not found.is_safe_ahead
    assert prepare(sources, destinations, SyncOptions(), None, Carriers("nccl", near, True)).readings == frozenset()


# Whole syncs.


@pytest.mark.anyio
@pytest.mark.usefixtures("local", "shared")
@pytest.mark.parametrize("options", [{}, {"staging": "shadow"}, {"checksum": False}, {"budget_bytes": 1 << 20}])
async def test_all_replicas_get_all_weights(options: dict[str, object]) -> None:
    stage, tap = Stage(), Tap()
    stage.wires.wrap = tap.wrap
    async with stage.group(**options) as group:
        for version, value in enumerate((1.0, 2.0, 3.0)):
            stage.fill(value)
            report = await group.sync(validate=True)
            assert [stage.values(replica) for replica in range(2)] == [{value}, {value}]
            assert set(group.versions().values()) == {version}

    assert report.transport == "nccl"
    # The rows cross, and so both owners take part.
    assert {(rank, sender) for rank, sender, _ in tap.moves} >= {(1, 0), (0, 1), (2, 0), (3, 1), (4, 0), (5, 1)}


@pytest.mark.anyio
@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("owners", [(0, 1, 1, 0, 1, 0), (2, 3, 2, 3, 2, 3), (0, 0, 2, 3, 2, 3), (5, 1, 5, 1, 1, 5)])
async def test_whoever_owns_the_ports(monkeypatch: pytest.MonkeyPatch, owners: tuple[int, ...]) -> None:
    share(monkeypatch, owners)
    await sync_twice(Stage())


@pytest.mark.anyio
@pytest.mark.usefixtures("local")
@pytest.mark.parametrize("fan_out", ["chain", "tree"])
async def test_relays_pass_on_through_ports(monkeypatch: pytest.MonkeyPatch, fan_out: str) -> None:
    share(monkeypatch, (0, 1, 1, 0, 0, 1))
    await sync_twice(Stage(), fan_out=fan_out)


@pytest.mark.anyio
@pytest.mark.usefixtures("local")
async def test_programs_name_the_owners_that_are_no_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first engine of each replica owns the port that both of its engines have.
    share(monkeypatch, (0, 1, 2, 2, 4, 4))
    stage = Stage()
    async with stage.group(fan_out="broadcast") as group:
        stage.fill(2.0)
        await group.sync()

    loads = [request for actor in stage.actors for request in actor.asked if isinstance(request, Load)]
    assert len(loads) == 6
    programs = [load.program.unpack() for load in loads]
    # The second rows go to both second engines, by way of both first ones, which are given nothing.
    (rows_of_both,) = {step for step in programs[1].steps if step.receivers == (3, 5)}
    assert rows_of_both.through == (2, 4)
    assert [rows_of_both in program.steps for program in programs] == [False, True, True, True, True, True]
    # The first rows need nobody else, wherever they come from.
    assert all(not step.through for step in programs[0].steps if step.receivers == (2, 4))


@pytest.mark.anyio
@pytest.mark.usefixtures("local", "shared")
async def test_an_owner_that_dies_on_the_way_tears_whom_it_served_and_is_named() -> None:
    stage, tap = Stage(), Tap()
    stage.wires.wrap = tap.wrap
    async with stage.group() as group:
        await group.sync()
        tap.on_start = lambda communicator: stage.trainers[1].kill() if communicator.rank == 1 else None
        stage.fill(7.0)
        with pytest.raises(SyncError) as caught:
            await group.sync()

        assert 1 in caught.value.actors
        assert all(isinstance(version, Torn) for version in group.versions().values())
        tap.on_start = lambda communicator: None
        fresh = stage.actor(2, value=7.0)
        await group.replace(stage.trainers[1], fresh)
        stage.trainers[1] = fresh
        await group.sync()
        assert [stage.values(replica) for replica in range(2)] == [{7.0}, {7.0}]


@pytest.mark.anyio
@pytest.mark.usefixtures("local")
async def test_communicators_are_made_anew_when_another_owns_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    share(monkeypatch, OWNERS)
    stage = Stage()
    async with stage.group() as group:
        await group.sync()
        share(monkeypatch, (2, 3, 2, 3, 2, 3))
        group._lineup.known._chosen = None
        group._lineup.known.prepared = None
        stage.fill(3.0)
        await group.sync()
        assert [stage.values(replica) for replica in range(2)] == [{3.0}, {3.0}]

    connects = [request.owners for request in stage.trainers[0].asked if isinstance(request, Connect)]
    assert connects == [OWNERS, (2, 3, 2, 3, 2, 3)]
