"""Members that come, go and die."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.runtime.local_actors import Holder, LocalActor, Stage, holder, local
from wavecast.runtime import (
    ActorDied,
    ChecksumMismatch,
    ConfigError,
    LayoutError,
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
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


def kill_at(actor: LocalActor, kind: type, *, nth: int = 1) -> None:
    """Let ``actor`` die at its ``nth`` request of a kind."""
    seen: list[Request] = []

    def look(request: Request) -> None:
        if isinstance(request, kind):
            seen.append(request)
            if len(seen) == nth:
                actor.kill()

    actor.on_request = look


def mirrored(replicas: int) -> Stage:
    stage = Stage(replicas=replicas)
    stage.trainers = [stage.actor(0, rows=4, value=1.0) for _ in range(2)]
    return stage


# Changes.


async def test_a_replacement_leaves_the_others_their_versions_and_what_is_known() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)
        dead, fresh = stage.replicas[1][1], stage.actor(2)
        dead.kill()
        await group.replace(dead, fresh)
        stage.replicas[1][1] = fresh
        assert group.versions() == {0: 3, 1: None}
        assert await group.refresh() == {0: 3, 1: None}
        stage.fill(2.0)
        report = await group.sync()
        assert report.version == 4
        assert stage.values(1) == {2.0}

    # Its layout is known by its digest: nobody was asked to describe it again, and nobody else was let go.
    assert "Describe" not in fresh.kinds()
    assert [actor.kinds().count("Close") for actor in stage.actors] == [1] * 6
    assert dead.kinds()[-1] == "Close"


async def test_a_member_that_is_not_there_is_named() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        with pytest.raises(ConfigError, match="is not in this group"):
            await group.replace(stage.actor(0), stage.actor(0))

        with pytest.raises(ConfigError, match="there is no replica 2, the group has 2"):
            await group.remove_replica(2)

        await group.sync(1)
        with pytest.raises(ConfigError, match="there is no replica 7, the group has 2"):
            await group.sync_replica(7)


async def test_removing_a_replica_moves_the_others_up() -> None:
    stage = Stage(replicas=3)
    async with group_of(stage) as group:
        await group.sync(3)
        engine = stage.replicas[2][0]
        kill_at(engine, Commit)
        with pytest.raises(ActorDied):
            await group.sync(4)

        assert group.versions() == {0: 4, 1: 4, 2: Torn(3, 4)}
        await group.remove_replica(0)
        assert group.versions() == {0: 4, 1: Torn(3, 4)}


# Late joiners.


@pytest.mark.parametrize("staging", ["in_place", "shadow"])
async def test_a_late_joiner_is_served_by_a_peer_while_the_trainers_are_busy(staging: str) -> None:
    stage = Stage()
    async with group_of(stage, staging=staging) as group:
        await group.sync(3)
        # They train on.
        stage.fill(9.0)
        asked = [len(actor.asked) for actor in stage.trainers]
        calls = list(holder(stage.replicas[0][0]).calls)
        stage.replicas.append(stage.replica())
        assert await group.add_replica(stage.replicas[2], catch_up="peer") == 2
        assert group.versions() == {0: 3, 1: 3, 2: 3}
        assert stage.values(2) == {1.0}
        assert [len(actor.asked) for actor in stage.trainers] == asked
        assert holder(stage.replicas[0][0]).calls == [*calls, "transfer_shards"]
        assert await group.refresh() == {0: 3, 1: 3, 2: 3}
        assert (await group.sync()).version == 4
        assert stage.values(0) == stage.values(1) == stage.values(2) == {9.0}


async def test_a_peer_with_hooks_is_not_asked_for_them() -> None:
    class Hooked(Holder):
        """Notes its hooks."""

        def before_commit(self, version: int) -> None:
            self.calls.append("before_commit")

        def after_commit(self, version: int) -> None:
            self.calls.append("after_commit")

    stage = Stage(replicas=1, kind=Hooked)
    async with group_of(stage) as group:
        await group.sync(3)
        before = list(holder(stage.replicas[0][0]).calls)
        stage.replicas.append(stage.replica())
        await group.add_replica(stage.replicas[1], catch_up="peer")
        assert holder(stage.replicas[0][0]).calls == [*before, "transfer_shards"]
        assert holder(stage.replicas[1][0]).calls == ["transfer_shards", "before_commit", "after_commit"]


async def test_names_of_their_own_are_kept_through_shadow_and_peers() -> None:
    def renamed(first: int, rows: int, of: int, value: float) -> Holder:
        worker = Holder(first, rows, of, value)
        if value == 0.0:
            plain = worker.transfer_shards
            worker.transfer_shards = lambda: [  # type: ignore[method-assign]
                replace(shard, name=f"engine.{shard.name}") for shard in plain()
            ]

        return worker

    stage = Stage(replicas=1, kind=renamed)
    names = {"engine.matrix": "matrix", "engine.scale": "scale"}
    group = ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas, names=names),
        SyncOptions(transport="gloo", staging="shadow"),
    )
    async with group:
        await group.sync(3)
        stage.replicas.append(stage.replica())
        await group.add_replica(stage.replicas[1], catch_up="peer")
        assert stage.values(0) == stage.values(1) == {1.0}


async def test_a_late_joiner_may_be_served_by_the_trainers_alone() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as group:
        await group.sync(3)
        asked = len(stage.replicas[0][0].asked)
        stage.replicas.append(stage.replica())
        await group.add_replica(stage.replicas[1], catch_up="trainer")
        assert group.versions() == {0: 3, 1: 3}
        assert stage.values(1) == {1.0}
        assert len(stage.replicas[0][0].asked) == asked


async def test_a_late_joiner_may_wait_for_the_next_sync() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as group:
        await group.sync(3)
        stage.replicas.append(stage.replica())
        await group.add_replica(stage.replicas[1])
        assert group.versions() == {0: 3, 1: None}
        await group.sync()
        assert group.versions() == {0: 4, 1: 4}


async def test_a_torn_replica_is_healed_by_a_peer() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)
        engine = stage.replicas[0][1]
        kill_at(engine, Commit)
        stage.fill(2.0)
        with pytest.raises(ActorDied):
            await group.sync(4)

        engine.dead, engine.on_request = False, lambda request: None
        assert group.versions() == {0: Torn(3, 4), 1: 4}
        report = await group.sync_replica(0)
        assert (report.version, group.versions()) == (4, {0: 4, 1: 4})
        with pytest.raises(ConfigError, match="source is 'moon', it must be peer or trainer"):
            await group.sync_replica(0, source="moon")  # type: ignore[arg-type]


async def test_a_new_driver_learns_from_the_replicas_what_there_is_to_catch_up_with() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)

    fresh = Stage(replicas=1)
    for actor in fresh.actors:
        actor.agent._runs._make_session = stage.trainers[0].agent._runs._make_session

    stage.replicas.append(fresh.replicas[0])
    async with group_of(stage) as group:
        await group.sync_replica(2)
        assert group.versions() == {0: 3, 1: 3, 2: 3}
        assert stage.values(2) == {1.0}


async def test_without_a_version_or_a_peer_there_is_nothing_to_catch_up_with() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as group:
        with pytest.raises(ConfigError, match="no replica has a version yet"):
            await group.sync_replica(0)

        await group.sync(3)
        with pytest.raises(ConfigError, match="no other replica has version 3"):
            await group.sync_replica(0)


async def test_a_peer_that_dies_while_it_lends_is_named_by_its_number_in_the_group() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)
        stage.replicas.append(stage.replica())
        peer = stage.replicas[0][1]
        kill_at(peer, RunStep)
        with pytest.raises(ActorDied) as caught:
            await group.add_replica(stage.replicas[2], catch_up="peer")

        assert caught.value.actors == (3,)
        assert group.versions()[0] == 3
        assert isinstance(group.versions()[2], Torn | None)
        assert caught.value.versions == group.versions()


# What the options forgive.


async def test_a_lost_replica_is_dropped_and_the_others_get_the_version() -> None:
    stage = Stage(replicas=3)
    async with group_of(stage, on_lost_replica="drop") as group:
        await group.sync(3)
        stage.fill(2.0)
        kill_at(stage.replicas[1][0], RunStep, nth=2)
        report = await group.sync()
        assert (report.version, report.dropped, report.attempts) == (4, (1,), 2)
        assert group.versions() == {0: 4, 1: 4}
        assert stage.values(0) == stage.values(2) == {2.0}
        # What is left of it is let go.
        assert stage.replicas[1][1].kinds()[-1] == "Close"
        assert (await group.sync()).dropped == ()


async def test_the_last_replica_is_not_dropped() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, on_lost_replica="drop") as group:
        kill_at(stage.replicas[0][0], RunStep)
        with pytest.raises(ActorDied):
            await group.sync()

        assert list(group.versions()) == [0]


async def test_a_lost_trainer_is_planned_around_where_others_hold_its_shards() -> None:
    stage = mirrored(2)
    async with group_of(stage, on_lost_trainer="replan") as group:
        await group.sync(3)
        for actor in stage.trainers:
            holder(actor).fill(2.0)

        lost = stage.trainers[0]
        kill_at(lost, RunStep, nth=2)
        report = await group.sync()
        assert (report.version, report.attempts, report.lost_trainers) == (4, 2, 1)
        assert stage.values(0) == stage.values(1) == {2.0}
        assert (await group.sync()).lost_trainers == 1
        # It can still be replaced.
        fresh = stage.actor(0, rows=4, value=2.0)
        await group.replace(lost, fresh)
        report = await group.sync()
        assert (report.lost_trainers, group.versions()) == (0, {0: 6, 1: 6})
        assert "Begin" in fresh.kinds()


async def test_a_lost_trainer_whose_shards_nobody_holds_is_an_error_that_names_them() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage, on_lost_trainer="replan") as group:
        kill_at(stage.trainers[1], Begin)
        with pytest.raises(LayoutError, match="no source holds 'matrix'") as caught:
            await group.sync()

        assert isinstance(caught.value.__cause__, ActorDied)


@pytest.mark.parametrize("option", ["on_lost_replica", "on_lost_trainer"])
async def test_the_one_option_does_not_forgive_the_other(option: str) -> None:
    stage = mirrored(2)
    victim = stage.trainers[0] if option == "on_lost_replica" else stage.replicas[0][0]
    async with group_of(stage, **{option: "drop" if option == "on_lost_replica" else "replan"}) as group:
        kill_at(victim, RunStep)
        with pytest.raises(ActorDied):
            await group.sync()


@pytest.mark.parametrize(("retries", "spoilt"), [(1, 1), (2, 2), (0, 1), (1, 2)])
async def test_a_checksum_that_differs_is_tried_again_as_often_as_asked(
    retries: int, spoilt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(replicas=1)
    left = [spoilt]

    def compare(finished: object, preparation: object) -> None:
        if left[0]:
            left[0] -= 1
            raise ChecksumMismatch("one bit is another", task=2, actors=(0, 2))

    monkeypatch.setattr("wavecast.runtime.sync_run.compare_checksums", compare)
    async with group_of(stage, retries=retries) as group:
        if spoilt > retries:
            with pytest.raises(ChecksumMismatch) as caught:
                await group.sync(1)

            error = caught.value
            assert (error.phase, error.version, error.versions) == ("verify", 1, {0: Torn(None, 1)})
            assert (error.task, error.tasks, error.wave is not None) == (2, (2,), True)
            assert error.tensor in ("matrix", "scale")
        else:
            report = await group.sync(1)
            assert (report.attempts, report.version) == (spoilt + 1, 1)
            assert stage.values(0) == {1.0}


def test_options_that_cannot_be_are_refused() -> None:
    for name, value in (("retries", -1), ("when_busy", "wait"), ("on_lost_replica", "ignore"), ("on_lost_trainer", "")):
        with pytest.raises(ConfigError, match=f"option {name} is"):
            SyncOptions(**{name: value})  # type: ignore[arg-type]
