"""Every error a caller of the runtime can act on."""

from __future__ import annotations

__all__ = ("WavecastError", "ConfigError", "CheckpointError", "SyncError", "LayoutError")


class WavecastError(Exception):
    """Base of the runtime's own errors."""


class ConfigError(WavecastError):
    """Raised for an unknown preset, an impossible mesh or options that contradict each other."""


class CheckpointError(WavecastError):
    """Raised when a checkpoint directory is missing, truncated or not what its header says."""


class SyncError(WavecastError):
    """Raised when a sync did not bring every replica to the new version. Base of every failure of a sync."""


class LayoutError(SyncError):
    """
    Raised when layouts cannot be served: something missing, overlapping, or disagreeing in shape or dtype.

    :ivar tensor: the logical tensor concerned
    :ivar actors: the actors concerned, by number
    """

    def __init__(self, message: str, *, tensor: str = "", actors: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.actors = actors
