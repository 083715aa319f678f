"""The Ray worker that an actor runs in."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import ray.util

from wavecast.runtime.transfer.messages import Brief, StepDone
from wavecast.runtime.transfer.slip import Slip

__all__ = ("RayHost",)


@dataclass(frozen=True, slots=True)
class RayHost(Brief):
    """
    What an agent asks of the Ray worker it runs in. Travels with each request.

    :ivar slip: for what the driver is to know ahead of the answer
    """

    slip: Slip | None = None

    def tell(self, reply: StepDone) -> None:
        if self.slip is not None:
            self.slip.send(reply)

    def cancelled(self) -> bool:
        return ray.get_runtime_context().is_canceled()

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())
