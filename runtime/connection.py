"""The driver's view of the actors' communicators and programs: made once, kept while they fit."""

from __future__ import annotations

import secrets

from wavecast.runtime.cluster import RayActors
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.transfer.messages import Connect, Connected, Done, HostStore, Load, RunId, StoreAddress

__all__ = ("Connection",)


class Connection:
    """
    What the actors have been given so far.

    :ivar transport: of the communicators, or ``""`` before the first
    :ivar communicator_bytes: the most device memory they took on an actor
    """

    def __init__(self, actors: RayActors) -> None:
        self._actors = actors
        self._groups: frozenset[tuple[int, ...]] = frozenset()
        self._edges: frozenset[tuple[int, int]] = frozenset()
        self._digest = ""
        self.transport = ""
        self.communicator_bytes = 0

    def forget(self) -> None:
        """Take everything for lost: the next :meth:`ensure` makes it anew."""
        self._groups = frozenset()
        self._edges = frozenset()
        self._digest = ""
        self.transport = ""

    async def ensure(self, preparation: Preparation, transport: str, *, run: RunId, seconds: float) -> bool:
        """
        Make what is missing for ``preparation``, on all actors at once; return whether communicators were made.

        :raises SyncError: when an actor failed, died, or was too slow
        """
        fits = (
            self.transport == transport
            and self._groups.issuperset(preparation.groups)
            and self._edges.issuperset(preparation.edges)
        )
        if not fits:
            await self._connect(preparation, transport, run, seconds)

        if self._digest != preparation.digest:
            await self._actors.ask_all({program.actor: Load(run, program) for program in preparation.packed}, Done)
            self._digest = preparation.digest

        return not fits

    async def _connect(self, preparation: Preparation, transport: str, run: RunId, seconds: float) -> None:
        self.forget()
        # Unguessable: whoever does not know it finds no key in the store.
        name = f"wavecast-{secrets.token_hex(16)}"
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
            )
            for actor in range(len(self._actors))
        }
        replies = await self._actors.ask_all(requests, Connected)
        self.communicator_bytes = max(reply.communicator_bytes for reply in replies.values())
        self._groups = frozenset(preparation.groups)
        self._edges = frozenset(preparation.edges)
        self.transport = transport
