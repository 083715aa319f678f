"""A group's actors and what is known of them; every change is one plain call, so that no half of one is ever seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from wavecast.runtime.cluster import ActorHandle, RayActors
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.known import Known
from wavecast.runtime.members import Members
from wavecast.runtime.model_group import ModelGroup
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.versions import Versions

__all__ = ("Lineup",)


class Lineup:
    """
    Members, their versions, and what earlier syncs found out about them: always of the same actors.

    A change returns the actors that are in it no more, for the caller to let go.

    :ivar members: both sides
    :ivar versions: of the destination's replicas
    :ivar known: of all that take part, by number
    :raises ConfigError: when an actor is on both sides
    :raises NotATransferWorker: for an actor whose class does not mix in ``TransferWorker``
    """

    def __init__(self, source: ModelGroup, destination: ModelGroup, options: SyncOptions) -> None:
        RayActors((*source.actors, *destination.actors))
        self._options = options
        self.versions = Versions(len(destination.replicas))
        self.members = Members(source, destination)
        self.known = self._know(self.members)

    def replace(self, dead: ActorHandle, fresh: ActorHandle) -> RayActors:
        """
        Put ``fresh`` in the place of ``dead``: what it is in has no version until it has said what it holds.

        :raises ConfigError: when ``dead`` is none of the members
        """
        replicas = self.members.destination.replicas
        concerned = [index for index, replica in enumerate(replicas) if dead in replica]
        gone = self._adopt(self.members.replaced(dead, fresh))
        for index in concerned:
            self.versions.renew(index)

        return gone

    def add(self, actors: Sequence[ActorHandle]) -> int:
        """Add a replica, of no version, and return its index."""
        index = len(self.members.destination.replicas)
        self._adopt(self.members.with_replica(actors))
        self.versions.add()
        return index

    def remove(self, indices: Collection[int], *, around: Sequence[ActorHandle] = ()) -> RayActors:
        """
        Take replicas out, those after them move up, and plan around trainers that are lost.

        :raises ConfigError: for a replica that there is not, and when none is left
        """
        gone = self._adopt(self.members.around(around).without_replicas(indices))
        for index in sorted(indices, reverse=True):
            self.versions.remove(index)

        return gone

    def one_replica(
        self, index: int, source: Literal["peer", "trainer"], version: int
    ) -> tuple[Known, tuple[int, ...]]:
        """
        Return what is known of one replica and of those it can get ``version`` from, and all their numbers here.

        :raises ConfigError: when there is no such replica, or no peer that has the version
        """
        numbers = self._source_of(index, source, version)
        replica = self.known.replicas[index]
        handles = self.known.actors.handles
        start = len(numbers)
        source_names, own_names = self.known.names
        known = Known(
            RayActors([handles[actor] for actor in (*numbers, *replica)]),
            start,
            (range(start, start + len(replica)),),
            Versions(1),
            self._options,
            names=(own_names if source == "peer" else source_names, own_names),
        )
        known.layouts = dict(self.known.layouts)
        known.versions.set(0, self.versions[index])
        return known, (*numbers, *replica)

    def _source_of(self, index: int, source: Literal["peer", "trainer"], version: int) -> range:
        if not 0 <= index < len(self.versions):
            raise ConfigError(f"there is no replica {index}, the group has {len(self.versions)}")

        if source == "trainer":
            return range(self.known.sources)

        for peer, replica in enumerate(self.known.replicas):
            if peer != index and self.versions[peer] == version:
                return replica

        raise ConfigError(f"no other replica has version {version}, there is no peer to copy it from")

    def _know(self, members: Members) -> Known:
        return Known(
            RayActors(members.actors),
            len(members.trainers),
            members.replicas,
            self.versions,
            self._options,
            names=(members.source.names, members.destination.names),
        )

    def _adopt(self, members: Members) -> RayActors:
        """Take on other members: those who stay keep what they hold until it does not fit."""
        known, before = self._know(members), self.known
        known.layouts = before.layouts
        self.members, self.known = members, known
        return RayActors([actor for actor in before.actors.handles if actor not in members.actors])
