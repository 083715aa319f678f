"""Actor classes of the integration tests: what a user might write."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from wavecast.runtime import Layout, Shard, TransferWorker
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.transfer.memory import as_bits


def weights() -> Weights:
    return Weights(seed=11)


class PoolActor(DemoActor):
    """A demo actor that can be given something else to hold, and told to misbehave."""

    def __init__(self) -> None:
        super().__init__(Layout(()), weights(), "cpu")
        self.failure = ""
        self.frozen: tuple[str, ...] = ()
        self.hook_calls = 0
        self.extra: list[Shard] = []

    def hold(self, layout: Layout, new_weights: Weights) -> None:
        DemoActor.__init__(self, layout, new_weights, "cpu")
        self.failure = ""
        self.frozen = ()
        self.hook_calls = 0
        self.extra = []
        self.spoil()

    def start_over(self, layout: Layout, new_weights: Weights) -> None:
        """Be a new actor to every group: what an earlier test brought this one to is nobody's version."""
        vars(self).pop("_wavecast_agent", None)
        self.hold(layout, new_weights)

    def held_layout(self) -> Layout:
        return Layout(tuple(piece for piece, _ in self._held))

    def own_weights(self) -> Weights:
        return self._weights

    def transfer_shards(self) -> list[Shard]:
        self.hook_calls += 1
        if self.failure:
            raise ValueError(self.failure)

        held = [replace(shard, trainable=shard.name not in self.frozen) for shard in super().transfer_shards()]
        return [*held, *self.extra]

    def fail_with(self, message: str) -> None:
        self.failure = message

    def calls(self) -> int:
        return self.hook_calls

    def set_value(self, name: str, value: float) -> None:
        """Set the first element of a tensor."""
        for piece, view in self._held:
            if piece.tensor == name:
                view.view(-1)[0] = value

    def freeze(self, *names: str) -> None:
        """Train on without the tensors ``names``."""
        self.frozen = names

    def move_storage(self) -> None:
        """Put every tensor somewhere else in memory, as an offload and reload does."""
        self._held = [(piece, view.clone()) for piece, view in self._held]

    def transpose_storage(self) -> None:
        """Keep every matrix in column order: the views are not contiguous any more."""
        self._held = [(piece, view.t().contiguous().t() if view.dim() == 2 else view) for piece, view in self._held]

    def bits(self, name: str) -> list[int]:
        return [
            int(value) for piece, view in self._held if piece.tensor == name for value in as_bits(view).flatten()[:8]
        ]

    def process_id(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Stop this process as SIGSTOP does, from within: the call never returns."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def busy(self, seconds: float) -> None:
        """Hold the actor's only thread, as a long method of the user does."""
        time.sleep(seconds)

    def threads(self) -> int:
        return len(os.listdir("/proc/self/task"))

    def open_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))


class ThreadedActor(PoolActor):
    """Started with ``max_concurrency``: requests arrive on several threads."""


class AsyncActor(PoolActor):
    """A coroutine method makes this an asyncio actor."""

    ticks = 0

    async def tick(self) -> int:
        self.ticks += 1
        return self.ticks


class Plain:
    """Mixes in nothing."""

    def transfer_shards(self) -> Sequence[Shard]:
        return []


class OneTensor(TransferWorker):
    """The least a user writes."""

    def __init__(self, values: list[float], dtype: str, offset: int, size: int) -> None:
        self.tensor = torch.tensor(values, dtype=getattr(torch, dtype))
        self.offset = offset
        self.size = size

    def transfer_shards(self) -> list[Shard]:
        return [Shard("weight", self.tensor, (self.offset,), (self.size,))]

    def values(self) -> list[float]:
        return [float(value) for value in self.tensor]


class NamedTensors(TransferWorker):
    """Vectors under names of its own, each held whole."""

    def __init__(self, values: dict[str, list[float]]) -> None:
        self.tensors = {name: torch.tensor(row) for name, row in values.items()}

    def transfer_shards(self) -> list[Shard]:
        return [Shard(name, tensor, (0,), tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def add(self, number: float) -> None:
        for tensor in self.tensors.values():
            tensor.add_(number)

    def values(self) -> dict[str, list[float]]:
        return {name: [float(value) for value in tensor] for name, tensor in self.tensors.items()}
