"""The actors of one model, replica by replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wavecast.runtime.cluster import ActorHandle
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.views import NameMap

__all__ = ("ModelGroup",)


@dataclass(frozen=True, slots=True, eq=False)
class ModelGroup:
    """
    A model's actors.

    :ivar name: for reports and errors
    :ivar replicas: actors that together hold one whole model, once for each replica; any Ray actor handles whose class
        mixes in ``TransferWorker``. A trainer with data parallelism may list all its actors as one replica
    :ivar names: from the names that these actors' shards have to those of the logical tensors: a mapping (names that it
        lacks stay as they are) or a function. ``None`` as a value leaves the tensor out of every sync; several names
        let one tensor of a source stand for each of them
    :raises ConfigError: when there is no replica, an empty one, or an actor listed twice
    """

    name: str
    replicas: Sequence[Sequence[ActorHandle]]
    names: NameMap | None = field(default=None, kw_only=True)

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
