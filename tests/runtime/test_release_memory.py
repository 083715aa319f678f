"""Nothing keeps the weights' memory between syncs where that was asked for: actors may offload what they hold."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest

from tests.runtime.host_gpus import Machine
from tests.runtime.local_actors import ELEMENTS, Holder, LocalActor, Stage, local
from tests.runtime.test_ahead import GpuStage, gpu_actor, group_of, machine, pool
from wavecast.runtime import Shard, SyncError
from wavecast.runtime.transfer import session
from wavecast.runtime.transfer.lane import Lane

__all__ = ("local", "machine", "pool")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


class Viewer(Holder):
    """
    Hands out new views of its matrix at each sync, as adapters do, and offloads it after each commit.

    :ivar alive: by sync: whether the matrix that was synced outlived the hook that offloaded it
    """

    def __init__(self, first: int, rows: int, of: int, value: float) -> None:
        super().__init__(first, rows, of, value)
        self.alive: list[bool] = []
        self.fails = False

    def transfer_shards(self) -> Sequence[Shard]:
        if self.fails:
            raise RuntimeError("not yet")

        whole = (self.of, ELEMENTS)
        return [
            Shard("matrix", self.matrix[:1], (self.first, 0), whole),
            Shard("matrix", self.matrix[1:], (self.first + 1, 0), whole),
            Shard("scale", self.scale[()], (), ()),
        ]

    def after_commit(self, version: int) -> None:
        watched = weakref.ref(self.matrix.untyped_storage())
        self.matrix = self.matrix.clone()
        self.alive.append(watched() is not None)


def viewer(actor: LocalActor) -> Viewer:
    assert isinstance(actor.worker, Viewer)
    return actor.worker


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_what_a_hook_offloads_after_the_commit_is_freed(staging: str) -> None:
    stage = Stage(kind=Viewer)
    async with stage.group(release_memory=True, staging=staging) as syncing:
        for value in (1.0, 2.0, 3.0):
            stage.fill(value)
            await syncing.sync(validate=True)
            assert [stage.values(replica) for replica in range(2)] == [{value}, {value}]

    assert [viewer(actor).alive for actor in stage.actors] == [[False] * 3] * 6


async def test_no_thread_keeps_it_that_has_not_run_since(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lingering(Lane):
        """Holds what it has done last until there is something else to do."""

        def _work(self) -> None:
            call = self._calls.get()
            while call is not None:
                call()
                call = self._calls.get()

    monkeypatch.setattr(session, "Lane", Lingering)
    stage = Stage(kind=Viewer)
    async with stage.group(release_memory=True) as syncing:
        for _ in range(2):
            await syncing.sync()

    assert [viewer(actor).alive for actor in stage.actors] == [[False] * 2] * 6


async def test_without_being_asked_it_is_kept_for_the_next_sync() -> None:
    stage = Stage(kind=Viewer)
    async with stage.group() as syncing:
        await syncing.sync()

    assert all(viewer(actor).alive == [True] for actor in stage.actors)


async def test_nothing_is_kept_once_the_group_is_closed() -> None:
    stage = Stage()
    async with stage.group() as syncing:
        await syncing.sync()

    watched = []
    for actor in stage.actors:
        worker = actor.worker
        assert isinstance(worker, Holder)
        watched.append(weakref.ref(worker.matrix))
        del worker.matrix
        # What was said of it stays true.
        assert not actor.agent.torn

    assert [found() for found in watched] == [None] * 6


async def test_after_a_failure_the_next_sync_lets_go() -> None:
    stage = Stage(kind=Viewer)
    async with stage.group(release_memory=True) as syncing:
        viewer(stage.trainers[0]).fails = True
        with pytest.raises(SyncError, match="not yet"):
            await syncing.sync()

        viewer(stage.trainers[0]).fails = False
        stage.fill(5.0)
        await syncing.sync()
        assert [stage.values(replica) for replica in range(2)] == [{5.0}, {5.0}]

    assert [viewer(actor).alive for actor in stage.actors] == [[False]] * 6


async def test_mappings_are_given_back_before_the_commit_and_made_anew(machine: Machine) -> None:
    stage = GpuStage(machine)
    async with group_of(stage, release_memory=True) as syncing:
        for number in range(3):
            stage.renew(number)
            report = await syncing.sync()
            assert stage.arrived()
            assert report.version == number
            for asked in stage.take():
                again = {"Export"} if "Attach" not in asked else {"Export", "Attach"}
                assert again <= {*asked}
                assert asked[-2:] == ["Disconnect", "Commit"]
                assert ("Load" in asked) == (number == 0)

            agents = [gpu_actor(actor).agent for actor in stage.actors]
            assert [agent._holding.memory for agent in agents] == [None] * 4
            sessions = [each for agent in agents for each in agent._runs._sessions.values()]
            assert [each.equipment.puller for each in sessions] == [None] * 4

            assert not any(stage.machine.opened.values())


async def test_communicators_stay_unless_they_are_to_go_as_well() -> None:
    for both in (False, True):
        stage = Stage()
        async with stage.group(release_memory=True, release_communicators=both) as syncing:
            await syncing.sync()
            await syncing.sync()

        kinds = stage.trainers[0].kinds()
        assert kinds.count("Connect") == 1 + both
        assert kinds.count("Disconnect") == 2
