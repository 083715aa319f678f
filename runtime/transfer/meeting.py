"""Where an actor meets the other members of a connection, and what they build there."""

from __future__ import annotations

import torch
from torch.distributed import Store

from wavecast.runtime.transfer.comm import Communicator, Deadline
from wavecast.runtime.transfer.comm_ipc import IpcCommunicator
from wavecast.runtime.transfer.comm_ported import connect_ported
from wavecast.runtime.transfer.comm_torch import GlooCommunicator, NcclCommunicator, Rendezvous, host_store, join_store
from wavecast.runtime.transfer.messages import Connect, HostStore
from wavecast.runtime.transfer.sealed_store import SealedStore

__all__ = ("Meeting",)


class Meeting:
    """The stores that an actor hosts for connections to come, and its way into those."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}

    def host(self, request: HostStore, address: str) -> int:
        """Open the rendezvous of a connection on ``address`` and return its port."""
        store, port = host_store(address, seconds=request.seconds)
        self._stores = {request.connection: store}
        return port

    def join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        """
        Meet the other members at the store, and return this actor's end of what they build.

        :param address: of this node, as others reach it
        :param device: of the actor's shards
        :raises CommunicatorError: when it could not be built, or not by the deadline
        """
        store = self._stores.pop(request.connection, None)
        if store is None:
            store = join_store(request.host, request.port, seconds=deadline.left)

        rendezvous = Rendezvous(
            SealedStore(store, secret=request.secret),
            key=request.connection,
            host=address,
            rank=request.rank,
            size=request.size,
            groups=request.groups,
            edges=request.edges,
            deadline=deadline,
        )
        match request.transport:
            case "nccl" if request.owners:
                return connect_ported(rendezvous, device, owners=request.owners, secret=request.secret)
            case "nccl":
                return NcclCommunicator(rendezvous, device)
            case "ipc":
                return IpcCommunicator(rendezvous, device)
            case _:
                return GlooCommunicator(rendezvous)

    def close(self) -> None:
        """Close what nobody has come to."""
        self._stores.clear()
