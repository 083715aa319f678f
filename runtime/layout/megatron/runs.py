"""How Megatron lays logical tensors side by side in one parameter: query groups, gate and up, latent projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ("Run", "gated", "query_groups", "window")


@dataclass(frozen=True, slots=True)
class Run:
    """
    Consecutive indices along one dim of a parameter that are consecutive in a logical tensor too.

    :ivar name: the logical tensor's, without ``.weight`` or ``.bias``
    :ivar start: the first index in the logical tensor
    :ivar length: how many
    """

    name: str
    start: int
    length: int


def window(runs: Sequence[Run], start: int, stop: int) -> tuple[Run, ...]:
    """Return the part of ``runs``, put in a row, from index ``start`` to ``stop``: what one rank holds of them."""
    held: list[Run] = []
    at = 0
    for run in runs:
        low, high = max(start - at, 0), min(stop - at, run.length)
        if low < high:
            held.append(Run(run.name, run.start + low, high - low))

        at += run.length

    return tuple(held)


def query_groups(query: str, key: str, value: str, *, heads: int, groups: int, head_dim: int) -> tuple[Run, ...]:
    """
    Return the rows of a whole ``linear_qkv``: group by group its query heads, its key head, its value head.

    Tensor parallelism cuts these rows into equal parts, wherever that falls: with more ranks than groups a part may
    hold queries alone, or begin in the middle of a head.
    """
    shared = heads // groups * head_dim
    runs: list[Run] = []
    for group in range(groups):
        runs.append(Run(query, group * shared, shared))
        runs.append(Run(key, group * head_dim, head_dim))
        runs.append(Run(value, group * head_dim, head_dim))

    return tuple(runs)


def gated(gate: str, up: str, *, start: int, length: int, block: int | None = None) -> tuple[Run, ...]:
    """
    Return the rows of one rank's ``linear_fc1``: its ``length`` rows of gate from ``start``, then those of up.

    :param block: where given, gate and up alternate in blocks of so many rows (``moe_mlp_glu_interleave_size``);
        divides ``length``
    """
    size = block or length
    runs: list[Run] = []
    for first in range(start, start + length, size):
        runs.append(Run(gate, first, size))
        runs.append(Run(up, first, size))

    return tuple(runs)
