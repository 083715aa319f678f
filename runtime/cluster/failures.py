"""What went wrong in Ray or on an actor, as the classes of this library."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, TaskCancelledError

from wavecast.runtime import errors
from wavecast.runtime.transfer.messages import Failure

__all__ = ("from_failure", "from_ray")


def from_ray(error: RayError, actor: int) -> errors.SyncError:
    """Return the error that says what became of a call to ``actor``; Ray's own, which tells more, is its cause."""
    found = _named(error, actor)
    found.__cause__ = error
    return found


def _named(error: RayError, actor: int) -> errors.SyncError:
    if isinstance(error, TaskCancelledError):
        return errors.SyncAborted("the call was cancelled", actors=(actor,))

    if isinstance(error, (ActorDiedError, ActorUnavailableError, RayActorError)):
        first_line = str(error).partition("\n")[0]
        return errors.ActorDied(f"the actor died: {first_line}", actors=(actor,))

    return errors.ActorFailed(f"the call failed in Ray: {error}", actors=(actor,))


def from_failure(failure: Failure, actor: int) -> errors.SyncError:
    """Return the error that ``actor`` answered, with its traceback as a note."""
    kind = getattr(errors, failure.kind, errors.ActorFailed)
    if not (isinstance(kind, type) and issubclass(kind, errors.SyncError)):
        kind = errors.ActorFailed

    error = kind(failure.message, actors=(actor,), tensor=failure.tensor)
    if failure.detail:
        error.add_note(f"On actor {actor}:\n{failure.detail}")

    return error
