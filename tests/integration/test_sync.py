"""Whole syncs through real Ray actors and gloo, every element compared bit for bit."""

from __future__ import annotations

from typing import Literal

import pytest
import ray

from tests.integration.actors import AsyncActor, OneTensor, PoolActor, ThreadedActor
from tests.integration.conftest import MakeSides
from wavecast.runtime import ModelGroup, ParameterSyncGroup, SyncOptions

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("src", "dst", "replicas"),
    [
        pytest.param("tp=3", "tp=2", 1, id="tp3-to-tp2"),
        pytest.param("tp=2,pp=2", "tp=4", 3, id="pp2-tp2-to-tp4-x3"),
        pytest.param("tp=2,dp=2", "tp=1", 2, id="dp2-tp2-to-tp1-x2"),
        pytest.param("tp=1", "tp=6", 1, id="fewer-kv-heads-than-tp"),
        pytest.param("tp=4", "tp=3,pp=2", 1, id="tp4-to-tp3-pp2"),
        pytest.param("pp=3", "pp=2", 2, id="pp3-to-pp2-x2"),
        pytest.param("pp=4", "tp=2", 2, id="four-stages-to-tp2-x2-again-and-again"),
    ],
)
async def test_every_element_arrives_in_every_layout(make_sides: MakeSides, src: str, dst: str, replicas: int) -> None:
    sides = make_sides(src, dst, replicas=replicas, layers=4)
    async with ParameterSyncGroup(*sides.groups()) as group:
        for step in range(2):
            sides.fill(step)
            report = await group.sync(step)
            assert sides.differing(step) == {}
            assert report.version == step
            assert report.planned is (step == 0)
            assert report.connected is (step == 0)
            assert report.transport == "gloo"
            assert report.waves >= report.bound_waves
            assert group.versions() == dict.fromkeys(range(replicas), step)


@pytest.mark.parametrize("ports", ["half", "full"])
@pytest.mark.parametrize("method", ["chain", "tree"])
async def test_replicas_pass_on_what_they_got(
    make_sides: MakeSides, method: Literal["chain", "tree"], ports: Literal["half", "full"]
) -> None:
    """Three replicas, many chunks: engines are senders too, and every element still arrives bit for bit."""
    sides = make_sides("tp=2", "tp=1", replicas=3)
    options = SyncOptions(fan_out=method, ports=ports, chunk_bytes=1 << 18, budget_bytes=1 << 18)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        for step in range(2):
            sides.fill(step)
            report = await group.sync(step, validate=step == 0)
            assert sides.differing(step) == {}
            assert report.planned is (step == 0)

        assert group.versions() == {0: 1, 1: 1, 2: 1}
        # A hop has two members who answer, a broadcast would have four.
        answers = [receipt.value for wave in report.run.waves for receipt in wave.receipts]
        assert {len(answer) for answer in answers if isinstance(answer, list)} == {2}
        assert len(answers) == report.tasks
        assert report.tasks % 3 == 0


@pytest.mark.parametrize(
    ("model", "src", "dst"),
    [
        ("tiny-qwen3-moe", "tp=2,dp=2,ep=4", "tp=2"),
        ("tiny-mixtral", "tp=2,dp=2,ep=2,etp=2", "tp=3,etp=3"),
        ("tiny-deepseek-v3", "tp=2,dp=2,ep=4", "dp=3,ep=3"),
    ],
)
async def test_experts_arrive_from_expert_parallel_trainers(
    make_sides: MakeSides, model: str, src: str, dst: str
) -> None:
    sides = make_sides(src, dst, model=model, layers=2)
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        await group.sync()

    assert sides.differing(0) == {}


@pytest.mark.parametrize("kind", [ThreadedActor, AsyncActor])
async def test_threaded_and_asyncio_actors_serve_alike(make_sides: MakeSides, kind: type) -> None:
    sides = make_sides("tp=2", "tp=3", kind=kind)
    options = SyncOptions(chunk_bytes=1 << 18, in_flight=4)
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        for step in range(2):
            sides.fill(step)
            await group.sync()
            assert sides.differing(step) == {}


