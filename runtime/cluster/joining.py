"""Ray clusters, and actors that are started here: the demo's, not the user's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import cast

import ray
from ray.exceptions import RayError

from wavecast.runtime import errors
from wavecast.runtime.cluster.actors import ActorHandle
from wavecast.runtime.cluster.failures import from_ray

__all__ = ("call_all", "cluster", "cluster_gpus", "end_actors", "require_event_loop", "start_actor")

_PROBE_SECONDS = 5.0


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """
    Join the Ray cluster at ``address``, or start one on this machine; leave or stop it when the block ends.

    :raises ConfigError: when there is no cluster at ``address``
    """
    if address is not None:
        _require_listener(address)

    # Ray hides the GPUs from an actor that asks for none of them, and warns that it may one day not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise errors.ConfigError(f"no Ray cluster at {address!r}: {error}") from error

    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Make sure that somebody listens at a ``host:port``: Ray itself would go on trying for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()
    except OSError as error:
        raise errors.ConfigError(f"no Ray cluster at {address!r}: {error}") from error


def cluster_gpus() -> int:
    """Return how many GPUs the cluster has."""
    return int(ray.cluster_resources().get("GPU", 0))


def start_actor(actor_class: type, *args: object, gpus: float = 0.0) -> ActorHandle:
    """Start an actor of ``actor_class`` that takes no CPU and ``gpus`` of a GPU from Ray's count."""
    return ray.remote(actor_class).options(num_cpus=0, num_gpus=gpus).remote(*args)


async def call_all(actors: Sequence[ActorHandle], method: str, *args: object) -> list[object]:
    """
    Call a method of the actors' own on all of them at once, and return what they return.

    :raises ActorDied: when an actor is gone
    :raises ActorFailed: when the method raised; both name the actor by its place in the list
    """
    refs = [getattr(actor, method).remote(*args) for actor in actors]
    results: list[object] = []
    for index, ref in enumerate(refs):
        try:
            results.append(await ref)
        except RayError as error:
            raise from_ray(error, index) from error

    return results


def end_actors(actors: Sequence[ActorHandle]) -> None:
    """Kill the actors."""
    for actor in actors:
        ray.kill(cast("ray.actor.ActorHandle[object]", actor))


def require_event_loop() -> None:
    """
    Check that the caller runs on asyncio.

    :raises UnsupportedEventLoop: on any other loop
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise errors.UnsupportedEventLoop(
            "a ParameterSyncGroup needs asyncio: Ray's ObjectRef cannot be awaited on another event loop"
        ) from None
