"""Versions: what actors say, what a driver makes of it, and what the next driver finds."""

from __future__ import annotations

import pytest

from tests.runtime.local_actors import LocalActor, Stage, holder, local
from wavecast.runtime import ActorDied, ConfigError, ModelGroup, ParameterSyncGroup, SyncOptions, Torn
from wavecast.runtime.transfer.messages import Begin, Commit, Request, RunStep, Standing
from wavecast.runtime.versions import Versions, replica_version

__all__ = ("local",)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("local")]

WHOLE = Standing(3, False, None)
NEW = Standing(None, False, None)


def group_of(stage: Stage, **options: object) -> ParameterSyncGroup:
    return ParameterSyncGroup(
        ModelGroup("policy", [stage.trainers]),
        ModelGroup("rollout", stage.replicas),
        SyncOptions(**{"transport": "gloo", "chunk_bytes": 1 << 8, **options}),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("standings", "version"),
    [
        ([WHOLE, WHOLE], 3),
        ([NEW, NEW], None),
        ([WHOLE, NEW], None),
        ([WHOLE, Standing(4, False, None)], Torn(3, 4)),
        ([WHOLE, Standing(3, True, 7)], Torn(3, 7)),
        ([NEW, Standing(None, True, 2)], Torn(None, 2)),
        ([WHOLE, Standing(None, True, None)], Torn(None, 3)),
    ],
)
async def test_a_replica_is_whole_only_if_all_its_actors_say_the_same(
    standings: list[Standing], version: object
) -> None:
    assert replica_version(standings) == version


async def test_the_newest_version_outlives_the_replica_that_had_it() -> None:
    versions = Versions(2)
    versions.observe([[Standing(9, False, None)], [WHOLE]])
    versions.remove(0)
    assert versions.by_index() == {0: 3}
    assert versions.next(None) == 10
    with pytest.raises(ConfigError, match="version 8 is older than 9"):
        versions.next(8)


async def test_what_tore_a_replica_stays_as_the_driver_saw_it() -> None:
    versions = Versions(1)
    versions.take_on(0, 3)
    versions.tear(0, 4)
    versions.tear(0, 5)
    assert versions[0] == Torn(3, 5)
    versions.observe([[Standing(3, True, 6)]])
    assert versions[0] == Torn(3, 5)
    # Whoever is whole is whole, whatever was feared.
    versions.observe([[WHOLE]])
    assert versions[0] == 3


async def test_a_new_driver_finds_the_versions_and_goes_on_behind_them() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)

    stage.fill(2.0)
    async with group_of(stage) as group:
        assert group.versions() == {0: None, 1: None}
        report = await group.sync()
        assert report.version == 8
        assert group.versions() == {0: 8, 1: 8}
        assert stage.values(0) == stage.values(1) == {2.0}
        # Asked for at the first contact, and never again.
        await group.sync()

    assert [actor.kinds().count("Status") for actor in stage.actors] == [0, 0, 2, 2, 2, 2]


async def test_refresh_tells_the_versions_and_calls_nothing_of_the_users() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)

    calls = [list(holder(actor).calls) for actor in stage.actors]
    async with group_of(stage) as group:
        assert await group.refresh() == {0: 7, 1: 7}
        assert group.versions() == {0: 7, 1: 7}
        with pytest.raises(ConfigError, match="version 6 is older than 7"):
            await group.sync(6)

    assert [holder(actor).calls for actor in stage.actors] == calls


async def test_a_new_driver_cannot_go_backwards_at_its_first_contact() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)

    stage.fill(2.0)
    async with group_of(stage) as group:
        with pytest.raises(ConfigError, match="version 6 is older than 7"):
            await group.sync(6)

        assert stage.values(0) == {1.0}
        assert group.versions() == {0: 7, 1: 7}
        await group.sync(7)

    assert stage.values(0) == {2.0}


async def test_a_driver_that_another_one_has_overtaken_begins_again_behind_it() -> None:
    stage = Stage(replicas=1)
    async with group_of(stage) as first, group_of(stage) as second:
        await first.sync(1)
        await second.sync(5)
        assert first.versions() == {0: 1}
        with pytest.raises(ConfigError, match="version 3 is older than 5"):
            await first.sync(3)

        await second.sync(8)
        assert (await first.sync()).version == 9
        assert first.versions() == {0: 9}


