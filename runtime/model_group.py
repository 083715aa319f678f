"""The actors of one model, replica by replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wavecast.runtime.cluster import ActorHandle
from wavecast.runtime.errors import ConfigError

__all__ = ("ModelGroup",)


@dataclass(frozen=True, slots=True, eq=False)
class ModelGroup:
    """
    A model's actors.

    :ivar name: for reports and errors
    :ivar replicas: actors that together hold one whole model, once for each replica; any Ray actor handles whose class
        mixes in ``TransferWorker``. A trainer with data parallelism may list all its actors as one replica
    :raises ConfigError: when there is no replica, an empty one, or an actor listed twice
    """

    name: str
    replicas: Sequence[Sequence[ActorHandle]]

    def __post_init__(self) -> None:
        replicas = tuple(tuple(replica) for replica in self.replicas)
        object.__setattr__(self, "replicas", replicas)
        if not replicas or not all(replicas):
            raise ConfigError(f"model group {self.name!r} needs at least one replica, and each at least one actor")

        if len(set(self.actors)) != len(self.actors):
            raise ConfigError(f"model group {self.name!r} lists an actor twice")

    @property
    def actors(self) -> tuple[ActorHandle, ...]:
        """All actors in one flat list, replica after replica: the order in which they are numbered."""
        return tuple(actor for replica in self.replicas for actor in replica)
