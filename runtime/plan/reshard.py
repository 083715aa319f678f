"""From layouts to routes: the plan of a transfer, with proof that it covers what the destinations want."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.plan.balance import Demand, Share, choose_senders
from wavecast.runtime.plan.collector import paused_collector
from wavecast.runtime.plan.cover import Cell, cover_tensor
from wavecast.runtime.plan.pairs import require_pairs
from wavecast.runtime.plan.placement import Holding, Placements, place_tensors
from wavecast.runtime.plan.route import Route

__all__ = ("ReshardPlan", "plan_reshard", "routes_digest")


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """
    Everything that has to travel, and between whom.

    :ivar routes: in the order in which the destinations name their tensors; parts of a tensor in row-major order
    :ivar sources: how many source actors there are, numbered from 0
    :ivar destinations: how many destination actors there are, numbered from ``sources``
    :ivar nbytes: bytes delivered: each route's, once for every receiver
    :ivar pieces: pieces in all layouts of both sides
    :ivar digest: SHA-256 of the routes (see :func:`routes_digest`), in hexadecimal
    """

    routes: tuple[Route, ...]
    sources: int
    destinations: int
    nbytes: int
    pieces: int
    digest: str

    @property
    def actors(self) -> int:
        """How many actors there are on both sides."""
        return self.sources + self.destinations

    def sent_nbytes(self) -> tuple[int, ...]:
        """Return the bytes that leave each source actor, a route counted once whatever its receivers."""
        sent = [0] * self.sources
        for route in self.routes:
            sent[route.sender] += route.nbytes

        return tuple(sent)

    def received_nbytes(self) -> tuple[int, ...]:
        """Return the bytes that reach each destination actor."""
        received = [0] * self.actors
        for route in self.routes:
            for actor in route.receivers:
                received[actor] += route.nbytes

        return tuple(received[self.sources :])

    def by_sender(self) -> dict[int, tuple[Route, ...]]:
        """Return the routes of each source actor that sends any, in plan order."""
        found: dict[int, list[Route]] = {}
        for route in self.routes:
            found.setdefault(route.sender, []).append(route)

        return {actor: tuple(found[actor]) for actor in sorted(found)}

    def by_receiver(self) -> dict[int, tuple[Route, ...]]:
        """Return the routes of each destination actor that wants any, in plan order."""
        found: dict[int, list[Route]] = {}
        for route in self.routes:
            for actor in route.receivers:
                found.setdefault(actor, []).append(route)

        return {actor: tuple(found[actor]) for actor in sorted(found)}


def plan_reshard(
    src_layouts: Sequence[Layout], dst_layouts: Sequence[Layout], *, allow_missing: Collection[str] = ()
) -> ReshardPlan:
    """
    Return the routes that bring every destination piece its elements, each exactly once.

    Actors are numbered in the order given: sources from 0, destinations (all replicas in one list) after them.
    Sources may overlap in any way and hold tensors that nobody wants; destinations of one tensor may differ in dtype,
    the sender casts. Equal boxes of one destination actor (tied copies) share a route, as do equal boxes of several.

    Pure and deterministic. Geometry is worked out once for each different pair of placements of a tensor, then
    stamped on all tensors placed so: time and memory are linear in the pieces of the different layouts and in the
    routes.

    :param allow_missing: tensors that destinations may want without any source having them; they are left out
    :raises ConfigError: when ``allow_missing`` is no collection of names
    :raises LayoutError: naming tensor, box and actors: a tensor or elements that no source holds, global shapes that
        disagree, dtypes that cannot be cast, pieces of one destination actor that overlap without being equal, a
        weight in float8 without its scales (``X`` and ``X_scale_inv``) or one of the two without the other, and what a
        destination computes
    """
    if isinstance(allow_missing, str) or not isinstance(allow_missing, Collection):
        raise ConfigError(f"allow_missing={allow_missing!r} must be a collection of names")

    sources = _require_layouts("source", src_layouts, first_actor=0)
    destinations = _require_layouts("destination", dst_layouts, first_actor=len(sources))
    with paused_collector():
        return _plan(sources, destinations, frozenset(allow_missing))


def _require_layouts(side: str, layouts: object, *, first_actor: int) -> tuple[Layout, ...]:
    """
    Return ``layouts`` as a tuple.

    :raises LayoutError: naming what is no sequence, or no layout
    """
    if not isinstance(layouts, Iterable):
        raise LayoutError(f"the {side} layouts are a {type(layouts).__name__}, not a layout for each actor")

    found = tuple(layouts)
    for actor, layout in enumerate(found, first_actor):
        if not isinstance(layout, Layout):
            raise LayoutError(f"the layout of actor {actor} is a {type(layout).__name__}, not what describe() returns")

    return found


def _plan(src_layouts: Sequence[Layout], dst_layouts: Sequence[Layout], allow_missing: frozenset[str]) -> ReshardPlan:
    sources = place_tensors(src_layouts, first_actor=0)
    destinations = place_tensors(dst_layouts, first_actor=len(src_layouts))
    _require_memory(dst_layouts, sources, first_actor=len(src_layouts))
    require_pairs(sources, destinations, allow_missing)
    templates, order = _make_templates(sources, destinations, allow_missing)

    demands = [
        Demand(cell.holders, cell.receivers, cell.nbytes, _rows(cell), len(template.tensors))
        for template in templates
        for cell in template.cells
    ]
    places = [layout.place for layout in (*src_layouts, *dst_layouts)]
    shares = iter(choose_senders(demands, places))
    for template in templates:
        template.shares = [next(shares) for _ in template.cells]

    routes = tuple(_stamp(order))
    return ReshardPlan(
        routes=routes,
        sources=len(src_layouts),
        destinations=len(dst_layouts),
        nbytes=sum(route.nbytes * len(route.receivers) for route in routes),
        pieces=sources.npieces + destinations.npieces,
        digest=routes_digest(routes),
    )


def routes_digest(routes: Iterable[Route]) -> str:
    """
    Return the SHA-256 of ``routes`` in their order, in hexadecimal.

    A line of ASCII decimals a route and its name in UTF-8: the same on any machine and for any hash seed.
    """
    sha = hashlib.sha256()
    known: dict[tuple[object, ...], str] = {}
    lines: list[str] = []
    for route in routes:
        shape = (route.receivers, route.offset, route.extent, route.dtype)
        text = known.get(shape)
        if text is None:
            text = known[shape] = f"{route.receivers} {route.offset} {route.extent} {route.dtype}"

        lines.append(f"{route.sender} {text} {len(route.tensor)} {route.tensor}\n")
        if len(lines) == 4096:
            sha.update("".join(lines).encode())
            lines.clear()

    sha.update("".join(lines).encode())
    return sha.hexdigest()


@dataclass(slots=True, eq=False)
class _Template:
    """Tensors placed alike, and what their routes have in common; ``shares[cell][tensor]`` once senders are chosen."""

    cells: tuple[Cell, ...]
    tensors: list[str] = field(default_factory=list)
    shares: list[list[Share]] = field(default_factory=list)


def _make_templates(
    sources: Placements, destinations: Placements, allow_missing: frozenset[str]
) -> tuple[list[_Template], list[tuple[_Template, int]]]:
    """Return the templates, and for each tensor in the destinations' order its template and its number there."""
    templates: dict[tuple[tuple[int, ...], tuple[int, ...]], _Template] = {}
    order: list[tuple[_Template, int]] = []
    for tensor, wanted in destinations.tensors.items():
        held = sources.tensors.get(tensor)
        if held is None:
            if tensor not in allow_missing:
                _check_empty(tensor, [destinations.holdings[index] for index in wanted])

            continue

        template = templates.get((held, wanted))
        if template is None:
            cells = cover_tensor(
                tensor,
                [sources.holdings[index] for index in held],
                [destinations.holdings[index] for index in wanted],
            )
            template = templates[held, wanted] = _Template(cells)

        order.append((template, len(template.tensors)))
        template.tensors.append(tensor)

    return list(templates.values()), order


