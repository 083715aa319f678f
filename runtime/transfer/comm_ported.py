"""A communicator for GPUs that several processes share: one of them owns the port that all bytes go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch

from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, Fence, Move
from wavecast.runtime.transfer.comm_ipc import IpcCommunicator
from wavecast.runtime.transfer.comm_torch import NcclCommunicator, Rendezvous, connecting, host_store, join_store
from wavecast.runtime.transfer.sealed_store import SealedStore

__all__ = ("Legs", "PortedCommunicator", "connect_ported", "far_members", "plan_legs")

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Legs:
    """
    How a move's bytes go where they are to go.

    :ivar first: who takes them out of the sender's buffer, on the sender's own GPU
    :ivar root: owns the port of the sender's GPU, and ``far`` those of the other receivers' GPUs
    :ivar last: by owner in ``far``: who takes them out of the owner's buffer, on its GPU
    """

    first: tuple[int, ...]
    root: int
    far: tuple[int, ...]
    last: dict[int, tuple[int, ...]]


def plan_legs(owners: Sequence[int], sender: int, receivers: Sequence[int]) -> Legs:
    """
    Return the legs of a move.

    :param owners: for each actor the one that owns the port of its GPU
    """
    root = owners[sender]
    far = tuple(dict.fromkeys(owners[receiver] for receiver in receivers if owners[receiver] != root))
    first = [receiver for receiver in receivers if owners[receiver] == root]
    if far and root != sender and root not in first:
        first.append(root)

    last = {owner: tuple(each for each in receivers if owners[each] == owner and each != owner) for owner in far}
    return Legs(tuple(first), root, far, last)


def far_members(
    owners: Sequence[int], groups: Iterable[tuple[int, ...]], edges: Iterable[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]]:
    """
    Return the owners, ascending, and what groups and edges of actors are among them, by place in that order.

    A group of which two owners are left is an edge between them, either way: any of its members may send.
    """
    ports = tuple(sorted(set(owners)))
    place = {owner: number for number, owner in enumerate(ports)}
    found = [(place[owners[sender]], place[owners[receiver]]) for sender, receiver in edges]
    wide: list[tuple[int, ...]] = []
    for group in groups:
        homes = tuple(sorted({place[owners[member]] for member in group}))
        if len(homes) == 2:
            found += [homes, homes[::-1]]
        elif len(homes) > 2:
            wide.append(homes)

    return ports, tuple(dict.fromkeys(wide)), tuple(dict.fromkeys(edge for edge in found if edge[0] != edge[1]))


class PortedCommunicator:
    """
    Moves device memory between GPUs that several actors share, of which a far transport takes one a GPU.

    A move takes up to three legs: near, to the owner of the port of the sender's GPU; far, to the owners of the
    receivers'; near again, to the receivers. Owners that are no end of a move start it as well, with a buffer of their
    own for what goes through. Whoever is near copies out of the other's buffer, so that no process ever writes to
    memory of another's: what is late or given up by one reaches nobody's weights.

    :param owners: for each actor the one that owns the port of its GPU, itself or another on the same
    :param near: of all actors, or of those of one GPU alone
    :param far: of the owners, numbered as :func:`far_members` has them; ``None`` on those that own no port
    """

    def __init__(self, rank: int, *, owners: Sequence[int], near: Communicator, far: Communicator | None) -> None:
        self.rank = rank
        self.device = near.device
        self.exports = near.exports
        self.device_bytes = near.device_bytes + (far.device_bytes if far is not None else 0)
        self._owners = tuple(owners)
        self._place = {owner: number for number, owner in enumerate(sorted(set(owners)))}
        self._near = near
        self._far = far
        #: What peers wait for this actor to do, in the order of its program.
        self._owed: list[_Received] = []

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        legs = plan_legs(self._owners, sender, receivers)
        if self.rank == sender:
            moves = [self._start_far(buffer, legs, deadline)] if legs.far and legs.root == sender else []
            if legs.first:
                moves.append(self._offer(buffer, legs.first, deadline))

            return _Several(moves)

        if self.rank in legs.first:
            move = self._near.start(buffer, sender=sender, receivers=legs.first, deadline=deadline)
            if not legs.far or self.rank != legs.root:
                return self._owe(_Received(self, move))

            # Owners enter far moves in the order of their programs, so what is to leave must be here first. It may
            # never come while anybody waits for this actor's part in what was before.
            self._do_part(deadline)
            move.finish(deadline)
            return self._start_far(buffer, legs, deadline)

        if self.rank in legs.far:
            move = self._start_far(buffer, legs, deadline)
            clients = legs.last[self.rank]
            if not clients:
                return self._owe(_Received(self, move))

            return self._owe(
                _Passing(self, move, partial(self._near.start, buffer, sender=self.rank, receivers=clients))
            )

        owner = self._owners[self.rank]
        if self.rank not in legs.last.get(owner, ()):
            raise CommunicatorError(f"actor {self.rank} takes no part in a move from {sender} to {receivers}")

        move = self._near.start(buffer, sender=owner, receivers=legs.last[owner], deadline=deadline)
        return self._owe(_Received(self, move))

    def fence(self) -> Fence:
        return self._near.fence()

    def abort(self) -> None:
        # The near one first: it only takes note, and fences are its.
        self._near.abort()
        if self._far is not None:
            self._far.abort()

    def close(self) -> None:
        if self._far is not None:
            self._far.close()

        self._near.close()

    def _owe(self, received: _Received) -> Move:
        self._owed.append(received)
        return received

    def done(self, received: _Received) -> None:
        """Note that nobody waits for this actor's part in ``received`` any more."""
        if received in self._owed:
            self._owed.remove(received)

    def _do_part(self, deadline: Deadline) -> None:
        """Take all that peers offer, and pass on what goes on from here."""
        for received in [*self._owed]:
            received.take(deadline)

    def _offer(self, buffer: torch.Tensor, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        # Neighbours take what they get from here in the order of their programs.
        for received in [*self._owed]:
            if isinstance(received, _Passing):
                received.take(deadline)

        return self._near.start(buffer, sender=self.rank, receivers=receivers, deadline=deadline)

    def _start_far(self, buffer: torch.Tensor, legs: Legs, deadline: Deadline) -> Move:
        if self._far is None:
            raise CommunicatorError(f"actor {self.rank} owns no port")

        others = tuple(sorted(self._place[owner] for owner in legs.far))
        return self._far.start(buffer, sender=self._place[legs.root], receivers=others, deadline=deadline)


class _Several:
    def __init__(self, moves: Sequence[Move]) -> None:
        self._moves = tuple(moves)

    def finish(self, deadline: Deadline) -> None:
        for move in self._moves:
            move.finish(deadline)


class _Received:
    """What comes from a neighbour or from far, and ends here."""

    def __init__(self, communicator: PortedCommunicator, move: Move) -> None:
        self._communicator = communicator
        self._move = move

    def take(self, deadline: Deadline) -> None:
        """Do this actor's part in it."""
        self._communicator.done(self)
        self._move.finish(deadline)

    def finish(self, deadline: Deadline) -> None:
        self.take(deadline)


class _Passing(_Received):
    """What comes from far, and is taken on from here by others."""

    def __init__(self, communicator: PortedCommunicator, move: Move, offer: Callable[..., Move]) -> None:
        super().__init__(communicator, move)
        self._offer = offer
        self._offered: Move | None = None

    def take(self, deadline: Deadline) -> None:
        if self._offered is None:
            super().take(deadline)
            self._offered = self._offer(deadline=deadline)

    def finish(self, deadline: Deadline) -> None:
        self.take(deadline)
        if self._offered is not None:
            self._offered.finish(deadline)


def connect_ported(
    rendezvous: Rendezvous, device: torch.device, *, owners: Sequence[int], secret: bytes
) -> PortedCommunicator:
    """
    Meet the other members: NCCL between owners, CUDA IPC on each GPU.

    Neighbours meet at a store that their owner hosts for them on the loopback address: what they say for each bucket
    burdens nobody else.

    :param secret: of the connection
    """
    rank, owner = rendezvous.rank, owners[rendezvous.rank]
    key, deadline = f"{rendezvous.key}/port/{owner}", rendezvous.deadline
    with connecting("a GPU's actors", rendezvous, lambda: False):
        if rank == owner:
            store, port = host_store(_LOOPBACK, seconds=deadline.left)
            rendezvous.store.set(key, str(port))
        else:
            rendezvous.store.wait([key], timedelta(seconds=deadline.left))
            store = join_store(_LOOPBACK, int(rendezvous.store.get(key)), seconds=deadline.left)

    near = IpcCommunicator(replace(rendezvous, store=SealedStore(store, secret=secret)), device)
    far = None
    if rank == owner:
        ports, groups, edges = far_members(owners, rendezvous.groups, rendezvous.edges)
        among = replace(rendezvous, rank=ports.index(rank), size=len(ports), groups=groups, edges=edges)
        far = NcclCommunicator(among, device)

    return PortedCommunicator(rank, owners=owners, near=near, far=far)
