"""Syncs like the one before: their steps are asked for along with the begins, and their end is left to the actors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import anyio

from wavecast.runtime import errors
from wavecast.runtime.cluster import Answer, RayActors
from wavecast.runtime.known import Known
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.request import SyncRequest
from wavecast.runtime.transfer.messages import Began

__all__ = ("BeginsAhead", "expected", "may_close")


def expected(known: Known, request: SyncRequest) -> Preparation | None:
    """
    Return what a sync will in all likelihood do, when its steps may be asked for before that is certain.

    They may where a receiver begins with no sender that has not begun this run, or whose memory is no longer where it
    was, and no collective can be entered by some and not by others: their members look at each other's boards.
    """
    if known.prepared is None or known.paused:
        return None

    if request.only is not None or request.validate or request.dry_run:
        return None

    (*_, names), preparation = known.prepared
    ready = names is None and preparation.is_safe_ahead and known.connection.serves(preparation)
    return preparation if ready else None


def may_close(known: Known, request: SyncRequest, preparation: Preparation) -> bool:
    """Tell whether the actors may end the run among themselves: nothing of the user's comes before that."""
    options = known.options
    if request.from_peer or known.hooked or options.staging != "in_place":
        return False

    if options.task_allowance is not None:
        # An actor's last task ends with the last of all receivers': that is no measure of its own.
        return False

    return bool(preparation.agreeing) and not any(known.connection.to_release(options))


class BeginsAhead:
    """
    The begins of a run whose steps are under way already.

    No task waits for the answers: at the end of the run it would have to be waited for in its turn.

    :param asked: the answers to come
    :param note: notes what all actors said and returns it by actor; raises where the run cannot stand
    :param fits: tells whether the actors are as the run was planned for
    :param stop: is called as soon as it is known that they are not
    :ivar began: what each actor said, once all have
    :ivar fit: whether they are as the run was planned for
    :ivar refusal: why an actor did not begin, which tells more than what became of a step
    :ivar given_up: the begin was; a step that failed before has the reason
    """

    def __init__(
        self,
        actors: RayActors,
        asked: Mapping[int, Answer],
        note: Callable[[dict[int, Began]], list[Began]],
        fits: Callable[[list[Began]], bool],
        stop: Callable[[], object],
    ) -> None:
        self.began: list[Began] = []
        self.fit = False
        self.refusal: Exception | None = None
        self.given_up: errors.SyncAborted | None = None
        self._asked = tuple(asked)
        self._note = note
        self._fits = fits
        self._stop = stop
        self._noted = anyio.Event()
        self._hearing = actors.hear(list(asked.values()), Began)
        self._hearing.add_done_callback(self._take)

    async def wait(self) -> None:
        """Wait until all actors have begun, or one has not."""
        if not self._noted.is_set():
            await self._noted.wait()

    def hear_no_more(self) -> None:
        """Note nothing of what is said from now on: the run's end will have been noted."""
        self._noted.set()
        self._hearing.cancel()

    def _take(self, heard: asyncio.Future[list[Began]]) -> None:
        if self._noted.is_set():
            return

        try:
            if not heard.cancelled():
                self.began = self._note(dict(zip(self._asked, heard.result(), strict=True)))
        except errors.SyncAborted as error:
            self.given_up = error
        except Exception as error:
            self.refusal = error
        finally:
            self._noted.set()
            self.fit = self._fits(self.began)
            if not self.fit:
                self._stop()
