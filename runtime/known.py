"""What syncs of the same actors found out: layouts, names, versions, plans; each worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import anyio.to_thread

from wavecast.runtime.carriers import Ability, Carriers, choose_carriers
from wavecast.runtime.cluster import RayActors
from wavecast.runtime.collector import collector_paused
from wavecast.runtime.connection import Connection
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.layout.views import NameMap
from wavecast.runtime.naming import Naming, name_layouts
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.selection import Only, select_names
from wavecast.runtime.transfer.messages import Began, Describe, Described, RunId
from wavecast.runtime.versions import Versions

__all__ = ("Known",)

R = TypeVar("R")


class Known:
    """
    What earlier syncs of the same actors found out and need not find out again.

    :ivar sources: how many of the actors, from the first on, are sources
    :ivar replicas: the numbers of the actors of each replica
    :ivar versions: of the replicas
    :param names: the name maps of both sides
    :ivar layouts: by digest
    :ivar naming: the last layouts under logical names, with what they were made of
    :ivar prepared: the last preparation, with what it was made for
    :ivar digests: by actor: of the layouts it was made for
    :ivar refused: pairs of sender and receiver of which the sender's memory could not be shared or mapped
    :ivar paused: some actor has a hook to run before anything moves
    :ivar hooked: some actor has a hook
    """

    def __init__(
        self,
        actors: RayActors,
        sources: int,
        replicas: tuple[range, ...],
        versions: Versions,
        options: SyncOptions,
        *,
        names: tuple[NameMap | None, NameMap | None],
    ) -> None:
        self.actors = actors
        self.sources = sources
        self.replicas = replicas
        self.versions = versions
        self.options = options
        self.names = names
        self.connection = Connection(actors)
        self.layouts: dict[str, Layout] = {}
        self.naming: tuple[tuple[object, ...], Naming] | None = None
        self.prepared: tuple[tuple[object, ...], Preparation] | None = None
        self.digests: tuple[str, ...] = ()
        self.refused: frozenset[tuple[int, int]] = frozenset()
        self.paused = False
        self.hooked = False
        self._chosen: tuple[object, Carriers] | None = None

    def carriers(self, began: Sequence[Began]) -> Carriers:
        """Return the ways open to the actors, as :func:`choose_carriers` finds them."""
        abilities = tuple(Ability(reply.place, reply.unshared, reply.kernels) for reply in began)
        if self._chosen is None or self._chosen[0] != (abilities, self.refused):
            sending = None if self.options.relays else range(self.sources)
            carriers = choose_carriers(self.options.transport, abilities, refused=self.refused, sending=sending)
            self._chosen = ((abilities, self.refused), carriers)

        return self._chosen[1]

    def holds_for(self, began: Sequence[Began]) -> bool:
        """Tell whether the actors are as they were when everything was last prepared, for all tensors."""
        return self.prepared is not None and self.prepared[0] == self._key(began, None)

    async def learn_layouts(self, run: RunId, began: Sequence[Began]) -> None:
        """
        Fetch each layout that is not known yet from one of its holders.

        :raises SyncError: when a holder failed or died
        """
        holders = {reply.digest: actor for actor, reply in enumerate(began) if reply.digest not in self.layouts}
        described = await self.actors.ask_all(dict.fromkeys(holders.values(), Describe(run)), Described)
        for digest, actor in holders.items():
            self.layouts[digest] = await _off_loop(described[actor].layout)

        current = {reply.digest for reply in began}
        self.layouts = {digest: layout for digest, layout in self.layouts.items() if digest in current}

    async def prepare(self, began: Sequence[Began], only: Only, *, from_peer: bool = False) -> tuple[Preparation, bool]:
        """
        Return the preparation for these layouts and this selection, and whether it had to be made.

        :param from_peer: the sources are another replica: where they hold copies, any may send
        :raises ConfigError: when ``only`` is no selection
        :raises LayoutError: when the layouts cannot be served
        """
        naming = await self._named(began, from_peer=from_peer)
        sources, destinations = naming.sources, naming.destinations
        names = await _select(naming, only)
        carriers = self.carriers(began)
        key = self._key(began, names)
        if self.prepared is not None and self.prepared[0] == key:
            return self.prepared[1], False

        # Planning is plain computing: it leaves the loop, so that the trainer's coroutines go on. What is abandoned,
        # here and elsewhere, assigns nothing: the thread's result is dropped with it.
        preparation = await _off_loop(
            partial(
                prepare,
                sources,
                destinations,
                self.options,
                names,
                carriers,
                renames=naming.renames,
                replicas=self.replicas,
            )
        )
        self.prepared = (key, preparation)
        self.digests = tuple(reply.digest for reply in began)
        return preparation, True

    async def _named(self, began: Sequence[Began], *, from_peer: bool) -> Naming:
        """Return both sides under logical names; worked out off the loop when a layout has changed."""
        key = tuple((reply.digest, reply.place) for reply in began)
        if self.naming is None or self.naming[0] != key:
            layouts = [replace(self.layouts[reply.digest], place=reply.place) for reply in began]
            naming = await _off_loop(
                partial(
                    name_layouts,
                    layouts[: self.sources],
                    layouts[self.sources :],
                    source_names=self.names[0],
                    destination_names=self.names[1],
                    aliases=self.options.aliases,
                    source_copies=from_peer,
                )
            )
            self.naming = (key, naming)

        return self.naming[1]

    def _key(self, began: Sequence[Began], names: frozenset[str] | None) -> tuple[object, ...]:
        return tuple((reply.digest, reply.place) for reply in began), self.carriers(began), names


async def _select(naming: Naming, only: Only) -> frozenset[str] | None:
    """Select off the loop: a predicate is the user's code, and the names of a large model take long to go through."""
    if only is None:
        return None

    return await _off_loop(partial(select_names, naming.sources, naming.destinations, only, aliases=naming.aliases))


async def _off_loop(work: Callable[[], R]) -> R:
    """Run ``work``, which makes many objects that stay, on a thread; it is abandoned when the caller is cancelled."""

    def quietly() -> R:
        with collector_paused():
            return work()

    return await anyio.to_thread.run_sync(quietly, abandon_on_cancel=True)
