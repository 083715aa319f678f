"""Every error a caller of the runtime can act on."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = (
    "WavecastError",
    "ConfigError",
    "CheckpointError",
    "SyncError",
    "LayoutError",
    "ActorDied",
    "ActorFailed",
    "SyncTimeout",
    "SyncAborted",
    "ChecksumMismatch",
    "ValidationError",
    "TransportUnavailable",
    "NotATransferWorker",
    "GroupClosed",
    "SyncInProgress",
    "UnsupportedEventLoop",
)


class WavecastError(Exception):
    """Base of the runtime's own errors."""


class ConfigError(WavecastError):
    """Raised for an unknown preset, an impossible mesh or options that contradict each other."""


class CheckpointError(WavecastError):
    """Raised when a checkpoint directory is missing, truncated or not what its header says."""


class SyncError(WavecastError):
    """
    Raised when a sync did not bring every replica to the new version. Base of every failure of a sync.

    :ivar tensor: the logical tensor concerned, or ``""``
    :ivar actors: numbers of the actors concerned: sources first, then destinations
    :ivar task: id of the task concerned, or ``None``, and ``wave`` the wave it is in
    :ivar tasks: ids of all tasks concerned, where there are several: those that a timeout found unfinished
    :ivar phase: ``"queue"``, ``"describe"``, ``"plan"``, ``"connect"``, ``"transfer"``, ``"verify"`` or ``"commit"``,
        or ``""``
    :ivar version: the version that was on its way, or ``None``
    :ivar versions: what each replica had once the sync had ended: by index an integer, ``None`` or ``Torn``
    """

    def __init__(
        self,
        message: str,
        *,
        tensor: str = "",
        actors: tuple[int, ...] = (),
        task: int | None = None,
        phase: str = "",
        version: int | None = None,
    ) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.actors = actors
        self.task = task
        self.tasks: tuple[int, ...] = () if task is None else (task,)
        self.wave: int | None = None
        self.phase = phase
        self.version = version
        self.versions: Mapping[int, object] = {}

    def __str__(self) -> str:
        where = [f"phase {self.phase}"] if self.phase else []
        where += [f"version {self.version}"] if self.version is not None else []
        where += [f"wave {self.wave}"] if self.wave is not None else []
        where += [f"task {self.task}"] if self.task is not None else []
        where += [f"actors {', '.join(map(str, self.actors))}"] if self.actors else []
        return f"{self.args[0]} [{'; '.join(where)}]" if where else str(self.args[0])


class LayoutError(SyncError):
    """Raised when layouts cannot be served: something missing, overlapping, or disagreeing in shape or dtype."""


class ActorDied(SyncError):
    """Raised when an actor's process is gone."""


class ActorFailed(SyncError):
    """Raised when code on an actor raised: the user's hook, an allocation, or the transport."""


class SyncTimeout(SyncError):
    """Raised when the deadline passed, or that of a task; names the tasks and actors that had not answered."""


class SyncAborted(SyncError):
    """Raised on an actor's side for work given up because another member failed."""


class ChecksumMismatch(SyncError):
    """Raised when what a destination holds is not what the source sent."""


class ValidationError(SyncError):
    """Raised when ``validate=True`` found a NaN at a source, or an element that differs at a destination."""


class TransportUnavailable(SyncError):
    """Raised when the transport asked for cannot serve these actors."""


class NotATransferWorker(SyncError):
    """Raised when an actor's class does not mix in ``TransferWorker``."""


class GroupClosed(SyncError):
    """Raised when a closed group is used."""


class SyncInProgress(SyncError):
    """Raised when a group is asked for something that must wait until its running sync has ended."""


class UnsupportedEventLoop(SyncError):
    """Raised when a group is used outside asyncio: Ray's ``ObjectRef`` can be awaited nowhere else."""
