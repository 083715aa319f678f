"""Which tensors a sync is of: what users pick, as logical names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.plan.pairs import SCALE

__all__ = ("Only", "select_names")

#: Which logical tensors to sync: a set of names, a predicate over names, or those in training; ``None`` for all.
Only = Collection[str] | Callable[[str], bool] | Literal["trainable"] | None


def select_names(
    sources: Sequence[Layout],
    destinations: Sequence[Layout],
    only: Only,
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> frozenset[str] | None:
    """
    Return the names that ``only`` picks out of what the destinations hold, or ``None`` for all.

    ``"trainable"`` picks the tensors that some source holds and no source has frozen. A quantised weight and its scales
    (``X.weight`` and ``X.weight_scale_inv``) are picked together, whichever of them is.

    :param aliases: names that are known to the plan by another: to pick either is to pick the tensor
    :raises ConfigError: for any other string, which is a collection of letters, for what is no collection of names,
        and when the predicate raises
    :raises LayoutError: for a name that no destination holds, and when nothing is picked
    """
    if only is None:
        return None

    held = dict.fromkeys(piece.tensor for layout in destinations for piece in layout.pieces)
    if isinstance(only, str):
        if only != "trainable":
            raise ConfigError(f'only= is the string {only!r}; give a collection of names, a predicate, or "trainable"')

        names = _trained(sources) & held.keys()
    elif callable(only):
        own = [name for name in held if _picks(only, name)]
        names = frozenset((*own, *(held_as for name, held_as in aliases.items() if _picks(only, name))))
    else:
        if not isinstance(only, Collection):
            raise ConfigError(f'only= is {only!r}; give a collection of names, a predicate, or "trainable"')

        stranger = next((name for name in only if not isinstance(name, str)), None)
        if stranger is not None:
            raise ConfigError(f"only= holds {stranger!r}, which is no name")

        names = frozenset(aliases.get(name, name) for name in only)
        unknown = sorted(names - held.keys())
        if unknown:
            raise LayoutError(f"only= names {unknown[0]!r}, which no destination holds", tensor=unknown[0])

    if not names:
        raise LayoutError("only= picks no tensor that a destination holds")

    return _with_pairs(names, held)


def _picks(only: Callable[[str], bool], name: str) -> bool:
    """Ask the user's predicate; what it raises is a mistake in what was asked for."""
    try:
        return bool(only(name))
    except Exception as error:
        raise ConfigError(f"only= raised {type(error).__name__} for {name!r}: {error}") from error


def _with_pairs(names: frozenset[str], held: Collection[str]) -> frozenset[str]:
    """Return ``names`` with the other half of each pair of quantised weight and scales: neither means a thing alone."""
    scales = {name + SCALE for name in names}
    weights = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    return names | frozenset(name for name in held if name in scales or name in weights)


def _trained(sources: Sequence[Layout]) -> frozenset[str]:
    frozen = {name for layout in sources for name in layout.frozen}
    return frozenset(piece.tensor for layout in sources for piece in layout.pieces if piece.tensor not in frozen)
