"""
Where an actor's views share memory, or should: refused before a byte moves unless all of them are one tensor's. Pure.

What is written to one view is written to all on its memory: a destination's must be one tensor's, or one of the two
would be wrong without a checksum that differs, since it was right when it was summed up. At a source it is the other
way round: what it holds twice must be one memory, or which of them is sent were left to chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box, overlaps
from wavecast.runtime.layout.shard import Layout, Piece

__all__ = ("require_one_memory", "tied_names")

_Lookup = Callable[[str], Sequence[str]]


def require_one_memory(sources: Sequence[Layout], look_up: _Lookup) -> None:
    """
    Refuse sources that hold a box, or a part of one, twice, in different memory.

    Boxes that overlap in part may be views that do too. Where shards of the tensor are computed, what from is not
    known, and such boxes pass.

    :param look_up: from an actor's own name to the logical ones
    :raises LayoutError: naming both tensors and the actor
    """
    for actor, layout in _different(sources, first_actor=0):
        memory = _memory_of(layout)
        names = [look_up(piece.tensor) for piece in layout.pieces]
        often = Counter(name for found in names for name in found)
        held: dict[str, dict[Box, int]] = {}
        for index, (piece, found) in enumerate(zip(layout.pieces, names, strict=True)):
            for name in found:
                # Most tensors are in one piece: a box takes long to hash.
                if often[name] == 1 or not piece.box.numel:
                    continue

                other = held.setdefault(name, {}).setdefault(piece.box, index)
                if other != index and memory.get(other, -1) != memory.get(index, -2):
                    raise _twice(name, layout.pieces[other], piece, actor)

        shared = frozenset(layout.sharing.overlapping)
        for name, boxes in held.items():
            for one, two in overlaps(boxes):
                if not _is_one_memory(layout, memory, shared, boxes[one], boxes[two]):
                    raise _twice(name, layout.pieces[boxes[one]], layout.pieces[boxes[two]], actor)


def _is_one_memory(
    layout: Layout, memory: dict[int, int], shared: frozenset[tuple[int, int]], one: int, two: int
) -> bool:
    """Tell whether two pieces are views that overlap, or computed: from the same elements, we take it."""
    if all(layout.pieces[index].tensor in layout.computed for index in (one, two)):
        return True

    # Of equal views the first stands for all.
    first, second = (layout.sharing.same[memory[index]][0] if index in memory else index for index in (one, two))
    return first == second or (min(first, second), max(first, second)) in shared


def _twice(name: str, one: Piece, two: Piece, actor: int) -> LayoutError:
    where = f"at offset {two.box.offset} with extent {two.box.extent} twice"
    if one.box != two.box:
        where = "twice in part"

    return LayoutError(
        f"a source holds {name!r} {where}, in different memory: {_told(one)} and {_told(two)}; which one is meant "
        "cannot be known",
        tensor=name,
        actors=(actor,),
    )


def tied_names(
    sources: Sequence[Layout], destinations: Sequence[Layout], from_source: _Lookup, from_destination: _Lookup
) -> dict[str, str]:
    """
    Return which names destinations hold in another's memory, and whose, where all sources tie them too.

    :param from_source: from a source's own name to the logical ones, and ``from_destination`` the same of a destination
    :raises LayoutError: naming both tensors and the actor, where a destination's views overlap and are not one tensor's
    """
    ties = _Ties(sources, from_source)
    tied: dict[str, str] = {}
    for actor, layout in _different(destinations, first_actor=len(sources)):
        for first, second, equal in _pairs(layout):
            a, b = layout.pieces[first], layout.pieces[second]
            for name in from_destination(a.tensor):
                for other in from_destination(b.tensor):
                    if not (ties.holds(name) and ties.holds(other)):
                        continue

                    name, other = tied.get(name, name), tied.get(other, other)
                    if not equal or a.box != b.box or not (name == other or ties.tie(name, other)):
                        raise _clash(a, b, actor)

                    if name != other:
                        tied[other] = name

    return tied


class _Ties:
    """What sources hold of each tensor, and in which memory."""

    def __init__(self, sources: Sequence[Layout], look_up: _Lookup) -> None:
        self._held: list[dict[str, list[tuple[Box, int]]]] = []
        for _, layout in _different(sources, first_actor=0):
            memory = _memory_of(layout)
            held: dict[str, list[tuple[Box, int]]] = {}
            for index, piece in enumerate(layout.pieces):
                for name in look_up(piece.tensor):
                    # What shares with nothing has a number of its own.
                    held.setdefault(name, []).append((piece.box, memory.get(index, -1 - index)))

            self._held.append(held)

    def holds(self, name: str) -> bool:
        """Tell whether any source holds some of the tensor."""
        return any(name in held for held in self._held)

    def tie(self, name: str, other: str) -> bool:
        """Tell whether the two are one: every source that holds any of either has both in the same memory."""
        return all(sorted(held.get(name, ())) == sorted(held.get(other, ())) for held in self._held)


def _different(layouts: Iterable[Layout], *, first_actor: int) -> Iterator[tuple[int, Layout]]:
    """Yield each different layout once, with the first actor that has it."""
    seen: set[tuple[int, object]] = set()
    for actor, layout in enumerate(layouts, first_actor):
        key = (id(layout.pieces), layout.sharing)
        if key not in seen:
            seen.add(key)
            yield actor, layout


def _memory_of(layout: Layout) -> dict[int, int]:
    """Return, for each piece that shares its memory with equal views, the number of its group."""
    return {index: number for number, group in enumerate(layout.sharing.same) for index in group}


def _pairs(layout: Layout) -> Iterator[tuple[int, int, bool]]:
    """Yield pairs of pieces on common memory, and whether they are equal views of it."""
    for group in layout.sharing.same:
        yield from ((group[0], index, True) for index in group[1:])

    yield from ((first, second, False) for first, second in layout.sharing.overlapping)


def _clash(a: Piece, b: Piece, actor: int) -> LayoutError:
    return LayoutError(
        f"a destination's {_told(a)} and {_told(b)} share memory and are not one tensor to the sources: what is "
        "written to one would overwrite the other. Give each memory of its own, tie them at the sources too, or leave "
        "one out by names=",
        tensor=b.tensor,
        actors=(actor,),
    )


def _told(piece: Piece) -> str:
    return f"{piece.tensor!r} at offset {piece.box.offset} with extent {piece.box.extent} ({piece.dtype})"
