"""What an adapter adds to a logical matrix, and the parts of it that an actor holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.flat import parameter_shards
from wavecast.runtime.layout.shard import Shard

__all__ = ("Adapter", "adapter", "adapter_only", "factor_name", "each_box")


@dataclass(frozen=True, slots=True)
class Adapter:
    """
    What is added to one logical matrix: ``scale * B @ A``, of which this actor holds some rows and columns.

    :ivar name: the base matrix's logical name, such as ``"model.layers.0.self_attn.q_proj.weight"``
    :ivar a: shards of A, of shape (rank, columns of the base)
    :ivar b: shards of B, of shape (rows of the base, rank)
    :ivar scale: such as alpha / rank
    :ivar transposed: the base is stored the other way round: what is added to it is the transposed product
    """

    name: str
    a: tuple[Shard, ...]
    b: tuple[Shard, ...]
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        """
        The inner size of the product.

        :raises LayoutError: when this actor has no part of A nor B to tell
        """
        for parts, dim in ((self.a, 0), (self.b, 1)):
            if parts:
                return parts[0].global_shape[dim]

        raise LayoutError(f"this actor has no part of the adapter on {self.name!r}", tensor=self.name)


def adapter(
    name: str,
    a: torch.Tensor | Sequence[Shard],
    b: torch.Tensor | Sequence[Shard],
    *,
    scale: float,
    transposed: bool = False,
) -> Adapter:
    """
    Return an adapter on the logical matrix ``name``.

    A and B may be whole tensors, DTensors, partitions of ZeRO-3, or shards. A column-parallel base needs its own rows
    of B and all of A, a row-parallel one its own columns of A and all of B. They are named as PEFT names those of
    linear layers in its checkpoints.

    :raises LayoutError: when A or B has not two dims, or they disagree on the rank, or ``scale`` is no finite number
    """
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        raise LayoutError(f"the scale of the adapter on {name!r} is {scale!r}, it must be a finite number", tensor=name)

    made = Adapter(name, _factor(name, "A", a), _factor(name, "B", b), scale, transposed)
    ranks = {shard.global_shape[0] for shard in made.a} | {shard.global_shape[1] for shard in made.b}
    if len(ranks) > 1:
        raise LayoutError(f"A and B of the adapter on {name!r} disagree on the rank: {sorted(ranks)}", tensor=name)

    return made


def adapter_only(adapters: Iterable[Adapter], *, prefix: str = "base_model.model.") -> list[Shard]:
    """
    Return A and B of ``adapters`` as logical tensors under the names of a PEFT checkpoint: for engines that hold both.

    The scale is not sent: it belongs to the configuration that the engine was given.
    """
    return [
        replace(shard, name=prefix + shard.name)
        for each in adapters
        for shard in (*each_box(each.a), *each_box(each.b))
    ]


def _factor(name: str, factor: str, part: torch.Tensor | Sequence[Shard]) -> tuple[Shard, ...]:
    own = factor_name(name, factor)
    if not isinstance(part, torch.Tensor | Sequence) or isinstance(part, str):
        raise LayoutError(f"{own!r} is a {type(part).__name__}, neither a tensor nor shards", tensor=name)

    held = parameter_shards(own, part) if isinstance(part, torch.Tensor) else [replace(each, name=own) for each in part]
    if any(len(shard.global_shape) != 2 for shard in held):
        raise LayoutError(f"{own!r} is not a matrix", tensor=name)

    return tuple(held)


def factor_name(name: str, factor: str) -> str:
    """Return the name of the factor ``"A"`` or ``"B"`` of the adapter on the logical matrix ``name``."""
    return f"{name.removesuffix('.weight')}.lora_{factor}.weight"


def each_box(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Return the first shard of each box of each tensor."""
    first: dict[tuple[str, Box], Shard] = {}
    for shard in shards:
        first.setdefault((shard.name, shard.box), shard)

    return tuple(first.values())
