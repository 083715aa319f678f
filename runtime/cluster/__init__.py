"""The seam to whatever hosts the actors: Ray, and here alone."""

from __future__ import annotations

from wavecast.runtime.cluster.actors import ActorHandle, Answer, RayActors
from wavecast.runtime.cluster.host import RayHost
from wavecast.runtime.cluster.joining import (
    call_all,
    cluster,
    cluster_gpus,
    end_actors,
    require_event_loop,
    start_actor,
)

__all__ = (
    "ActorHandle",
    "Answer",
    "RayActors",
    "RayHost",
    "call_all",
    "cluster",
    "cluster_gpus",
    "end_actors",
    "require_event_loop",
    "start_actor",
)
