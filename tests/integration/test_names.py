"""Actors whose tensors have names of their own, and weights tied on one side only, through real Ray actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import ray

from tests.integration.actors import NamedTensors
from wavecast.runtime import LayoutError, ModelGroup, ParameterSyncGroup, SyncOptions

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TIED = SyncOptions(aliases=[(EMBED, HEAD)])

Start = Callable[[dict[str, list[float]]], object]


@pytest.fixture
def start(cluster: None) -> Iterator[Start]:
    started: list[object] = []

    def start_one(values: dict[str, list[float]]) -> object:
        started.append(ray.remote(NamedTensors).options(num_cpus=0).remote(values))
        return started[-1]

    yield start_one
    for actor in started:
        ray.kill(actor)  # type: ignore[arg-type]


def values_of(*actors: object) -> list[dict[str, list[float]]]:
    return ray.get([actor.values.remote() for actor in actors])  # type: ignore[attr-defined, no-any-return]


async def test_a_tied_trainer_feeds_engines_of_other_names_that_hold_the_head_apart(start: Start) -> None:
    trainer = start({"wte": [1.0, 2.0, 3.0], "norm": [4.0], "rope": [9.0]})
    empty = {"e.embed": [0.0] * 3, "e.head": [0.0] * 3, "e.norm": [0.0], "e.cache": [5.0]}
    engines, fresh = [start(empty), start(empty)], start(empty)
    policy = ModelGroup("policy", [[trainer]], names={"wte": EMBED, "norm": NORM, "rope": None})
    mine = {"e.embed": EMBED, "e.head": HEAD, "e.norm": NORM, "e.cache": None}
    rollout = ModelGroup("rollout", [[engine] for engine in engines], names=mine)

    def wanted(step: int) -> dict[str, list[float]]:
        matrix = [1.0 + step, 2.0 + step, 3.0 + step]
        return {"e.embed": matrix, "e.head": matrix, "e.norm": [4.0 + step], "e.cache": [5.0]}

    async with ParameterSyncGroup(policy, rollout, TIED) as group:
        report = await group.sync(0, validate=True)
        assert report.nbytes == 2 * 16
        assert values_of(*engines) == [wanted(0)] * 2

        # The program the actors have still fits.
        ray.get(trainer.add.remote(1.0))  # type: ignore[attr-defined]
        assert not (await group.sync(1)).planned
        assert values_of(*engines) == [wanted(1)] * 2

        # To pick the head is to pick the matrix it is tied to; a replacement is called as the one before.
        ray.get(trainer.add.remote(1.0))  # type: ignore[attr-defined]
        await group.replace(engines[1], fresh)
        await group.sync(2, only={HEAD})
        assert values_of(engines[0], fresh) == [
            {**wanted(2), "e.norm": [5.0]},
            {**wanted(2), "e.norm": [0.0]},
        ]


async def test_an_untied_trainer_is_not_taken_for_a_tied_engines(start: Start) -> None:
    trainer, engine = start({EMBED: [1.0], HEAD: [2.0]}), start({EMBED: [0.0]})
    async with ParameterSyncGroup(ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine]]), TIED) as group:
        with pytest.raises(LayoutError, match=r"sources hold .* apart") as caught:
            await group.sync()

        assert caught.value.phase == "plan"
        assert group.versions() == {0: None}

    assert values_of(engine) == [{EMBED: [0.0]}]
