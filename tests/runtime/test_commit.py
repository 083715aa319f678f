"""The vote before a commit in shadow, what a cancelled commit still hears, and deaths that others see first."""

from __future__ import annotations

import anyio
import pytest

from tests.runtime.local_actors import LocalActor, Stage, holder, local
from wavecast.runtime import ActorDied, LayoutError, ModelGroup, ParameterSyncGroup, SyncOptions, Torn
from wavecast.runtime.transfer.messages import Commit, Probe, Request, RunHook, RunStep

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


async def test_only_engines_in_shadow_vote_and_no_one_in_a_dry_run() -> None:
    stage = Stage()
    async with group_of(stage, staging="shadow") as group:
        await group.sync(1, dry_run=True)
        assert [actor.kinds().count("RunHook") for actor in stage.actors] == [0] * 6
        await group.sync(1)
        assert [actor.kinds().count("RunHook") for actor in stage.actors] == [0, 0, 1, 1, 1, 1]

    async with group_of(stage, staging="in_place") as group:
        await group.sync(2)

    assert [actor.kinds().count("RunHook") for actor in stage.actors] == [0, 0, 1, 1, 1, 1]


async def test_an_engine_that_dies_before_its_vote_keeps_all_replicas_on_the_old_version() -> None:
    stage = Stage()
    async with group_of(stage, staging="shadow") as group:
        await group.sync(1)
        stage.fill(2.0)
        engine = stage.replicas[0][1]
        engine.on_request = lambda request: engine.kill() if isinstance(request, RunHook) else None
        with pytest.raises(ActorDied) as caught:
            await group.sync(2)

    assert caught.value.versions == {0: 1, 1: 1}
    assert stage.values(1) == {1.0}
    assert all(actor.kinds()[-2:] == ["Abort", "Close"] for actor in stage.replicas[1])


async def test_live_weights_that_were_replaced_meanwhile_are_no_reason_to_tear_a_replica() -> None:
    stage = Stage()
    async with group_of(stage, staging="shadow") as group:
        await group.sync(1)
        held = holder(stage.replicas[0][0])

        first = held.matrix.data

        def replace(request: Request) -> None:
            if isinstance(request, RunStep):
                held.matrix.data = first.clone()

        stage.replicas[0][0].on_request = replace
        with pytest.raises(LayoutError, match=r"'matrix' was changed during the sync: .*shape \(2, 96\)") as caught:
            await group.sync(2)

        assert caught.value.actors == (2,)
        assert caught.value.versions == {0: 1, 1: 1}


async def test_a_driver_cancelled_in_its_commit_still_hears_who_committed() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        with anyio.CancelScope() as scope:
            stage.trainers[0].on_request = lambda request: scope.cancel() if isinstance(request, Commit) else None
            await group.sync(1)

        assert scope.cancelled_caught
        assert group.versions() == {0: 1, 1: 1}


async def test_a_sender_that_dies_while_it_is_compared_is_named_and_not_its_receiver() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        trainer = stage.trainers[1]
        trainer.on_request = lambda request: trainer.kill() if isinstance(request, Probe) else None
        with pytest.raises(ActorDied) as caught:
            await group.sync(1, validate=True)

        assert caught.value.actors == (1,)


async def test_a_death_that_a_peer_sees_before_ray_does_is_told_as_a_death() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        engine = stage.replicas[1][0]

        def die_quietly(request: Request) -> None:
            # What was asked before is never answered, and the wire breaks.
            if isinstance(request, RunStep) and not engine.dead:
                engine.dead = True
                break_wires(stage.trainers[0])

        engine.on_request = die_quietly
        with pytest.raises(ActorDied) as caught:
            await group.sync(2)

        assert caught.value.actors == (4,)
        assert caught.value.phase == "transfer"
        assert caught.value.versions == {0: Torn(1, 2), 1: Torn(1, 2)}


def break_wires(actor: LocalActor) -> None:
    for session in actor.agent._runs._sessions.values():
        communicator = session.equipment._communicator
        assert communicator is not None
        communicator.abort()