def _require_memory(dst_layouts: Sequence[Layout], sources: Placements, *, first_actor: int) -> None:
    """Refuse to send what a destination works out as it is read."""
    for actor, layout in enumerate(dst_layouts, first_actor):
        for name in layout.computed:
            if name in sources.tensors:
                raise LayoutError(
                    f"{name!r} is computed at a destination: it can be read only", tensor=name, actors=(actor,)
                )


def _check_empty(tensor: str, wanted: Sequence[Holding]) -> None:
    """Refuse a tensor without a source, unless all that is wanted of it is nothing."""
    lacking = [holding for holding in wanted if holding.box.numel]
    if not lacking:
        return

    actors = tuple(sorted({actor for holding in lacking for actor in holding.actors}))
    box = lacking[0].box
    raise LayoutError(
        f"no source holds {tensor!r}, which actors {actors} want, the first of them at offset {box.offset}, "
        f"extent {box.extent}",
        tensor=tensor,
        actors=actors,
    )


def _stamp(order: list[tuple[_Template, int]]) -> Iterable[Route]:
    for template, number in order:
        tensor = template.tensors[number]
        for cell, shares in zip(template.cells, template.shares, strict=True):
            share = shares[number]
            box = cell.box
            if len(share) == 1:
                yield Route(share[0][0], cell.receivers, tensor, box.offset, box.extent, cell.dtype, cell.nbytes)
                continue

            whole = Route(share[0][0], cell.receivers, tensor, box.offset, box.extent, cell.dtype, cell.nbytes)
            start = 0
            for sender, rows in share:
                yield replace(whole.cut(box.rows(start, start + rows, dim=_row_dim(cell))), sender=sender)
                start += rows


def _row_dim(cell: Cell) -> int:
    """Return the dim along which a cell is cut: its first of more than one index, so that parts are contiguous."""
    return next((dim for dim, size in enumerate(cell.box.extent) if size > 1), 0)


def _rows(cell: Cell) -> int:
    return cell.box.extent[_row_dim(cell)] if cell.box.extent else 1