async def test_a_replica_torn_by_an_earlier_driver_shows_as_torn() -> None:
    stage = Stage()
    engine = stage.replicas[1][0]

    def die(request: Request) -> None:
        if isinstance(request, Commit):
            engine.kill()

    async with group_of(stage) as group:
        await group.sync(3)

    engine.on_request = die
    async with group_of(stage) as group:
        with pytest.raises(ActorDied) as caught:
            await group.sync(4)

        # All the others had committed already: their replica is whole.
        assert caught.value.versions == group.versions() == {0: 4, 1: Torn(3, 4)}
        assert (caught.value.phase, caught.value.version) == ("commit", 4)

    engine.dead, engine.on_request = False, lambda request: None
    async with group_of(stage) as group:
        assert await group.refresh() == {0: 4, 1: Torn(3, 4)}
        assert (await group.sync()).version == 5
        assert group.versions() == {0: 5, 1: 5}


async def test_a_sync_that_fails_before_the_first_write_tears_nothing() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)
        trainer = stage.trainers[0]
        trainer.on_request = lambda request: trainer.kill() if isinstance(request, Begin) else None
        with pytest.raises(ActorDied) as caught:
            await group.sync(4)

        assert caught.value.actors == (0,)
        assert caught.value.phase == "describe"
        assert group.versions() == {0: 3, 1: 3}


async def test_a_replica_that_was_written_to_is_torn_for_the_next_driver_too() -> None:
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(3)
        stage.fill(2.0)
        seen: list[Request] = []
        trainer = stage.trainers[1]

        def die_in_the_middle(request: Request) -> None:
            if isinstance(request, RunStep):
                seen.append(request)
                if len(seen) == 3:
                    trainer.kill()

        trainer.on_request = die_in_the_middle
        with pytest.raises(ActorDied) as caught:
            await group.sync(4)

        assert caught.value.wave is not None
        assert caught.value.tasks == (caught.value.task,)
        assert caught.value.tensor in ("matrix", "scale")
        assert group.versions() == {0: Torn(3, 4), 1: Torn(3, 4)}

    trainer.dead, trainer.on_request = False, lambda request: None
    async with group_of(stage) as group:
        assert await group.refresh() == {0: Torn(3, 4), 1: Torn(3, 4)}
        await group.sync(only={"scale"})
        assert group.versions() == {0: Torn(3, 4), 1: Torn(3, 4)}

    # A part of the tensors has made nobody whole, and the actors know it.
    async with group_of(stage) as group:
        assert [isinstance(version, Torn) for version in (await group.refresh()).values()] == [True, True]
        await group.sync()
        assert group.versions() == {0: 4, 1: 4}
        assert stage.values(0) == stage.values(1) == {2.0}


async def test_a_torn_source_is_refused() -> None:
    stage = Stage(replicas=1)
    torn: list[LocalActor] = stage.replicas[0]
    async with group_of(stage) as group:
        await group.sync(1)
        torn[0].on_request = lambda request: torn[0].kill() if isinstance(request, Commit) else None
        with pytest.raises(ActorDied):
            await group.sync(2)

    torn[0].dead, torn[0].on_request = False, lambda request: None
    other = Stage(replicas=1)
    for actor in (*torn, *other.replicas[0]):
        actor.agent._runs._make_session = stage.trainers[0].agent._runs._make_session

    chain = ParameterSyncGroup(ModelGroup("relay", [torn]), ModelGroup("rollout", other.replicas))
    async with chain:
        with pytest.raises(Exception, match="a source's weights are torn") as caught:
            await chain.sync()

        assert caught.value.actors == (0,)  # type: ignore[attr-defined]
        assert chain.versions() == {0: None}


async def test_sources_keep_their_own_version() -> None:
    """A relay's version is what it was brought to, not what it sends."""
    stage = Stage()
    async with group_of(stage) as group:
        await group.sync(7)

    assert [actor.agent.version for actor in stage.actors] == [None, None, 7, 7, 7, 7]


async def test_a_dead_actor_cannot_say_its_version() -> None:
    stage = Stage()
    stage.replicas[0][1].kill()
    async with group_of(stage) as group:
        with pytest.raises(ActorDied) as caught:
            await group.refresh(deadline=5)

        assert caught.value.actors == (3,)
        assert group.versions() == {0: None, 1: None}
