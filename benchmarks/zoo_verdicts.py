"""
What two other systems say of a pair of layouts, by their own published or observed rules.

The seed's rules are read off ChatLearn's ``ParameterSyncGroup`` at commit 07a42255, by reading and by running it with
stand-ins for its actors. M2N's are the limits in the release notes of NVIDIA's ``nccl-extensions``, applied here in its
favour: tensor by tensor, to logical tensors, as though fused parameters came apart for nothing. Neither was run on
these layouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

from zoo_cases import Case

from wavecast.runtime import Layout, MeshSpec
from wavecast.runtime.layout.box import Box

__all__ = ("m2n_says", "seed_says")


def seed_says(case: Case) -> str:
    """Return what the seed does with a pair of meshes."""
    source, destination = case.source.mesh, case.destination.mesh
    if source is None or destination is None:
        return "out of reach: maps ranks of Megatron's axes only"

    refusal = _seed_refuses(source, destination)
    if refusal is not None:
        return f"refuses: {refusal}"

    fault = _seed_fails(case, source, destination, case.destination.replicas)
    return "serves" if fault is None else f"runs, {fault}"


def _seed_refuses(source: MeshSpec, destination: MeshSpec) -> str | None:
    if destination.tp < source.tp:
        return "the destination's tp is smaller"

    if destination.tp // source.tp > 1 and destination.tp % source.tp:
        return "the destination's tp is no multiple"

    if source.pp % destination.pp:
        return "the destination's pp does not divide the source's"

    if destination.ep > source.ep:
        return "the destination's ep is larger"

    return None


def _seed_fails(case: Case, source: MeshSpec, destination: MeshSpec, replicas: int) -> str | None:
    """Return what goes wrong unseen, or hangs, where it has been shown or read."""
    times = destination.tp // source.tp
    if destination.tp % source.tp:
        return f"but ranks beyond the first {source.tp} keep stale weights"

    if case.dtype.itemsize != 2:
        return "but receives into buffers of another dtype"

    moe = case.config.moe is not None
    if times > 1 and moe and source.ep > 1 and destination.tp * destination.ep != source.tp * source.ep:
        return "but never sends the routed experts"

    if times > 1 and (source.world_size % times):
        return "but ranks get another rank's slice"

    if times > 1 and (source.tp, destination.tp, replicas) in {(1, 2, 3), (2, 4, 3)}:
        return "but drops pairs: some ranks keep stale weights"

    if times > 1 and case.config.num_kv_heads // source.tp >= 2 * times:
        return "but slices key and value heads wrongly"

    if times > 1 and source.pp > 2 and replicas > 1:
        return "but may hang: senders reach the same receivers in any order"

    return None


def m2n_says(sources: Sequence[Layout], destinations: Sequence[Layout], *, colocated: bool) -> str:
    """Return which of M2N's limits the pair breaks first."""
    if colocated:
        return "refuses: source and destination share devices"

    dtypes = [
        {piece.tensor: piece.dtype for layout in side for piece in layout.pieces} for side in (sources, destinations)
    ]
    if any(dtype != dtypes[0].get(tensor, dtype) for tensor, dtype in dtypes[1].items()):
        return "refuses: one dtype on both sides"

    found = {reason for side in (sources, destinations) for reason in _m2n_limits(side)}
    order = ("not one box a rank", "two sharded axes", "uneven shards", "shards that overlap")
    return next((f"refuses: {reason}" for reason in order if reason in found), "serves")


def _m2n_limits(side: Sequence[Layout]) -> Iterator[str]:
    held: dict[str, dict[Box, None]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for layout in side:
        own: dict[str, dict[Box, None]] = {}
        for piece in layout.pieces:
            own.setdefault(piece.tensor, {})[piece.box] = None
            shapes[piece.tensor] = piece.global_shape

        for tensor, boxes in own.items():
            around = _around(boxes)
            held.setdefault(tensor, {})[around] = None
            if sum(box.numel for box in boxes) != around.numel:
                yield "not one box a rank"

    for tensor, boxes in held.items():
        shape = shapes[tensor]
        cut = {dim for box in boxes for dim, (n, size) in enumerate(zip(box.extent, shape, strict=True)) if n != size}
        if len(cut) > 1:
            yield "two sharded axes"

        if len({box.extent for box in boxes}) > 1:
            yield "uneven shards"

        if any(a.intersect(b) is not None for a, b in combinations(boxes, 2)):
            yield "shards that overlap"


def _around(boxes: Iterable[Box]) -> Box:
    """Return the smallest box that holds all of ``boxes``: runs that follow each other are one."""
    starts = list(zip(*(box.offset for box in boxes), strict=True))
    stops = list(zip(*((a + n for a, n in zip(box.offset, box.extent, strict=True)) for box in boxes), strict=True))
    offset = tuple(map(min, starts))
    return Box(offset, tuple(max(ends) - start for ends, start in zip(stops, offset, strict=True)))
