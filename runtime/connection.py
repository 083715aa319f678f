"""The driver's view of the actors' communicators and programs: made once, kept while they fit."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from wavecast.runtime.cluster import RayActors
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.transfer.messages import (
    Attach,
    Connect,
    Connected,
    Disconnect,
    Done,
    Export,
    Exported,
    HostStore,
    Load,
    RunId,
    StoreAddress,
)
from wavecast.runtime.transfer.sealed_store import SECRET_BYTES

__all__ = ("Connection",)


class Connection:
    """
    What the actors have been given so far.

    :ivar transport: of the communicators, or ``""`` while there are none
    :ivar communicator_bytes: the most device memory they took on an actor
    """

    def __init__(self, actors: RayActors) -> None:
        self._actors = actors
        self._groups: frozenset[tuple[int, ...]] = frozenset()
        self._edges: frozenset[tuple[int, int]] = frozenset()
        self._owners: tuple[int, ...] = ()
        self._digest = ""
        self._addresses: dict[int, int] = {}
        self._attached: frozenset[tuple[int, int]] = frozenset()
        self.transport = ""
        self.communicator_bytes = 0

    def forget(self) -> None:
        """Take everything for lost: the next :meth:`ensure` makes it anew."""
        self._groups = frozenset()
        self._edges = frozenset()
        self._digest = ""
        self._attached = frozenset()
        self.transport = ""

    def serves(self, preparation: Preparation) -> bool:
        """Tell whether actors have their programs of ``preparation``, communicators and what they read of others."""
        return (
            self._digest == preparation.digest
            and self._attached.issuperset(preparation.readings)
            and self._carries(preparation)
        )

    def knows(self, preparation: Preparation, addresses: Sequence[int]) -> bool:
        """Tell whether what is pulled lies where the receivers believe it to be."""
        return all(self._addresses.get(sender) == addresses[sender] for sender, _ in preparation.pulls)

    async def ensure(
        self, preparation: Preparation, addresses: Sequence[int], *, run: RunId, seconds: Callable[[], float]
    ) -> bool:
        """
        Make what is missing for ``preparation``, on all actors at once; return whether communicators were made.

        :param addresses: for each actor a number that changes when its shards move
        :param seconds: tells the time left
        :raises SyncError: when an actor failed, died, or was too slow
        """
        fits = self._carries(preparation)
        if not fits:
            await self._connect(preparation, preparation.carriers.moved, run, seconds())

        if self._digest != preparation.digest:
            await self._actors.ask_all({program.actor: Load(run, program) for program in preparation.packed}, Done)
            self._digest = preparation.digest
            self._attached = frozenset()

        await self._attach(preparation, addresses, run)
        return not fits

    def _carries(self, preparation: Preparation) -> bool:
        """Tell whether there are communicators for all that is moved."""
        return not (preparation.groups or preparation.edges) or (
            self.transport == preparation.carriers.moved
            and self._owners == preparation.carriers.owners
            and self._groups.issuperset(preparation.groups)
            and self._edges.issuperset(preparation.edges)
        )

    def to_release(self, options: SyncOptions) -> tuple[bool, bool]:
        """Tell whether communicators are to be given back before a commit, and what keeps weights' memory."""
        return options.release_communicators and bool(self.transport), options.release_memory

    async def release(self, run: RunId, *, communicators: bool, memory: bool) -> None:
        """
        Let all actors give back what they keep; the next :meth:`ensure` that needs it makes it anew.

        :param communicators: with staging memory
        :param memory: mappings of others' memory, and what keeps shards' memory from being freed once the run has ended
        """
        request = Disconnect(run, communicators=communicators, memory=memory)
        await self._actors.ask_all(dict.fromkeys(range(len(self._actors)), request), Done)
        if communicators:
            self._groups = frozenset()
            self._edges = frozenset()
            self.transport = ""

        if memory:
            self._attached = frozenset()

    async def _attach(self, preparation: Preparation, addresses: Sequence[int], run: RunId) -> None:
        """Let receivers map what they read of others: what is not mapped yet, and of all that have moved since."""
        now = dict(enumerate(addresses))
        moved = {pair for pair in preparation.pulls if now[pair[0]] != self._addresses.get(pair[0])}
        stale = moved.union(preparation.readings - self._attached)
        if not stale:
            return

        exports = {sender: self._actors.start(sender, Export(run)) for sender in sorted({pair[0] for pair in stale})}
        await self._actors.answers(list(exports.values()), Exported)
        refs = []
        for receiver in sorted({pair[1] for pair in stale}):
            senders = tuple(sender for sender in exports if (sender, receiver) in stale)
            attach = Attach(run, senders)
            refs.append(self._actors.start(receiver, attach, *(exports[sender] for sender in senders)))

        await self._actors.answers(refs, Done)
        self._addresses.update((sender, now[sender]) for sender in exports)
        self._attached = self._attached.union(preparation.readings)

    async def _connect(self, preparation: Preparation, transport: str, run: RunId, seconds: float) -> None:
        self._groups = frozenset()
        self._edges = frozenset()
        self.transport = ""
        name = f"wavecast-{secrets.token_hex(16)}"
        # Over Ray to the members alone, never to the store.
        secret = secrets.token_bytes(SECRET_BYTES)
        address = await self._actors.ask(0, HostStore(run, name, seconds), StoreAddress)
        requests = {
            actor: Connect(
                run=run,
                connection=name,
                transport=transport,
                host=address.host,
                port=address.port,
                rank=actor,
                size=len(self._actors),
                groups=preparation.groups,
                edges=preparation.edges,
                seconds=seconds,
                secret=secret,
                owners=preparation.carriers.owners,
            )
            for actor in range(len(self._actors))
        }
        replies = await self._actors.ask_all(requests, Connected)
        self.communicator_bytes = max(reply.communicator_bytes for reply in replies.values())
        self._groups = frozenset(preparation.groups)
        self._edges = frozenset(preparation.edges)
        self._owners = preparation.carriers.owners
        self.transport = transport
