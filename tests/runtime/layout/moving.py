"""Moves real bytes between shards in one process: plans, then copies view to view, route by route."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard, describe
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.route import Route

__all__ = ("move", "read_route", "write_route")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def move(
    sources: Sequence[Sequence[Shard]], destinations: Sequence[Sequence[Shard]], *, allow_missing: Iterable[str] = ()
) -> ReshardPlan:
    """
    Bring every destination shard its elements from ``sources``, both one list of shards an actor; return the plan.

    Each element is read from its sender's first shard that holds it, cast to the destination's dtype, and written to
    every shard of a receiver that holds it.
    """
    plan = plan_reshard(
        [describe(shards) for shards in sources],
        [describe(shards) for shards in destinations],
        allow_missing=tuple(allow_missing),
    )
    held = [_by_name(shards) for shards in (*sources, *destinations)]
    for route in plan.routes:
        elements = read_route(route, held[route.sender].get(route.tensor, ()))
        for receiver in route.receivers:
            write_route(route, held[receiver].get(route.tensor, ()), elements)

    return plan


def read_route(route: Route, shards: Iterable[Shard]) -> torch.Tensor:
    """Return the elements of ``route`` from the first of its sender's ``shards`` that holds them, in its dtype."""
    shard = next(_holding(route, shards), None)
    assert shard is not None, f"the sender does not hold {route}"
    if isinstance(shard.view, Computed):
        start = tuple(a - b for a, b in zip(route.offset, shard.offset, strict=True))
        elements = shard.view.read(Box(start, route.extent))
        assert elements.shape == route.extent
        assert elements.dtype == shard.view.dtype
    else:
        elements = shard.view[_window(route, shard)]

    return elements.to(getattr(torch, route.dtype))


def write_route(route: Route, shards: Iterable[Shard], elements: torch.Tensor) -> None:
    """Write ``elements`` to all of a receiver's ``shards`` that hold the route's box in its dtype."""
    found = [shard for shard in _holding(route, shards) if shard.view.dtype == elements.dtype]
    assert found, f"a receiver cannot take {route}"
    for shard in found:
        assert isinstance(shard.view, torch.Tensor)
        # As bytes: a copy of floating point values may rewrite NaN payloads.
        shard.view[_window(route, shard)].view(_BITS[elements.element_size()]).copy_(
            elements.contiguous().view(_BITS[elements.element_size()])
        )


def _by_name(shards: Iterable[Shard]) -> dict[str, list[Shard]]:
    held: dict[str, list[Shard]] = {}
    for shard in shards:
        held.setdefault(shard.name, []).append(shard)

    return held


def _holding(route: Route, shards: Iterable[Shard]) -> Iterator[Shard]:
    return (shard for shard in shards if shard.name == route.tensor and shard.box.contains(route.box))


def _window(route: Route, shard: Shard) -> tuple[slice, ...]:
    spans = zip(route.offset, shard.offset, route.extent, strict=True)
    return tuple(slice(a - b, a - b + n) for a, b, n in spans)
