"""An oracle that shares no code with the planner: numpy arrays cut by slices, routes applied one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import pytest

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place
from wavecast.runtime.plan.reshard import ReshardPlan
from wavecast.runtime.plan.route import Route

ITEMSIZES = {"float32": 4, "bfloat16": 2, "int32": 4, "uint8": 1, "float64": 8}


def layout(*pieces: tuple[str, Sequence[int], Sequence[int], Sequence[int], str], place: Place | None = None) -> Layout:
    """Return the layout of pieces given as (tensor, offset, extent, global shape, dtype)."""
    return Layout(
        tuple(
            Piece(tensor, Box(tuple(offset), tuple(extent)), tuple(shape), dtype)
            for tensor, offset, extent, shape, dtype in pieces
        ),
        place,
    )


def split(
    tensor: str, shape: Sequence[int], parts: int, *, dim: int = 0, dtype: str = "float32", copies: int = 1
) -> list[Layout]:
    """Return ``copies`` times the layouts of ``parts`` actors that share a tensor evenly along ``dim``."""
    assert shape[dim] % parts == 0
    size = shape[dim] // parts
    extent = [*shape[:dim], size, *shape[dim + 1 :]]
    return [
        layout((tensor, [size * part if d == dim else 0 for d in range(len(shape))], extent, shape, dtype))
        for _ in range(copies)
        for part in range(parts)
    ]


def apply_routes(routes: Sequence[Route], sources: Sequence[Layout], destinations: Sequence[Layout]) -> None:
    """Move numbered elements by ``routes`` and compare every element of every destination piece, and its writes."""
    shapes = {piece.tensor: piece.global_shape for each in (*sources, *destinations) for piece in each.pieces}
    whole = {
        tensor: np.arange(prod(shape), dtype=np.int64).reshape(shape) + 1000 * number
        for number, (tensor, shape) in enumerate(sorted(shapes.items()))
    }
    memory = [[whole[piece.tensor][_slices(piece.box)].copy() for piece in each.pieces] for each in sources]
    arrived = [[np.full(piece.box.extent, -1, np.int64) for piece in each.pieces] for each in destinations]
    writes = [[np.zeros(piece.box.extent, np.int64) for piece in each.pieces] for each in destinations]

    for route in routes:
        box = Box(route.offset, route.extent)
        assert route.nbytes == prod(route.extent) * ITEMSIZES[route.dtype] > 0
        assert route.receivers == tuple(sorted(set(route.receivers)))
        held = [
            (piece, data)
            for piece, data in zip(sources[route.sender].pieces, memory[route.sender], strict=True)
            if piece.tensor == route.tensor and _inside(box, piece.box)
        ]
        assert held, f"{route} is not what its sender holds"
        piece, data = held[0]
        sent = data[_slices(box, piece.box)]
        for receiver in route.receivers:
            actor = receiver - len(sources)
            wanted = [
                index
                for index, piece in enumerate(destinations[actor].pieces)
                if piece.tensor == route.tensor and piece.dtype == route.dtype and _inside(box, piece.box)
            ]
            assert wanted, f"{route} is not what actor {receiver} wants"
            for index in wanted:
                where = _slices(box, destinations[actor].pieces[index].box)
                arrived[actor][index][where] = sent
                writes[actor][index][where] += 1

    for actor, each in enumerate(destinations):
        for index, piece in enumerate(each.pieces):
            written = writes[actor][index]
            assert (written == 1).all(), f"writes of {piece} on destination {actor}: {written}"
            assert (arrived[actor][index] == whole[piece.tensor][_slices(piece.box)]).all()


def check_dtypes(routes: Sequence[Route], sources: Sequence[Layout]) -> None:
    """Compare element by element: the dtype it is sent from is the best in which any source holds it."""
    shapes = {piece.tensor: piece.global_shape for each in sources for piece in each.pieces}
    best = {
        (tensor, wanted): np.zeros(shapes[tensor], np.int64)
        for tensor, wanted in {(route.tensor, route.dtype) for route in routes}
    }
    for (tensor, wanted), ranks in best.items():
        for piece in (piece for each in sources for piece in each.pieces if piece.tensor == tensor):
            where = _slices(piece.box)
            ranks[where] = np.maximum(ranks[where], _rank(piece.dtype, wanted))

    for route in routes:
        box = Box(route.offset, route.extent)
        sent = max(
            _rank(piece.dtype, route.dtype)
            for piece in sources[route.sender].pieces
            if piece.tensor == route.tensor and _inside(box, piece.box)
        )
        assert (best[route.tensor, route.dtype][_slices(box)] == sent).all(), f"{route} is not sent from the best dtype"


def _rank(dtype: str, wanted: str) -> int:
    return 100 if dtype == wanted else ITEMSIZES[dtype]


def _slices(box: Box, inside: Box | None = None) -> tuple[slice, ...]:
    base = inside.offset if inside is not None else (0,) * len(box.offset)
    return tuple(slice(a - b, a - b + n) for a, b, n in zip(box.offset, base, box.extent, strict=True))


def _inside(box: Box, other: Box) -> bool:
    return all(
        b <= a and a + n <= b + m for a, n, b, m in zip(box.offset, box.extent, other.offset, other.extent, strict=True)
    )


def lines(plan: ReshardPlan) -> list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return (sender, receivers, offset, extent) of each route."""
    return [(route.sender, route.receivers, route.offset, route.extent) for route in plan.routes]


class Kit:
    """What the tests of this folder share."""

    layout = staticmethod(layout)
    split = staticmethod(split)
    apply_routes: Callable[..., None] = staticmethod(apply_routes)
    check_dtypes: Callable[..., None] = staticmethod(check_dtypes)
    lines = staticmethod(lines)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit
