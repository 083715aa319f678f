"""A whole sync of shards that a test has made itself, through a group over actors of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import torch

from tests.runtime.local_actors import LocalActor
from tests.runtime.transfer.crew import Wires
from wavecast.runtime import ModelGroup, ParameterSyncGroup, Shard, SyncOptions, TransferWorker
from wavecast.runtime.layout.views import NameMap
from wavecast.runtime.report import SyncReport
from wavecast.runtime.selection import Only

__all__ = ("Held", "held", "sync")

#: An actor's shards, or what makes them anew at each sync.
Held = Sequence[Shard] | Callable[[], Sequence[Shard]]


class Keeper(TransferWorker):
    """Holds what it is given."""

    def __init__(self, shards: Held) -> None:
        self.shards = shards

    def transfer_shards(self) -> Sequence[Shard]:
        return self.shards() if callable(self.shards) else self.shards


def held(name: str, view: torch.Tensor) -> Shard:
    """A tensor held whole."""
    return Shard(name, view, (0,) * view.dim(), tuple(view.shape))


def sync(
    sources: Sequence[Held],
    *replicas: Sequence[Held],
    options: SyncOptions | None = None,
    source_names: NameMap | None = None,
    destination_names: NameMap | None = None,
    only: Only = None,
    times: int = 1,
) -> SyncReport:
    """Sync ``times`` times, and return the last report. The test needs the fixture ``local``."""
    wires = Wires()

    async def go() -> SyncReport:
        trainers = [LocalActor(Keeper(shards), wires) for shards in sources]
        engines = [[LocalActor(Keeper(shards), wires) for shards in replica] for replica in replicas]
        group = ParameterSyncGroup(
            ModelGroup("policy", [trainers], names=source_names),
            ModelGroup("rollout", engines, names=destination_names),
            options or SyncOptions(deadline_seconds=15),
        )
        async with group:
            for _ in range(times - 1):
                await group.sync(only=only)

            return await group.sync(only=only)

    return asyncio.run(go())
