"""An exception on an actor as an answer."""

from __future__ import annotations

import traceback

from wavecast.runtime import errors
from wavecast.runtime.transfer.comm import CommunicatorError, MoveTimeout
from wavecast.runtime.transfer.messages import Failure

__all__ = ("failure_of",)


def failure_of(error: Exception) -> Failure:
    """Return the answer that says ``error``."""
    kind = "ActorFailed"
    if isinstance(error, errors.WavecastError):
        kind = type(error).__name__
    elif isinstance(error, MoveTimeout):
        kind = "SyncTimeout"
    elif isinstance(error, CommunicatorError) and "abort" in str(error):
        kind = "SyncAborted"

    named = isinstance(error, errors.WavecastError | CommunicatorError)
    # The first argument is the message itself; the driver adds who and where.
    message = str(error.args[0]) if named and error.args else f"{type(error).__name__}: {error}"
    return Failure(kind, message, "".join(traceback.format_exception(error)), getattr(error, "tensor", ""))
