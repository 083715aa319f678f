"""Adapters brought together from the ranks of a process group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.lora.adapter import Adapter, each_box, factor_name
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import assembled, elements

__all__ = ("gathered",)

#: Each shard's bytes start at a multiple of this, so that they can be viewed in their own dtype.
_ALIGNMENT = 16


def gathered(adapters: Iterable[Adapter], *, group: torch.distributed.ProcessGroup | None = None) -> list[Adapter]:
    """
    Return the adapters with all of A and B, brought together from the ranks of ``group``.

    A collective: every rank of the group calls it at once, with adapters on the same matrices. For modules whose
    parallel cut leaves an actor without parts of A or B that its base needs: FSDP, and Megatron's adapters whose
    inner side is cut too. Costs the adapters' bytes times the ranks, for a moment.

    :raises LayoutError: when the ranks together lack a part
    """
    import torch.distributed as dist

    own = list(adapters)
    held = [shard for each in own for shard in (*each.a, *each.b)]
    told: list[list[_Told]] = [[] for _ in range(dist.get_world_size(group))]
    mine = [_Told(shard.name, shard.box, shard.global_shape, shard.view.dtype) for shard in held]
    dist.all_gather_object(told, mine, group=group)
    found: dict[str, list[Shard]] = {}
    for shards, data in zip(told, _all_bytes(held, told, group), strict=True):
        at = 0
        for name, box, shape, dtype in shards:
            stop = at + box.numel * dtype.itemsize
            found.setdefault(name, []).append(
                Shard(name, data[at:stop].view(dtype).view(box.extent), box.offset, shape)
            )
            at = stop + -stop % _ALIGNMENT

    return [replace(each, a=_whole(each, found, "A"), b=_whole(each, found, "B")) for each in own]


class _Told(NamedTuple):
    """What the ranks tell each other of a shard."""

    name: str
    box: Box
    global_shape: tuple[int, ...]
    dtype: torch.dtype


def _all_bytes(
    held: list[Shard], told: list[list[_Told]], group: torch.distributed.ProcessGroup | None
) -> list[torch.Tensor]:
    """Return the bytes of each rank's shards, laid end to end, each from a multiple of ``_ALIGNMENT``."""
    import torch.distributed as dist

    longest = 0
    for shards in told:
        nbytes = [shard.box.numel * shard.dtype.itemsize for shard in shards]
        longest = max(longest, sum(each + -each % _ALIGNMENT for each in nbytes))

    on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    at = 0
    for shard in held:
        data = elements(shard.view, Box((0,) * len(shard.offset), tuple(shard.view.shape)))
        flat = data.contiguous().view(-1).view(torch.uint8)
        mine[at : at + flat.numel()] = flat
        at += flat.numel() + -flat.numel() % _ALIGNMENT

    parts = [torch.empty_like(mine) for _ in told]
    dist.all_gather(parts, mine, group=group)
    home = held[0].view.device if held else device
    return [part.to(home) for part in parts]


def _whole(each: Adapter, found: dict[str, list[Shard]], factor: str) -> tuple[Shard, ...]:
    name = factor_name(each.name, factor)
    shards = each_box(found.get(name, ()))
    if not shards:
        raise LayoutError(f"no rank of the group holds {name!r}", tensor=each.name)

    shape = shards[0].global_shape
    return (Shard(name, assembled(name, shards, Box((0, 0), shape)), (0, 0), shape),)
