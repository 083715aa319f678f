"""Syncs that must fail: by the right class, naming who and what, in bounded time, with the group usable after."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest
import ray
import trio

from tests.integration.actors import AsyncActor, OneTensor, Plain, PoolActor, ThreadedActor
from tests.integration.conftest import MakeSides, Pool
from wavecast.runtime import (
    ActorDied,
    ActorFailed,
    ConfigError,
    GroupClosed,
    LayoutError,
    ModelGroup,
    NotATransferWorker,
    ParameterSyncGroup,
    SyncError,
    SyncInProgress,
    SyncOptions,
    SyncTimeout,
    Torn,
    TransportUnavailable,
    UnsupportedEventLoop,
    ValidationError,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Small chunks, so that a sync has many tasks and can be caught in the middle.
MANY_TASKS = SyncOptions(chunk_bytes=1 << 16, in_flight=1)


@asynccontextmanager
async def closed_later(group: ParameterSyncGroup) -> AsyncIterator[ParameterSyncGroup]:
    async with group:
        yield group


async def test_a_source_tensor_that_is_nan_is_found_before_anything_moves(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    sides.fill(0)
    ray.get(sides.sources[1].set_value.remote("model.norm.weight", float("nan")))  # type: ignore[attr-defined]
    async with ParameterSyncGroup(*sides.groups()) as group:
        with pytest.raises(ValidationError, match=r"NaN; the first is 'model\.norm\.weight' with 1 elements") as caught:
            await group.sync(validate=True)

        assert caught.value.actors == (1,)
        assert caught.value.phase == "describe"
        assert group.versions() == {0: None}
        await group.sync(validate=False)


async def test_a_tensor_that_no_source_has_is_named(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1", model="tiny-qwen2", layers=1)
    other = make_sides("tp=1", "tp=1", model="tiny-qwen2", layers=2)
    group = ParameterSyncGroup(ModelGroup("policy", [sides.sources]), ModelGroup("rollout", other.replicas))
    async with group:
        with pytest.raises(LayoutError, match=r"model\.layers\.1\.") as caught:
            await group.sync()

        assert caught.value.tensor.startswith("model.layers.1.")
        assert caught.value.phase == "plan"
        assert group.versions() == {0: None}


async def test_tensors_allowed_to_be_missing_stay_as_they_are(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1", layers=1)
    other = make_sides("tp=1", "tp=1", layers=2)
    sides.fill(0)
    layout = ray.get(other.destinations[0].held_layout.remote())  # type: ignore[attr-defined]
    missing = [piece.tensor for piece in layout.pieces if piece.tensor.startswith("model.layers.1.")]
    options = SyncOptions(allow_missing=missing)
    group = ParameterSyncGroup(ModelGroup("policy", [sides.sources]), ModelGroup("rollout", other.replicas), options)
    async with group:
        await group.sync()

    assert sorted(other.differing(0)) == sorted(missing)


@pytest.mark.parametrize(
    ("dtype", "size", "message"),
    [("int32", 4, "int32"), ("float32", 5, "5")],
)
async def test_a_wrong_dtype_or_shape_is_named(cluster: None, dtype: str, size: int, message: str) -> None:
    actor_class = ray.remote(OneTensor).options(num_cpus=0)
    trainer = actor_class.remote([1.0] * 4, "float32", 0, 4)
    engine = actor_class.remote([0.0] * 4, dtype, 0, size)
    try:
        async with ParameterSyncGroup(ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine]])) as group:
            with pytest.raises(LayoutError, match=message) as caught:
                await group.sync()

            assert caught.value.tensor == "weight"
    finally:
        ray.kill(trainer)
        ray.kill(engine)


async def test_an_actor_without_the_mixin_is_refused_when_the_group_is_made(cluster: None) -> None:
    plain = ray.remote(Plain).options(num_cpus=0).remote()
    with pytest.raises(NotATransferWorker) as caught:
        ParameterSyncGroup(ModelGroup("policy", [[plain]]), ModelGroup("rollout", [[plain]]))

    assert isinstance(caught.value, SyncError)
    ray.kill(plain)


async def test_an_actor_on_both_sides_or_listed_twice_is_refused(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    (actor,) = sides.sources
    with pytest.raises(ConfigError, match="lists an actor twice"):
        ModelGroup("policy", [[actor, actor]])

    with pytest.raises(ConfigError, match="at least one replica"):
        ModelGroup("policy", [])

    with pytest.raises(ConfigError, match="is in 'policy' and in 'rollout'"):
        ParameterSyncGroup(ModelGroup("policy", [[actor]]), ModelGroup("rollout", [[actor]]))


async def test_what_the_users_hook_raises_reaches_the_trainer(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    ray.get(sides.sources[1].fail_with.remote("the optimiser is out to lunch"))  # type: ignore[attr-defined]
    async with ParameterSyncGroup(*sides.groups()) as group:
        with pytest.raises(ActorFailed, match="ValueError: the optimiser is out to lunch") as caught:
            await group.sync()

        assert caught.value.actors == (1,)
        assert caught.value.phase == "describe"
        assert "fail_with" not in str(caught.value)
        assert "transfer_shards" in "".join(caught.value.__notes__)
        ray.get(sides.sources[1].fail_with.remote(""))  # type: ignore[attr-defined]
        sides.fill(0)
        await group.sync()

    assert sides.differing(0) == {}


async def test_nccl_without_gpus_is_refused(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    async with ParameterSyncGroup(*sides.groups(), SyncOptions(transport="nccl")) as group:
        with pytest.raises(TransportUnavailable, match="host memory"):
            await group.sync()


async def test_a_closed_group_says_so(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    group = ParameterSyncGroup(*sides.groups())
    await group.aclose()
    await group.aclose()
    with pytest.raises(GroupClosed):
        await group.sync()

    with pytest.raises(GroupClosed):
        await group.add_replica([])


async def test_two_syncs_at_once_are_refused_and_the_first_goes_on(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    sides.fill(0)
    refused: list[SyncInProgress] = []
    async with ParameterSyncGroup(*sides.groups()) as group:

        async def second(receipt: object) -> None:
            with pytest.raises(SyncInProgress) as caught:
                await group.sync()

            refused.append(caught.value)

        async with anyio.create_task_group() as tasks:
            await group.sync(0, progress=lambda receipt: tasks.start_soon(second, receipt) if not refused else None)

    assert refused
    assert sides.differing(0) == {}


async def test_a_version_never_goes_backwards(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups()) as group:
        await group.sync(5)
        with pytest.raises(ConfigError, match="version 4 is older than 5"):
            await group.sync(4)

        assert (await group.sync()).version == 6


def test_another_event_loop_is_refused(cluster: None, pool: Pool, make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")

    async def attempt() -> None:
        group = ParameterSyncGroup(*sides.groups())
        with pytest.raises(UnsupportedEventLoop):
            await group.sync()

        with pytest.raises(UnsupportedEventLoop):
            async with group:
                raise AssertionError("the group was entered")

    trio.run(attempt)


@pytest.mark.parametrize("side", ["source", "destination"])
async def test_an_actor_killed_in_the_middle_is_named_and_can_be_replaced(
    make_sides: MakeSides, pool: Pool, side: str
) -> None:
    sides = make_sides("tp=2", "tp=1", replicas=2)
    (fresh,) = make_sides("tp=1", "tp=1").destinations if side == "destination" else (None,)
    victims = sides.sources if side == "source" else sides.destinations
    victim = victims[1]
    killed: list[object] = []

    def kill(receipt: object) -> None:
        if not killed:
            killed.append(victim)
            pool.kill(victim)

    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), MANY_TASKS) as group:
        with anyio.fail_after(31), pytest.raises(ActorDied) as caught:
            await group.sync(deadline=30, progress=kill)

        number = 1 if side == "source" else 3
        assert caught.value.actors == (number,)
        assert caught.value.phase == "transfer"
        assert caught.value.task is not None
        assert isinstance(group.versions()[0], Torn | None)
        if fresh is not None:
            await group.replace(victim, fresh)
            sides.fill(1)
            await group.sync()
            assert group.versions() == {0: 0, 1: 0}
            sides.replicas[1] = [fresh]
            assert sides.differing(1) == {}


@pytest.mark.parametrize("kind", [PoolActor, ThreadedActor, AsyncActor])
async def test_a_stopped_actor_ends_in_a_timeout_that_names_it(make_sides: MakeSides, pool: Pool, kind: type) -> None:
    sides = make_sides("tp=1", "tp=1", kind=kind)
    (engine,) = sides.destinations
    process = ray.get(engine.process_id.remote())  # type: ignore[attr-defined]
    stopped: list[int] = []

    def stop(receipt: object) -> None:
        if not stopped:
            stopped.append(process)
            os.kill(process, signal.SIGSTOP)

    sides.fill(0)
    group = ParameterSyncGroup(*sides.groups(), MANY_TASKS)
    try:
        with anyio.fail_after(4), pytest.raises(SyncTimeout) as caught:
            await group.sync(3, deadline=3, progress=stop)
    finally:
        os.kill(process, signal.SIGCONT)

    assert 1 in caught.value.actors
    assert caught.value.phase == "transfer"
    assert caught.value.version == 3
    assert group.versions() == {0: Torn(None, 3)}
    report = await group.sync(4)
    assert report.connected
    assert sides.differing(0) == {}
    assert group.versions() == {0: 4}
    await group.aclose()


async def test_a_task_that_takes_too_long_ends_the_sync_before_its_deadline(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    (engine,) = sides.destinations
    process = ray.get(engine.process_id.remote())  # type: ignore[attr-defined]

    def stop(receipt: object) -> None:
        os.kill(process, signal.SIGSTOP)

    sides.fill(0)
    group = ParameterSyncGroup(*sides.groups(), dataclasses.replace(MANY_TASKS, task_allowance=2.0))
    try:
        with anyio.fail_after(30), pytest.raises(SyncTimeout, match="took longer than it is allowed") as caught:
            await group.sync(3, deadline=60, progress=stop)
    finally:
        os.kill(process, signal.SIGCONT)

    assert 1 in caught.value.actors
    assert caught.value.task is not None
    assert caught.value.phase == "transfer"
    assert group.versions() == {0: Torn(None, 3)}
    await group.aclose()


async def test_an_actor_busy_with_the_users_own_call_ends_in_a_timeout(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)
    (engine,) = sides.destinations
    busy = engine.busy.remote(3.0)  # type: ignore[attr-defined]
    async with ParameterSyncGroup(*sides.groups()) as group:
        with anyio.fail_after(2), pytest.raises(SyncTimeout) as caught:
            await group.sync(deadline=1)

        assert caught.value.actors == (1,)
        assert caught.value.phase == "describe"
        assert group.versions() == {0: None}
        ray.get(busy)
        await group.sync()

    assert sides.differing(0) == {}


@pytest.mark.parametrize("kind", [PoolActor, AsyncActor])
async def test_cancelling_the_trainer_leaves_the_group_usable(make_sides: MakeSides, kind: type) -> None:
    sides = make_sides("tp=2", "tp=1", kind=kind)
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), MANY_TASKS) as group:
        with anyio.CancelScope() as scope:
            await group.sync(1, progress=lambda receipt: scope.cancel())

        assert scope.cancelled_caught
        assert group.versions() == {0: Torn(None, 1)}
        sides.fill(2)
        await group.sync(2)
        assert group.versions() == {0: 2}

    assert sides.differing(2) == {}


@pytest.mark.parametrize("deadline", [0, -1.0, float("inf"), float("nan"), "3", True])
async def test_a_deadline_that_cannot_be_is_refused_at_once(make_sides: MakeSides, deadline: float) -> None:
    sides = make_sides("tp=1", "tp=1")
    async with ParameterSyncGroup(*sides.groups()) as group:
        with pytest.raises(ConfigError, match="must be positive and finite"):
            await group.sync(deadline=deadline)


async def test_a_replacement_that_is_refused_changes_nothing(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups()) as group:
        await group.sync(4)
        with pytest.raises(NotATransferWorker):
            await group.replace(sides.destinations[0], object())

        assert group.versions() == {0: 4}
        await group.sync(5)

    assert sides.differing(0) == {}


async def test_closing_the_group_ends_its_sync(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    sides.fill(0)
    group = ParameterSyncGroup(*sides.groups(), MANY_TASKS)
    closing: list[object] = []

    async with anyio.create_task_group() as tasks:

        def close(receipt: object) -> None:
            if not closing:
                closing.append(receipt)
                tasks.start_soon(group.aclose)

        with pytest.raises(GroupClosed, match="closed during the sync"):
            await group.sync(0, progress=close)

    assert group.versions() == {0: Torn(None, 0)}


async def test_a_part_of_the_tensors_makes_no_torn_replica_whole(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), MANY_TASKS) as group:
        with anyio.CancelScope() as scope:
            await group.sync(1, progress=lambda receipt: scope.cancel())

        await group.sync(2, only={"model.norm.weight"})
        assert group.versions() == {0: Torn(None, 1)}
        await group.sync(3)
        assert group.versions() == {0: 3}


async def test_a_failure_in_the_progress_callback_is_the_callers_own(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)

    def fail(receipt: object) -> None:
        raise KeyError("bar")

    async with ParameterSyncGroup(*sides.groups(), MANY_TASKS) as group:
        with pytest.raises(SyncError, match="bar"):
            await group.sync(progress=fail)

        await group.sync()

    assert sides.differing(0) == {}
