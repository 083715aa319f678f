"""How a sync begins: what all actors say of their versions and shards."""

from __future__ import annotations

from collections.abc import Mapping

from wavecast.runtime import errors
from wavecast.runtime.known import Known
from wavecast.runtime.request import SyncRequest
from wavecast.runtime.transfer.messages import Began, Begin, RunId, Standing, Status

__all__ = ("ask_versions", "begin")


async def ask_versions(known: Known) -> None:
    """
    Ask the replicas' actors for their versions, and note what they say. Outside of a run as well.

    :raises SyncError: when an actor died or failed
    """
    every = [actor for replica in known.replicas for actor in replica]
    _observe(known, await known.actors.ask_all(dict.fromkeys(every, Status()), Standing))


async def begin(known: Known, run: RunId, version: int | None, request: SyncRequest) -> list[Began]:
    """
    Let all actors read their shards, and return what each of them says, in their order.

    Notes in ``known`` which replicas have which version, and whether hooks come before anything moves.

    :param version: that the destinations are about to be brought to
    :raises SyncError: when an actor died or failed, or a source's own weights are torn
    :raises ValidationError: when the sources are to be scanned and hold NaN
    """
    in_shadow = known.options.staging == "shadow"
    requests = {
        actor: Begin(
            run,
            actor,
            scan=request.validate and actor < known.sources,
            version=None if request.from_peer and actor < known.sources else version,
            shadow=in_shadow and actor >= known.sources,
        )
        for actor in range(len(known.actors))
    }
    replies = await known.actors.ask_all(requests, Began)
    _observe(known, {actor: reply.standing for actor, reply in replies.items()})
    known.paused = any("before_sync" in reply.hooks for reply in replies.values())
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
