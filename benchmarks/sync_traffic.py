"""What of a case must cross from one GPU to another, and what stays: worked out from the plan, before anything runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sync_cases import Case, engine_memories, trainer_memories

from wavecast.runtime.layout.shard import Layout, Place, describe
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard

__all__ = ("Traffic", "plan_case", "traffic_of")

#: Of the busiest port's bytes: what carries less (norms that every rank holds) does not make the pattern.
_LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Traffic:
    """
    Bytes by way.

    :ivar edges: pairs of GPUs that bytes worth mentioning cross between, in order
    :ivar port_bytes: through the busiest port; each GPU has one in and one out, and what goes to several leaves once
    :ivar crossing_bytes: delivered from one GPU to another, each receiver's counted
    :ivar local_bytes: the most that is delivered within one GPU
    :ivar is_broadcast: all bytes are one source's, and go to the same two or more GPUs
    """

    edges: tuple[tuple[int, int], ...]
    port_bytes: int
    crossing_bytes: int
    local_bytes: int
    is_broadcast: bool


def plan_case(case: Case) -> ReshardPlan:
    """Plan the routes of ``case``, without any memory."""
    sources = [
        _layout(memory.allocate("meta"), gpu) for memory, gpu in zip(trainer_memories(case), case.trainers, strict=True)
    ]
    destinations = [
        _layout(memory.allocate("meta"), gpu)
        for held, gpus in zip(engine_memories(case), case.engines, strict=True)
        for memory, gpu in zip(held, gpus, strict=True)
    ]
    return plan_reshard(sources, destinations)


def _layout(shards: list, gpu: int) -> Layout:  # type: ignore[type-arg]
    return describe(shards, place=Place("here", str(gpu)))


def traffic_of(case: Case, plan: ReshardPlan) -> Traffic:
    """Return what ``plan`` makes cross when the actors are where ``case`` puts them."""
    leaving: Counter[int] = Counter()
    arriving: Counter[int] = Counter()
    staying: Counter[int] = Counter()
    edges: Counter[tuple[int, int]] = Counter()
    fans: set[tuple[int, tuple[int, ...]]] = set()
    places = case.places
    for route in plan.routes:
        source = places[route.sender]
        targets = [places[actor] for actor in route.receivers]
        away = [gpu for gpu in targets if gpu != source]
        staying[source] += route.nbytes * (len(targets) - len(away))
        if away:
            leaving[source] += route.nbytes
            fans.add((source, tuple(away)))

        for gpu in away:
            arriving[gpu] += route.nbytes
            edges[source, gpu] += route.nbytes

    port_bytes = max([*leaving.values(), *arriving.values()], default=0)
    return Traffic(
        edges=tuple(sorted(edge for edge, nbytes in edges.items() if nbytes >= port_bytes * _LEAST_SHARE)),
        port_bytes=port_bytes,
        crossing_bytes=sum(arriving.values()),
        local_bytes=max(staying.values(), default=0),
        is_broadcast=len(fans) == 1 and all(len(targets) > 1 for _, targets in fans),
    )
