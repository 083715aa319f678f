"""Quantised weights and their scales: sent together and as they are, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.plan.placement import Holding, Placements

__all__ = ("SCALE", "require_pairs")

#: What the scales' name adds to the weight's: see :data:`wavecast.runtime.layout.fp8.SCALE`.
SCALE = "_scale_inv"


def require_pairs(sources: Placements, destinations: Placements, allow_missing: Collection[str]) -> None:
    """
    Refuse to part a weight in float8 from its scales, or to round these.

    Linear in the tensors. A weight in float8 of which nobody holds ``X_scale_inv`` has scales of another kind, of
    which nothing is known here.

    :raises LayoutError: naming weight, scales and actors: for scales to be cast, and for a half of a pair that would
        be written while the destination's other half stays as it was
    """
    names = {name: None for side in (sources, destinations) for name in side.tensors if name.endswith(SCALE)}
    for scale in names:
        weight = scale.removesuffix(SCALE)
        if _is_quantised(_held(sources, weight)) or _is_quantised(_held(destinations, weight)):
            _require_exact(scale, _held(sources, scale), _held(destinations, scale))
            _require_both(weight, scale, sources, destinations, allow_missing)


def _require_exact(scale: str, held: Sequence[Holding], wanted: Sequence[Holding]) -> None:
    for source in held:
        for destination in wanted:
            if source.dtype != destination.dtype:
                raise LayoutError(
                    f"{scale!r} is {source.dtype} on {source.actors} and {destination.dtype} on {destination.actors}: "
                    "the scales of a weight in float8 are not cast",
                    tensor=scale,
                    actors=(*source.actors, *destination.actors),
                )


def _require_both(
    weight: str, scale: str, sources: Placements, destinations: Placements, allow_missing: Collection[str]
) -> None:
    for half, other in ((weight, scale), (scale, weight)):
        wanted = _actors(each for each in _held(destinations, half) if half == scale or _is_quantised([each]))
        held = _held(sources, half)
        if not wanted or not (_is_quantised(held) if half == weight else held):
            continue

        if other not in sources.tensors:
            # Without leave the planner itself says what no source holds.
            if other in destinations.tensors and other in allow_missing:
                raise _parted(half, other, f"no source holds {other!r}, which allow_missing lets pass", wanted)

            continue

        # Scales may be on more actors than the weight they belong to, but a weight is nothing without its scales.
        having = _actors(_held(destinations, other))
        lacking = wanted - having if half == weight else set() if having else wanted
        if lacking:
            raise _parted(half, other, f"these destinations do not hold {other!r}", lacking)


def _parted(half: str, other: str, why: str, actors: Iterable[int]) -> LayoutError:
    found = tuple(sorted(actors))
    return LayoutError(
        f"{half!r} would be written on {found} without {other!r}: {why}. A weight in float8 and its scales are sent "
        "together: give both as shards under these names, or leave out both",
        tensor=half,
        actors=found,
    )


def _held(side: Placements, name: str) -> list[Holding]:
    return [side.holdings[index] for index in side.tensors.get(name, ())]


def _is_quantised(held: Iterable[Holding]) -> bool:
    return any(holding.dtype.startswith("float8") for holding in held)


def _actors(held: Iterable[Holding]) -> set[int]:
    return {actor for holding in held if holding.box.numel for actor in holding.actors}
