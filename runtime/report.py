"""What a sync did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wavecast.scheduler import RunReport

__all__ = ("PhaseSeconds", "HookSeconds", "SyncReport", "Torn", "ReplicaVersion")


@dataclass(frozen=True, slots=True)
class Torn:
    """
    A replica whose weights are not all of one version: some were written, the sync failed, it must not be used.

    :ivar from_version: the last version it had as a whole; ``None`` if it never had one
    :ivar to_version: the version that was being written
    """

    from_version: int | None
    to_version: int


#: A replica's version: an integer once it is whole, ``None`` before its first sync, or torn.
ReplicaVersion = int | Torn | None


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """
    Where a sync's time went.

    :ivar describe: actors read their shards and said what they hold
    :ivar plan: routes, tasks, waves and programs; next to nothing when cached
    :ivar connect: rendezvous, communicators, programs sent; next to nothing when cached
    :ivar transfer: the waves
    :ivar verify: checksums compared, and the whole check when asked for
    :ivar commit: every replica took on the version
    :ivar total: from entering the call to leaving it
    """

    describe: float
    plan: float
    connect: float
    transfer: float
    verify: float
    commit: float
    total: float


@dataclass(frozen=True, slots=True)
class HookSeconds:
    """
    What the user's own hooks took, on the slowest actor each; part of the phases describe and commit.

    :ivar before_sync: 0 where no actor has the hook, as of the others
    """

    before_sync: float = 0.0
    before_commit: float = 0.0
    after_commit: float = 0.0


@dataclass(frozen=True, slots=True)
class SyncReport:
    """
    One sync.

    :ivar version: what every replica has now
    :ivar dry_run: everything was set up and nothing was moved
    :ivar nbytes: bytes delivered: each receiver's counted
    :ivar tensors: logical tensors that were synced
    :ivar partial: some of the destinations' tensors were left as they were: by ``only=``, or by ``allow_missing``
    :ivar left_out: their logical names, in the destinations' order; those that a name map drops are not counted
    :ivar routes: boxes that travelled
    :ivar tasks: tasks they were made into
    :ivar waves: waves, and ``bound_waves`` the fewest possible that is known
    :ivar makespan_bytes: sum over the waves of the largest task, and ``bound_bytes`` the busiest port's bytes
    :ivar strategy: the colouring really used
    :ivar transport: the ways that tasks took: ``"ipc"``, ``"nccl"``, ``"gloo"``, or two of them joined by ``+``
    :ivar pulled_nbytes: bytes that receivers pulled out of their senders' memory, of ``nbytes``
    :ivar transport_reasons: why faster ways were not taken
    :ivar device: ``"cuda"`` or ``"cpu"``: where the destinations' shards are
    :ivar staging_bytes: the most extra memory an actor holds for staging
    :ivar communicator_bytes: the most device memory an actor's communicators took, where it can be measured
    :ivar host_seconds: the most of the processor's time that an actor's threads spent on the sync, waits left out
    :ivar connected: whether communicators were made in this sync
    :ivar planned: whether a plan was made in this sync
    :ivar seconds: by phase
    :ivar reshard_seconds: what finding the routes took when this plan was made, and ``schedule_seconds`` the rest of it
    :ivar run: receipts by wave
    :ivar digest: of plan and schedule
    :ivar staging: ``"in_place"`` or ``"shadow"``
    :ivar shadow_bytes: the most memory an actor holds for a second copy of its weights
    :ivar pause_seconds: for how long weights must not be read: in shadow what the slowest actor took to copy the second
        copy over the first; in place from the first byte's leave until all had committed. Hooks are not counted
    :ivar hooks: seconds of the user's own
    :ivar attempts: runs that the call took: one, and one more for each failure that the options forgive
    :ivar dropped: replicas that were lost on the way and have left the group, by the index they had before the call
    :ivar lost_trainers: how many of the source's actors are planned around
    """

    version: int
    dry_run: bool
    nbytes: int
    tensors: int
    partial: bool
    routes: int
    tasks: int
    waves: int
    bound_waves: int
    makespan_bytes: int
    bound_bytes: int
    gap: float
    strategy: str
    ports: Literal["half", "full"] | str
    transport: str
    pulled_nbytes: int
    transport_reasons: tuple[str, ...]
    device: str
    staging_bytes: int
    communicator_bytes: int
    host_seconds: float
    connected: bool
    planned: bool
    seconds: PhaseSeconds
    reshard_seconds: float
    schedule_seconds: float
    run: RunReport
    digest: str
    staging: str = "in_place"
    shadow_bytes: int = 0
    pause_seconds: float = 0.0
    hooks: HookSeconds = HookSeconds()
    attempts: int = 1
    dropped: tuple[int, ...] = ()
    lost_trainers: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes delivered by the second of the transfer phase, in units of 1e9."""
        return self.nbytes / self.seconds.transfer / 1e9 if self.seconds.transfer > 0 else 0.0
