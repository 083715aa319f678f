"""Both sides under the same logical names: name maps of the groups, and aliases of tied weights. All pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.layout.sharing import NOT_SHARED
from wavecast.runtime.layout.views import NameMap, map_name
from wavecast.runtime.shared_memory import require_one_memory, tied_names

__all__ = ("Naming", "Renames", "name_layouts")

#: An actor's own names and the logical names each of them has in the plan; names that stay as they are are left out.
Renames = tuple[tuple[str, tuple[str, ...]], ...]

_Lookup = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Naming:
    """
    Layouts as the planner sees them, and what that has to do with the actors' own names.

    :ivar sources: under logical names
    :ivar destinations: under logical names; a tensor fed by its alias is under the alias that sources hold
    :ivar renames: one an actor, sources first: what its program has to tell it
    :ivar aliases: from a tensor that no source holds to the alias that takes its place
    """

    sources: tuple[Layout, ...]
    destinations: tuple[Layout, ...]
    renames: tuple[Renames, ...]
    aliases: Mapping[str, str]


def name_layouts(
    sources: Sequence[Layout],
    destinations: Sequence[Layout],
    *,
    source_names: NameMap | None = None,
    destination_names: NameMap | None = None,
    aliases: Collection[Collection[str]] = (),
    source_copies: bool = False,
) -> Naming:
    """
    Bring both sides under logical names.

    Each different name is looked up once a side, each different layout gone through once.

    :param source_names: from the sources' own names to logical ones; ``None``: they are logical
    :param destination_names: the same of the destinations
    :param aliases: sets of logical names that are one tensor where weights are tied. A set of which the sources hold
        one name only is fed from that one. Names that a destination holds in the same memory, as all sources do, are
        one tensor without being listed
    :param source_copies: a source may hold a box twice, in memory of its own each: an engine to which a sync has
        brought both
    :raises LayoutError: when a destination's tensor is to be two logical tensors at once, or its memory is: views that
        overlap without being one tensor's; when a source holds a box twice, in different memory; and for aliases of
        which the sources hold several and the destinations others, or fewer: which one is meant cannot be known
    :raises ConfigError: when a name map raises, or gives something else than names
    """
    from_source, from_destination = _lookup(source_names), _one_each(_lookup(destination_names))
    if not source_copies:
        require_one_memory(sources, from_source)

    shared = any(layout.sharing != NOT_SHARED for layout in destinations)
    if source_names is None and destination_names is None and not aliases and not shared:
        count = len(sources) + len(destinations)
        return Naming(tuple(sources), tuple(destinations), ((),) * count, {})

    held = _all_names(sources, from_source)
    meant = _resolve(aliases, held, _all_names(destinations, from_destination))
    if shared:
        meant |= tied_names(
            sources, destinations, from_source, lambda own: [meant.get(name, name) for name in from_destination(own)]
        )

    named_sources, source_renames = _rename(sources, from_source)
    named_destinations, destination_renames = _rename(
        destinations, lambda own: tuple(meant.get(name, name) for name in from_destination(own))
    )
    return Naming(named_sources, named_destinations, (*source_renames, *destination_renames), meant)


def _lookup(names: NameMap | None) -> _Lookup:
    known: dict[str, tuple[str, ...]] = {}

    def look_up(own: str) -> tuple[str, ...]:
        if own not in known:
            try:
                found = map_name(names, own)
            except Exception as error:
                raise ConfigError(f"names= raised {type(error).__name__} for {own!r}: {error}") from error

            if not all(isinstance(name, str) for name in found):
                raise ConfigError(f"names= gives {found!r} for {own!r}; it must give a name, several, or None")

            known[own] = tuple(dict.fromkeys(found))

        return known[own]

    return look_up


def _one_each(look_up: _Lookup) -> _Lookup:
    def checked(own: str) -> tuple[str, ...]:
        found = look_up(own)
        if len(found) > 1:
            raise LayoutError(
                f"names= makes a destination's {own!r} both {found[0]!r} and {found[1]!r}: it can be written from one",
                tensor=own,
            )

        return found

    return checked


def _all_names(layouts: Sequence[Layout], look_up: _Lookup) -> frozenset[str]:
    different = {id(layout.pieces): layout.pieces for layout in layouts}
    return frozenset(name for pieces in different.values() for piece in pieces for name in look_up(piece.tensor))


def _resolve(aliases: Iterable[Collection[str]], held: frozenset[str], wanted: frozenset[str]) -> dict[str, str]:
    """Return, for each tensor wanted that no source holds, the alias it is to be read from."""
    meant: dict[str, str] = {}
    for names in aliases:
        at_sources = [name for name in names if name in held]
        at_destinations = [name for name in names if name in wanted]
        if len(at_sources) == 1:
            meant.update((name, at_sources[0]) for name in at_destinations if name != at_sources[0])
        elif at_sources and at_destinations and at_sources != at_destinations:
            raise LayoutError(
                f"sources hold {_listed(at_sources)} apart, destinations hold {_listed(at_destinations)}: of aliases "
                "that are not tied at the sources, destinations must hold the same; leave out the others by names=",
                tensor=at_destinations[0],
            )

    return meant


def _listed(names: Sequence[str]) -> str:
    return " and ".join(repr(name) for name in names)


def _rename(layouts: Sequence[Layout], look_up: _Lookup) -> tuple[tuple[Layout, ...], tuple[Renames, ...]]:
    """Return the layouts under other names and what changed, equal objects of pieces gone through once."""
    # Kept as they are found: an id means something only as long as its object lives, and the layouts outlive this call.
    known: dict[int, tuple[tuple[Piece, ...], Renames]] = {}
    named: list[Layout] = []
    renames: list[Renames] = []
    for layout in layouts:
        key = id(layout.pieces)
        if key not in known:
            known[key] = _rename_pieces(layout.pieces, look_up)

        pieces, changed = known[key]
        computed = dict.fromkeys(name for own in layout.computed for name in look_up(own))
        named.append(
            replace(
                layout,
                pieces=pieces,
                frozen=_frozen(layout, look_up),
                computed=tuple(computed),
                sharing=layout.sharing if pieces is layout.pieces else NOT_SHARED,
            )
        )
        renames.append(changed)

    return tuple(named), tuple(renames)


def _rename_pieces(pieces: tuple[Piece, ...], look_up: _Lookup) -> tuple[tuple[Piece, ...], Renames]:
    own_names = dict.fromkeys(piece.tensor for piece in pieces)
    changed = tuple((own, look_up(own)) for own in own_names if look_up(own) != (own,))
    if not changed:
        return pieces, ()

    renamed = (
        piece if name == piece.tensor else replace(piece, tensor=name)
        for piece in pieces
        for name in look_up(piece.tensor)
    )
    return tuple(renamed), changed


def _frozen(layout: Layout, look_up: _Lookup) -> tuple[str, ...]:
    """Return the logical names of which the actor trains nothing."""
    if not layout.frozen:
        return ()

    frozen = frozenset(layout.frozen)
    trained = {name for piece in layout.pieces if piece.tensor not in frozen for name in look_up(piece.tensor)}
    return tuple(dict.fromkeys(name for own in layout.frozen for name in look_up(own) if name not in trained))
