"""What runs an actor, as far as the agent must know of it."""

from __future__ import annotations

from typing import Protocol

from wavecast.runtime.transfer.messages import StepDone

__all__ = ("LOOK_SECONDS", "Host")

#: How often a blocked call looks whether the driver has given up on it.
LOOK_SECONDS = 0.01


class Host(Protocol):
    """What the agent must know of whatever runs its actor. Sent along with each request."""

    def cancelled(self) -> bool:
        """Tell whether the driver has cancelled the call that is running. Called on the calling thread."""
        ...

    def tell(self, reply: StepDone) -> None:
        """Tell the driver ahead of the answer, where it can be told. Called on a thread of the session's."""
        ...

    def node(self) -> str:
        """Return the node's id."""
        ...

    def address(self) -> str:
        """Return the node's own address, as other nodes reach it."""
        ...
