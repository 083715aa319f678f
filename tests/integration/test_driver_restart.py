"""A driver's process that ends in the middle of a sync, and another that goes on with the same actors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest
import ray

from tests.integration.actors import NamedTensors
from tests.integration.conftest import cluster
from tests.integration.first_driver import ENGINES, EXIT_CODE, OPTIONS, TRAINER
from wavecast.runtime import ModelGroup, ParameterSyncGroup, Torn

__all__ = ("cluster",)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

NAMES = ("a", "b", "c")


def tensors(value: float) -> dict[str, list[float]]:
    return {name: [value + number] * 64 for number, name in enumerate(NAMES)}


@pytest.fixture
def actors(cluster: None) -> Iterator[dict[str, object]]:
    made = {
        name: ray.remote(NamedTensors).options(name=name, num_cpus=0).remote(tensors(value))
        for name, value in ((TRAINER, 1.0), *((engine, 0.0) for engine in ENGINES))
    }
    yield made
    for actor in made.values():
        ray.kill(actor)


def drive_and_vanish() -> int:
    context = ray.get_runtime_context()
    command = [sys.executable, "-m", "tests.integration.first_driver", context.gcs_address, context.namespace]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=90, check=False)
    return done.returncode


async def test_a_driver_that_is_started_again_finds_what_the_lost_one_left_and_goes_on(
    actors: dict[str, object],
) -> None:
    assert await anyio.to_thread.run_sync(drive_and_vanish) == EXIT_CODE
    trainer, engines = actors[TRAINER], [actors[name] for name in ENGINES]
    group = ParameterSyncGroup(
        ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine] for engine in engines]), OPTIONS
    )
    async with group:
        # The lost driver had brought both to 5 and was writing 6.
        found = await group.refresh()
        assert set(found.values()) <= {5, Torn(5, 6)}
        assert Torn(5, 6) in found.values()
        assert (await group.sync()).version == 6
        assert group.versions() == {0: 6, 1: 6}

    for engine in engines:
        assert ray.get(engine.values.remote()) == tensors(2.0)  # type: ignore[attr-defined]
