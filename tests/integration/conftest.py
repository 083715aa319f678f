"""Real Ray actors, started once and shared: a start costs seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import ray

from tests.integration.actors import PoolActor, ThreadedActor, weights
from wavecast.runtime import Layout, MeshSpec, ModelGroup
from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.presets import preset

POOL_SIZE = 16


def start_ray() -> None:
    """Start a cluster on this machine whose actors find the tests' modules."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}},
    )


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    if ray.is_initialized():
        # Another folder's tests have started it, and will end it.
        yield
        return

    start_ray()
    yield
    ray.shutdown()


class Pool:
    """Hands out idle actors, and starts others in the place of those that a test killed."""

    def __init__(self) -> None:
        self._idle: dict[type, list[object]] = {}
        self._lent: list[tuple[type, object]] = []
        self._killed: set[object] = set()

    def take(self, held: Sequence[Layout], kind: type = PoolActor) -> list[object]:
        """Return one actor a layout, of class ``kind``, holding it, with weights of no step."""
        idle = self._idle.setdefault(kind, [])
        while len(idle) < len(held):
            options = {"max_concurrency": 4} if kind is ThreadedActor else {}
            idle.append(ray.remote(kind).options(num_cpus=0, **options).remote())

        actors, self._idle[kind] = idle[: len(held)], idle[len(held) :]
        self._lent += [(kind, actor) for actor in actors]
        ray.get([actor.start_over.remote(layout, weights()) for actor, layout in zip(actors, held, strict=True)])  # type: ignore[attr-defined]
        return actors

    def kill(self, actor: object) -> None:
        """End the actor's process at once."""
        self._killed.add(actor)
        ray.kill(actor)  # type: ignore[arg-type]

    def discard(self, actor: object) -> None:
        """Do not lend this actor again."""
        self._killed.add(actor)

    def take_back(self) -> None:
        for kind, actor in self._lent:
            if actor not in self._killed:
                self._idle[kind].append(actor)

        self._lent = []


@pytest.fixture(scope="session")
def all_actors(cluster: None) -> Pool:
    return Pool()


@pytest.fixture
def pool(all_actors: Pool) -> Iterator[Pool]:
    yield all_actors
    all_actors.take_back()


class Sides:
    """Both sides of a sync, on real actors."""

    def __init__(self, sources: list[object], replicas: list[list[object]]) -> None:
        self.sources = sources
        self.replicas = replicas

    @property
    def destinations(self) -> list[object]:
        return [actor for replica in self.replicas for actor in replica]

    def groups(self) -> tuple[ModelGroup, ModelGroup]:
        return ModelGroup("policy", [self.sources]), ModelGroup("rollout", self.replicas)

    def fill(self, step: int) -> None:
        """Give the sources the weights of ``step``."""
        ray.get([actor.fill.remote(step) for actor in self.sources])  # type: ignore[attr-defined]

    def differing(self, step: int) -> dict[str, int]:
        """Compare every element of every destination with the weights of ``step``."""
        found: dict[str, int] = {}
        for counts in ray.get([actor.differing.remote(step) for actor in self.destinations]):  # type: ignore[attr-defined]
            for name, count in counts.items():
                found[name] = found.get(name, 0) + count

        return found


MakeSides = Callable[..., Sides]


def sides_of(
    pool: Pool,
    src: str = "tp=2",
    dst: str = "tp=1",
    *,
    replicas: int = 1,
    layers: int = 2,
    model: str = "tiny-qwen2",
    src_dtype: str = "bfloat16",
    dst_dtype: str = "bfloat16",
    kind: type = PoolActor,
) -> Sides:
    config = preset(model).with_layers(layers)
    sources = layouts(config, MeshSpec.parse(src), dtype=src_dtype)
    replica = layouts(config, MeshSpec.parse(dst), dtype=dst_dtype)
    return Sides(pool.take(sources, kind), [pool.take(replica, kind) for _ in range(replicas)])


@pytest.fixture
def make_sides(pool: Pool) -> MakeSides:
    return partial(sides_of, pool)