async def test_a_small_budget_is_kept_and_everything_still_arrives(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=3")
    options = SyncOptions(budget_bytes=100_000, chunk_bytes=1 << 20, lookahead=0, in_flight=1, strategy="first_fit")
    async with ParameterSyncGroup(*sides.groups(), options) as group:
        sides.fill(0)
        report = await group.sync(validate=True)

    assert sides.differing(0) == {}
    assert 0 < report.staging_bytes <= 100_000


async def test_float32_trainers_are_cast_on_the_sender(pool: object, make_sides: MakeSides) -> None:
    """Rounding is torch's own: 1 + 2**-8 is half way between two bfloat16 values and goes to the even one."""
    values = [0.1, 1.0 + 2**-8, -3.5, 65504.0]
    actor_class = ray.remote(OneTensor).options(num_cpus=0)
    trainer = actor_class.remote(values, "float32", 0, 4)
    engine = actor_class.remote([0.0, 0.0, 0.0, 0.0], "bfloat16", 0, 4)
    async with ParameterSyncGroup(ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine]])) as group:
        report = await group.sync()

    assert ray.get(engine.values.remote()) == [0.10009765625, 1.0, -3.5, 65536.0]
    assert report.nbytes == 8
    ray.kill(trainer)
    ray.kill(engine)


