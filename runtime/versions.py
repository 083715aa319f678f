"""Which replica has which version: what the driver knows of it, and what the actors say."""

from __future__ import annotations

from collections.abc import Sequence

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.report import ReplicaVersion, Torn
from wavecast.runtime.transfer.messages import Standing

__all__ = ("Versions", "replica_version")


def replica_version(standings: Sequence[Standing]) -> ReplicaVersion:
    """
    Return the version of a replica whose actors say ``standings``.

    It is whole only if all of them are and say the same. Some on one version and some on another is torn between the
    two: the run that moved them ended in its commit. An actor without any, a fresh one beside others for instance,
    leaves the replica without a version, unless another one is torn.
    """
    versions = [standing.version for standing in standings]
    known = [version for version in versions if version is not None]
    if any(standing.torn for standing in standings):
        writing = [standing.writing for standing in standings if standing.torn and standing.writing is not None]
        before = min(known) if len(known) == len(versions) else None
        return Torn(before, max((*writing, *known), default=0))

    if not known or len(known) < len(versions):
        return None

    return known[0] if len(set(known)) == 1 else Torn(min(known), max(known))


class Versions:
    """
    The versions of a group's replicas, by index.

    The actors keep their versions themselves, so that a new driver finds them: what they say counts for more than what
    was noted here.

    :param replicas: how many there are
    :ivar newest: the newest version a replica was ever seen with, ``None`` before the first: none may go behind it
    :ivar met: whether all actors have said what they hold
    """

    def __init__(self, replicas: int) -> None:
        self._versions: list[ReplicaVersion] = [None] * replicas
        self.newest: int | None = None
        self.met = False

    def __getitem__(self, index: int) -> ReplicaVersion:
        return self._versions[index]

    def __len__(self) -> int:
        return len(self._versions)

    def by_index(self) -> dict[int, ReplicaVersion]:
        """Return a copy: replica index to version."""
        return dict(enumerate(self._versions))

    def next(self, wanted: int | None) -> int:
        """
        Return the version to sync to: the one that is wanted, or one more than the newest.

        :raises ConfigError: when that would go backwards
        """
        if wanted is None:
            return 0 if self.newest is None else self.newest + 1

        if self.newest is not None and wanted < self.newest:
            raise ConfigError(f"version {wanted} is older than {self.newest}, which the replicas have")

        return wanted

    def observe(self, replicas: Sequence[Sequence[Standing]]) -> None:
        """Take over what the actors of every replica say."""
        for index, standings in enumerate(replicas):
            said, noted = replica_version(standings), self._versions[index]
            # Of what tore it the driver that saw it knows more.
            if not (isinstance(said, Torn) and isinstance(noted, Torn)):
                self._versions[index] = said

            for standing in standings:
                if standing.version is not None:
                    self._see(standing.version)

        self.met = True

    def take_on(self, index: int, version: int) -> None:
        """Note that all of a replica is of ``version``."""
        self._versions[index] = version
        self._see(version)

    def set(self, index: int, version: ReplicaVersion) -> None:
        """Take over what another record says of a replica."""
        self._versions[index] = version
        if isinstance(version, int):
            self._see(version)

    def tear(self, index: int, version: int) -> None:
        """Note that ``version`` was being written to a replica, and was not finished."""
        before = self._versions[index]
        self._versions[index] = Torn(before.from_version if isinstance(before, Torn) else before, version)

    # Members.

    def add(self) -> None:
        """Add a replica at the end, of no version."""
        self._versions.append(None)
        self.met = False

    def renew(self, index: int) -> None:
        """Note that an actor of a replica is another one now."""
        self._versions[index] = None
        self.met = False

    def remove(self, index: int) -> None:
        """Forget a replica; those after it move up by one."""
        del self._versions[index]

    def _see(self, version: int) -> None:
        self.newest = version if self.newest is None else max(self.newest, version)
