"""How a sync begins: what all actors say of their versions and shards."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wavecast.runtime import errors
from wavecast.runtime.cluster import Answer
from wavecast.runtime.known import Known
from wavecast.runtime.preparation import Preparation
from wavecast.runtime.request import SyncRequest
from wavecast.runtime.transfer.messages import Began, Begin, CloseRun, RunId, RunStep, Standing, Status

__all__ = ("HeadStart", "ask_to_begin", "ask_versions", "head_starts", "hear_begins", "note_begins")


@dataclass(frozen=True, slots=True)
class HeadStart:
    """What an actor may do as soon as it has begun. The fields are those of :class:`Begin`."""

    layout: str
    ahead: tuple[RunStep, ...]
    close: CloseRun | None


def head_starts(
    known: Known,
    preparation: Preparation,
    run: RunId,
    versions: Mapping[int, int | None] | None,
    *,
    seconds: float,
) -> list[HeadStart]:
    """
    Return what each actor may do as soon as it has begun a run that is to do what ``preparation`` says.

    :param versions: what each actor takes on when the receivers end the run among themselves; ``None``: the driver does
    :param seconds: left until the deadline
    """
    found: list[HeadStart] = []
    for actor, count in enumerate(preparation.ahead):
        ahead = tuple(RunStep(run, step, preparation.digest, seconds) for step in range(count))
        close = None
        if versions is not None:
            peers = tuple(peer for peer in preparation.agreeing if peer != actor)
            close = CloseRun(
                versions[actor],
                known.versions.newest,
                peers if actor in preparation.agreeing else (),
            )

        found.append(HeadStart(known.digests[actor], ahead, close))

    return found


async def ask_versions(known: Known) -> None:
    """
    Ask the replicas' actors for their versions, and note what they say. Outside of a run as well.

    :raises SyncError: when an actor died or failed
    """
    every = [actor for replica in known.replicas for actor in replica]
    _observe(known, await known.actors.ask_all(dict.fromkeys(every, Status()), Standing))


def ask_to_begin(
    known: Known, run: RunId, version: int | None, request: SyncRequest, starts: Sequence[HeadStart] = ()
) -> dict[int, Answer]:
    """
    Let all actors read their shards; return their answers to come, for :func:`hear_begins`.

    :param version: that the destinations are about to be brought to
    :param starts: by actor: what it may do at once; none: nothing
    """
    in_shadow = known.options.staging == "shadow"
    # In turns: a receiver's first byte waits for its sender, which looks at its weights before.
    sides = itertools.zip_longest(range(known.sources), range(known.sources, len(known.actors)))
    order = [actor for pair in sides for actor in pair if actor is not None]
    requests = {
        actor: Begin(
            run,
            actor,
            scan=request.validate and actor < known.sources,
            version=None if request.from_peer and actor < known.sources else version,
            shadow=in_shadow and actor >= known.sources,
            layout=starts[actor].layout if starts else None,
            ahead=starts[actor].ahead if starts else (),
            close=starts[actor].close if starts else None,
        )
        for actor in order
    }
    return {actor: known.actors.start(actor, request) for actor, request in requests.items()}


async def hear_begins(
    known: Known, version: int | None, request: SyncRequest, asked: Mapping[int, Answer]
) -> list[Began]:
    """
    Return what each actor says at its begin, in their order.

    Notes in ``known`` which replicas have which version, and whether hooks come before anything moves.

    :raises SyncError: when an actor died or failed, or a source's own weights are torn
    :raises ValidationError: when the sources are to be scanned and hold NaN
    """
    replies = await known.actors.answers(list(asked.values()), Began)
    return note_begins(known, version, request, dict(zip(asked, replies, strict=True)))


def note_begins(known: Known, version: int | None, request: SyncRequest, replies: Mapping[int, Began]) -> list[Began]:
    """Return what was said at the begins, noted and checked as :func:`hear_begins` does."""
    _observe(known, {actor: reply.standing for actor, reply in replies.items()})
    known.paused = any("before_sync" in reply.hooks for reply in replies.values())
    known.hooked = any(reply.hooks for reply in replies.values())
    for actor, reply in replies.items():
        if request.from_peer and actor < known.sources and reply.standing.version != version:
            raise errors.SyncError(
                f"the peer to copy from has version {reply.standing.version}, not {version}", actors=(actor,)
            )

        if reply.torn and actor < known.sources:
            raise errors.SyncError(
                "a source's weights are torn: a sync into it was begun and not finished", actors=(actor,)
            )

        if reply.nan:
            name, count = reply.nan[0]
            raise errors.ValidationError(
                f"{len(reply.nan)} source tensors hold NaN; the first is {name!r} with {count} elements",
                tensor=name,
                actors=(actor,),
            )

    return [replies[actor] for actor in range(len(known.actors))]


def _observe(known: Known, standings: Mapping[int, Standing]) -> None:
    known.versions.observe([[standings[actor] for actor in replica] for replica in known.replicas])