async def test_views_in_column_order_are_packed_and_unpacked_right(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=3")
    ray.get([actor.transpose_storage.remote() for actor in (*sides.sources, *sides.destinations)])  # type: ignore[attr-defined]
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        await group.sync()

    assert sides.differing(0) == {}


async def test_shards_are_read_afresh_and_the_plan_is_kept_when_memory_moves(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        await group.sync()
        ray.get([actor.move_storage.remote() for actor in (*sides.sources, *sides.destinations)])  # type: ignore[attr-defined]
        sides.fill(1)
        report = await group.sync()

    assert sides.differing(1) == {}
    assert not report.planned
    assert ray.get([actor.calls.remote() for actor in sides.sources]) == [2, 2]  # type: ignore[attr-defined]


async def test_a_changed_layout_is_planned_anew(make_sides: MakeSides) -> None:
    wide = make_sides("tp=2", "tp=1", layers=2)
    narrow = make_sides("tp=2", "tp=1", layers=1)
    async with ParameterSyncGroup(*wide.groups()) as group:
        wide.fill(0)
        first = await group.sync()
        # The destination now holds one layer only.
        (engine,), (model,) = wide.destinations, narrow.destinations
        layout = ray.get(model.held_layout.remote())  # type: ignore[attr-defined]
        ray.get(engine.hold.remote(layout, ray.get(engine.own_weights.remote())))  # type: ignore[attr-defined]
        second = await group.sync()

    assert second.planned
    assert second.nbytes < first.nbytes
    assert wide.differing(0) == {}


async def test_only_the_tensors_picked_are_written(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        report = await group.sync(only={"model.norm.weight"})
        assert report.partial
        assert report.tensors == 1
        assert "model.norm.weight" not in sides.differing(0)
        assert len(sides.differing(0)) > 10
        everything = await group.sync(only=lambda name: True)
        assert everything.tensors > 10
        assert sides.differing(0) == {}


async def test_only_what_is_trainable_is_sent_and_freezing_more_is_noticed(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=3")
    frozen = ["model.embed_tokens.weight", "model.norm.weight"]
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        everything = await group.sync(only="trainable")
        assert sides.differing(0) == {}
        sides.fill(1)
        for count in (1, 2):
            # One of two trainers is enough: no tensor may be half frozen and sent.
            ray.get(sides.sources[0].freeze.remote(*frozen[:count]))  # type: ignore[attr-defined]
            report = await group.sync(only="trainable")
            assert report.partial
            assert report.planned
            assert report.tensors == everything.tensors - count

        # The norm went along the first time, when it was not frozen yet.
        assert sides.differing(1).keys() == {"model.embed_tokens.weight"}
        assert sides.differing(0).keys() - sides.differing(1).keys()
        await group.sync()
        assert sides.differing(1) == {}


async def test_a_dry_run_sets_everything_up_and_moves_nothing(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=1")
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        report = await group.sync(dry_run=True)
        assert report.dry_run
        assert report.connected
        assert report.planned
        assert len(sides.differing(0)) > 10
        assert group.versions() == {0: None}
        warm = await group.sync()
        assert not warm.connected
        assert not warm.planned
        assert warm.version == 0

    assert sides.differing(0) == {}


async def test_sync_if_due_follows_the_frequency(make_sides: MakeSides) -> None:
    sides = make_sides("tp=1", "tp=1")
    sides.fill(0)
    async with ParameterSyncGroup(*sides.groups(), SyncOptions(frequency=3)) as group:
        due = [step for step in range(1, 7) if await group.sync_if_due(step) is not None]
        assert due == [3, 6]
        assert group.versions() == {0: 6}

    async with ParameterSyncGroup(*sides.groups(), SyncOptions(frequency=0)) as never:
        assert await never.sync_if_due(0) is None


async def test_progress_hears_of_every_task(make_sides: MakeSides) -> None:
    sides = make_sides("tp=2", "tp=3")
    sides.fill(0)
    seen: list[int] = []
    async with ParameterSyncGroup(*sides.groups()) as group:
        report = await group.sync(progress=lambda receipt: seen.append(receipt.task))

    assert sorted(seen) == list(range(report.tasks))


async def test_a_replaced_engine_and_an_added_replica_get_their_weights_at_the_next_sync(
    make_sides: MakeSides, pool: object
) -> None:
    sides = make_sides("tp=2", "tp=1", replicas=2)
    spare = make_sides("tp=1", "tp=1", replicas=2)
    dead, fresh = sides.replicas[1][0], spare.replicas[0][0]
    late = spare.replicas[1]
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(0)
        await group.sync()
        await group.replace(dead, fresh)
        assert group.versions() == {0: 0, 1: None}
        assert await group.add_replica(late) == 2
        sides.fill(1)
        await group.sync()
        assert group.versions() == {0: 1, 1: 1, 2: 1}
        await group.remove_replica(0)
        sides.fill(2)
        await group.sync()
        assert group.versions() == {0: 2, 1: 2}

    sides.replicas = [[fresh], late]
    assert sides.differing(2) == {}


async def test_two_groups_take_turns_with_the_same_trainers(make_sides: MakeSides) -> None:
    """Each group keeps its own connection and program on an actor that both use."""
    sides = make_sides("tp=2", "tp=1")
    reference = make_sides("tp=1", "tp=3").replicas
    policy = ModelGroup("policy", [sides.sources])
    rollout, frozen = ModelGroup("rollout", sides.replicas), ModelGroup("reference", reference)
    async with ParameterSyncGroup(policy, rollout) as first, ParameterSyncGroup(policy, frozen) as second:
        for step in range(2):
            sides.fill(step)
            for group in (first, second):
                report = await group.sync(step)
                assert report.connected is (step == 0)

            assert sides.differing(step) == {}
            both = sides.replicas
            sides.replicas = reference
            assert sides.differing(step) == {}
            sides.replicas = both


async def test_a_new_group_on_the_same_actors_carries_on(make_sides: MakeSides) -> None:
    """As after a restart of the driver: the old group is not closed, just gone."""
    sides = make_sides("tp=2", "tp=1")
    sides.fill(0)
    lost = ParameterSyncGroup(*sides.groups())
    await lost.sync(3)
    async with ParameterSyncGroup(*sides.groups()) as group:
        sides.fill(1)
        report = await group.sync()
        assert report.connected

    assert sides.differing(1) == {}
    await lost.aclose()


def test_the_default_pool_actor_is_a_plain_one() -> None:
    assert not any(name.startswith("async") for name in vars(PoolActor))
