"""The end of a sync that went well: the users' hooks, and every actor's commit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio

from wavecast.runtime.cluster import Answer, RayActors
from wavecast.runtime.errors import SyncError
from wavecast.runtime.report import HookSeconds
from wavecast.runtime.transfer.messages import Began, Commit, Committed, HookDone, RunHook, RunId

__all__ = ("CommitPhase",)

#: For answers that are on their way when the caller is cancelled or his time is up.
_HEAR_SECONDS = 0.1


@dataclass(slots=True)
class CommitPhase:
    """
    Commits on every actor: asks their hooks first, and calls those that follow once all of them have committed.

    :ivar began: what the actors said at the begin: actors without a hook are not asked for it
    :ivar voters: actors that must say that they can commit before any of them is told to
    :ivar closed: actors on which the run is over already: they have committed by themselves
    :ivar committed: what the actors answered so far, by number; stays true when the phase fails
    :ivar started: whether any actor was told to commit
    """

    actors: RayActors
    run: RunId
    began: Sequence[Began]
    dry_run: bool
    voters: Sequence[int] = ()
    closed: Collection[int] = ()
    committed: dict[int, Committed] = field(default_factory=dict)
    started: bool = False

    async def go_through(self, versions: Mapping[int, int | None]) -> HookSeconds:
        """
        Commit ``versions``, by actor, and return what the hooks took.

        :raises SyncError: when a hook failed: before any actor has committed, or after all have; when an actor died or
            could not commit, once all others have answered
        """
        before = 0.0 if self.dry_run else await self._call("before_commit", self.voters)
        await self._commit(versions)
        after = await self._call("after_abort" if self.dry_run else "after_commit")
        return HookSeconds(max((reply.hook_seconds for reply in self.began), default=0.0), before, after)

    @property
    def flip_seconds(self) -> float:
        """What the slowest actor took to copy its second copy over its weights."""
        return max((reply.flip_seconds for reply in self.committed.values()), default=0.0)

    async def _call(self, hook: str, voters: Sequence[int] = ()) -> float:
        """Call a hook on all actors that have it or vote by it, wait for all, and return what the slowest took."""
        asked = {
            actor: RunHook(self.run, hook)
            for actor, reply in enumerate(self.began)
            if hook in reply.hooks or actor in voters
        }
        replies = await self.actors.ask_each(asked, HookDone) if asked else {}
        _raise_first(replies.values())
        return max((reply.seconds for reply in replies.values() if isinstance(reply, HookDone)), default=0.0)

    async def _commit(self, versions: Mapping[int, int | None]) -> None:
        """Ask all at once and hear all of them out: who has committed must be known when one has not."""
        self.started = True
        refs = {
            actor: self.actors.start(actor, Commit(self.run, version, self.dry_run))
            for actor, version in versions.items()
            if actor not in self.closed
        }
        if not refs:
            return

        failures: list[SyncError] = []

        async def hear(actor: int, ref: Answer) -> None:
            try:
                self.committed[actor] = await self.actors.answer(ref, Committed)
                del refs[actor]
            except SyncError as error:
                failures.append(error)
                del refs[actor]

        async def hear_all() -> None:
            async with anyio.create_task_group() as group:
                for actor, ref in refs.items():
                    group.start_soon(hear, actor, ref)

        try:
            await hear_all()
        except anyio.get_cancelled_exc_class():
            # What was sent is under way. A moment more tells whether a replica is new or torn.
            with anyio.CancelScope(shield=True), anyio.move_on_after(_HEAR_SECONDS):
                await hear_all()

            raise

        _raise_first(failures)


def _raise_first(replies: Iterable[object]) -> None:
    for reply in replies:
        if isinstance(reply, SyncError):
            raise reply
