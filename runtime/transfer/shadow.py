"""A second copy of a destination's shards: written during a sync, copied over the weights at its commit."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from wavecast.runtime.layout.shard import FixedShards, Shard
from wavecast.runtime.transfer.memory import Memory, as_bits

__all__ = ("Shadow",)


class Shadow:
    """
    Holds as much memory again as the shards do; views of the same elements share theirs.

    The copy is made without content: a sync writes every element of the tensors it flips.

    :param shards: the live ones
    :ivar memory: over the second copy; its signature is that of the live shards
    :ivar nbytes: of the second copy
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._key = _key(shards)
        copies: dict[object, torch.Tensor] = {}
        shadows: list[Shard] = []
        for shard in shards:
            if isinstance(shard.view, torch.Tensor):
                place = _place(shard.view)
                if place not in copies:
                    # Keeps the strides of a dense view, with which a flip is one fused copy.
                    copies[place] = torch.empty_like(shard.view.detach())

                shard = replace(shard, view=copies[place])

            shadows.append(shard)

        # Nobody else has these tensors: none of them moves.
        self.memory = Memory(FixedShards(shadows))
        self.nbytes = sum(copy.numel() * copy.element_size() for copy in copies.values())

    def fits(self, shards: Sequence[Shard]) -> bool:
        """Tell whether ``shards`` are laid out as those it was made for, wherever they are now."""
        return self._key == _key(shards)

    @torch.no_grad()
    def flip(self, shards: Sequence[Shard], names: Collection[str]) -> float:
        """
        Copy what is held of the tensors ``names`` over the live shards, bit for bit; return the seconds it took.

        On the device of the shards, after what their current stream has been given to do; done when this returns.
        """
        start = time.perf_counter()
        pairs: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        for live, shadow in zip(shards, self.memory.shards, strict=True):
            if live.name in names and isinstance(live.view, torch.Tensor) and isinstance(shadow.view, torch.Tensor):
                pairs.setdefault(_place(live.view), (as_bits(live.view.detach()), as_bits(shadow.view)))

        fused: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in pairs.values():
            if target.stride() == source.stride():
                targets, sources = fused.setdefault(target.dtype, ([], []))
                targets.append(target)
                sources.append(source)
            else:
                target.copy_(source, non_blocking=True)

        for targets, sources in fused.values():
            torch._foreach_copy_(targets, sources, non_blocking=True)

        if self.memory.device.type == "cuda":
            torch.cuda.current_stream(self.memory.device).synchronize()

        return time.perf_counter() - start


def _place(view: torch.Tensor) -> tuple[object, ...]:
    """Return what two views of the very same elements have in common. Empty ones have no address of their own."""
    return (view.data_ptr() if view.numel() else None, tuple(view.shape), view.stride(), view.dtype)


def _key(shards: Sequence[Shard]) -> tuple[object, ...]:
    """Sum up the shards and which of them share memory, but not where that is."""
    first: dict[object, int] = {}
    return tuple(
        (
            shard.name,
            shard.offset,
            shard.global_shape,
            shard.trainable,
            shard.view.shape,
            shard.view.dtype,
            shard.view.device,
            *(
                (shard.view.stride(), first.setdefault(_place(shard.view), index))
                if isinstance(shard.view, torch.Tensor)
                else ()
            ),
        )
        for index, shard in enumerate(shards)
    )
