"""The actors of both sides, and how they change: values, so that a change that is refused changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from wavecast.runtime.cluster import ActorHandle
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.model_group import ModelGroup

__all__ = ("Members",)


@dataclass(frozen=True, slots=True)
class Members:
    """
    Who takes part.

    :ivar lost: trainers that are planned around until they are replaced; they have no number
    :raises ConfigError: when an actor is on both sides
    """

    source: ModelGroup
    destination: ModelGroup
    lost: tuple[ActorHandle, ...] = ()

    def __post_init__(self) -> None:
        both = [actor for actor in self.source.actors if actor in self.destination.actors]
        if both:
            raise ConfigError(
                f"actor {both[0]!r} is in {self.source.name!r} and in {self.destination.name!r}; "
                "a trainer and an engine that share a GPU are two actors"
            )

    @property
    def trainers(self) -> tuple[ActorHandle, ...]:
        """The source's actors that take part, in order of their numbers."""
        return tuple(actor for actor in self.source.actors if actor not in self.lost)

    @property
    def actors(self) -> tuple[ActorHandle, ...]:
        """All that take part, in order of their numbers."""
        return (*self.trainers, *self.destination.actors)

    @property
    def replicas(self) -> tuple[range, ...]:
        """The numbers of the actors of each of the destination's replicas."""
        start = len(self.trainers)
        ranges: list[range] = []
        for replica in self.destination.replicas:
            ranges.append(range(start, start + len(replica)))
            start += len(replica)

        return tuple(ranges)

    def replaced(self, dead: ActorHandle, fresh: ActorHandle) -> Members:
        """
        Return the members with ``fresh`` in the place of ``dead``.

        :raises ConfigError: when ``dead`` is none of them
        """
        if dead not in (*self.source.actors, *self.destination.actors):
            raise ConfigError(f"actor {dead!r} is not in this group")

        source, destination = (
            replace(
                group,
                replicas=[[fresh if actor == dead else actor for actor in replica] for replica in group.replicas],
            )
            for group in (self.source, self.destination)
        )
        return Members(source, destination, tuple(actor for actor in self.lost if actor != dead))

    def with_replica(self, actors: Sequence[ActorHandle]) -> Members:
        """Return the members with another replica at the end."""
        destination = replace(self.destination, replicas=(*self.destination.replicas, actors))
        return replace(self, destination=destination)

    def without_replicas(self, indices: Collection[int]) -> Members:
        """
        Return the members without some replicas; those after them move up.

        :raises ConfigError: for one that there is not, and when none is left
        """
        replicas = self.destination.replicas
        for index in indices:
            if not 0 <= index < len(replicas):
                raise ConfigError(f"there is no replica {index}, the group has {len(replicas)}")

        kept = [replica for index, replica in enumerate(replicas) if index not in indices]
        return replace(self, destination=replace(self.destination, replicas=kept))

    def around(self, trainers: Sequence[ActorHandle]) -> Members:
        """Return the members with ``trainers`` out of the plan."""
        return replace(self, lost=(*self.lost, *trainers))
