"""Whole syncs in shadow: replicas are whole at any time."""

from __future__ import annotations

import pytest

from tests.runtime.local_actors import ELEMENTS, Holder, Stage, holder, local
from wavecast.runtime import (
    ActorDied,
    ConfigError,
    ModelGroup,
    ParameterSyncGroup,
    SyncOptions,
    Torn,
)
from wavecast.runtime.transfer.messages import Begin, Commit, Request, RunStep

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, "staging": "shadow", **options}),  # type: ignore[arg-type]
    )


async def test_weights_change_at_the_commit_and_not_before() -> None:
    stage = Stage()
    seen: list[set[float]] = []

    class Watched(Holder):
        def before_commit(self, version: int) -> None:
            seen.append(self.values())

    watched = Stage(kind=Watched)
    async with group_of(watched) as group:
        report = await group.sync(1, validate=True)

    # The trainers' and the engines'.
    assert seen == [{1.0}] * 2 + [{0.0}] * 4
    assert watched.values(0) == watched.values(1) == {1.0}
    assert report.staging == "shadow"
    assert report.shadow_bytes == 4 * (2 * ELEMENTS + 1)
    assert 0 < report.pause_seconds <= report.seconds.commit
    async with group_of(stage, staging="in_place") as group:
        report = await group.sync(1)

    assert (report.staging, report.shadow_bytes) == ("in_place", 0)
    assert report.seconds.transfer <= report.pause_seconds <= report.seconds.total


@pytest.mark.parametrize("kind", [RunStep, Begin])
async def test_a_sync_that_fails_leaves_the_old_version_whole(kind: type[Request]) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        stage.fill(2.0)
        trainer, seen = stage.trainers[0], []

        def die(request: Request) -> None:
            if isinstance(request, kind):
                seen.append(request)
                if len(seen) == (3 if kind is RunStep else 1):
                    trainer.kill()

        trainer.on_request = die
        with pytest.raises(ActorDied) as caught:
            await group.sync(2)

        assert caught.value.versions == {0: 1, 1: 1}
        assert stage.values(0) == stage.values(1) == {1.0}
        trainer.dead, trainer.on_request = False, lambda request: None
        assert await group.refresh() == {0: 1, 1: 1}
        # What the failed one left in the second copy is not flipped by another.
        await group.sync(2, only={"scale"})
        assert [holder(actor).scale.item() for actor in stage.replicas[0]] == [2.0] * 2
        assert [set(holder(actor).matrix.flatten().tolist()) for actor in stage.replicas[0]] == [{1.0}] * 2
        await group.sync()
        assert stage.values(0) == stage.values(1) == {2.0}


async def test_a_dry_run_flips_nothing() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as group:
        report = await group.sync(1, dry_run=True)
        assert report.pause_seconds == 0
        assert stage.values(0) == {0.0}
        assert group.versions() == {0: None}


async def test_an_actor_that_dies_in_its_commit_tears_its_own_replica_alone() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        engine = stage.replicas[0][1]
        engine.on_request = lambda request: engine.kill() if isinstance(request, Commit) else None
        stage.fill(2.0)
        with pytest.raises(ActorDied) as caught:
            await group.sync(2)

        assert caught.value.versions == {0: Torn(1, 2), 1: 2}
        assert stage.values(1) == {2.0}


async def test_a_flip_that_fails_tears_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(1)
        shadow = stage.replicas[0][0].agent._weights._shadow
        assert shadow is not None

        def fail(shards: object, names: object) -> float:
            raise RuntimeError("an illegal memory access was encountered")

        with monkeypatch.context() as patch:
            patch.setattr(shadow, "flip", fail)
            with pytest.raises(Exception, match="illegal memory access") as caught:
                await group.sync(2)

        assert caught.value.versions == {0: Torn(1, 2), 1: 2}  # type: ignore[attr-defined]
        assert await group.refresh() == {0: Torn(1, 2), 1: 2}
        await group.sync(3)
        assert group.versions() == {0: 3, 1: 3}


async def test_the_second_copy_is_made_once_and_given_back() -> None:
    stage = Stage(replicas=1)
    agent = stage.replicas[0][0].agent
    async with group_of(stage) as group:
        await group.sync()
        first = agent._weights._shadow
        # The weights may move meanwhile.
        held = holder(stage.replicas[0][0])
        held.matrix = held.matrix.clone()
        stage.fill(3.0)
        await group.sync()
        assert agent._weights._shadow is first
        assert stage.values(0) == {3.0}
        assert stage.trainers[0].agent._weights._shadow is None

    assert agent._weights._shadow is None


async def test_a_replica_torn_in_place_is_healed_in_shadow() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, staging="in_place") as group:
        await group.sync(1)
        engine = stage.replicas[0][0]
        engine.on_request = lambda request: engine.kill() if isinstance(request, Commit) else None
        with pytest.raises(ActorDied):
            await group.sync(2)

    engine.dead, engine.on_request = False, lambda request: None
    async with group_of(stage) as group:
        await group.sync(3, only={"scale"})
        assert isinstance(group.versions()[0], Torn)
        await group.sync(3)
        assert group.versions() == await group.refresh() == {0: 3}


def test_another_staging_is_refused() -> None:
    with pytest.raises(ConfigError, match="option staging is 'swap', it must be in_place or shadow"):
        SyncOptions(staging="swap")  # type: ignore[arg-type]
