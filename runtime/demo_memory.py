"""How a demonstration's actor lays out its memory: tensors apart, flat ranges, or an engine's fused parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.flat import flat_shards
from wavecast.runtime.layout.shard import Layout, Shard
from wavecast.runtime.layout.vllm import EngineRank, parameters
from wavecast.runtime.layout.vllm import shards as engine_shards
from wavecast.runtime.transfer.memory import dtype_of

__all__ = ("DemoMemory", "EngineMemory", "FlatMemory", "SeparateMemory")


class DemoMemory(Protocol):
    """What an actor holds, without the memory itself: small, and sent along when the actor starts."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are made."""
        ...

    def allocate(self, device: str) -> list[Shard]:
        """Make the tensors on ``device``, with any content, and return the shards; ``"meta"`` takes no memory."""
        ...


@dataclass(frozen=True, slots=True)
class SeparateMemory:
    """A tensor of its own for each piece of ``layout``."""

    layout: Layout

    @property
    def nbytes(self) -> int:
        return sum(piece.box.numel * itemsize(piece.dtype) for piece in self.layout.pieces)

    def allocate(self, device: str) -> list[Shard]:
        return [
            Shard(
                piece.tensor,
                torch.empty(piece.box.extent, dtype=dtype_of(piece.dtype), device=device),
                piece.box.offset,
                piece.global_shape,
            )
            for piece in self.layout.pieces
        ]


@dataclass(frozen=True, slots=True)
class FlatMemory:
    """
    Ranges of a model whose parameters were laid end to end, as FSDP's flat parameters: one buffer a range.

    :ivar tensors: name and shape of each parameter in turn
    :ivar ranges: first element and the one behind the last of each buffer
    :ivar dtype: of all of them
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    ranges: tuple[tuple[int, int], ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges) * itemsize(self.dtype)

    def allocate(self, device: str) -> list[Shard]:
        found: list[Shard] = []
        for start, stop in self.ranges:
            flat = torch.empty(stop - start, dtype=dtype_of(self.dtype), device=device)
            found.extend(flat_shards(flat, self.tensors, start=start))

        return found


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """The fused parameters of one worker of vLLM's make: query, key and value in one, gate and up, stacked experts."""

    config: ModelConfig
    rank: EngineRank
    dtype: str

    @property
    def nbytes(self) -> int:
        return sum(
            math.prod(claim.shape) * itemsize(claim.dtype or self.dtype) for claim in parameters(self.config, self.rank)
        )

    def allocate(self, device: str) -> list[Shard]:
        named = {
            claim.name: torch.empty(claim.shape, dtype=dtype_of(claim.dtype or self.dtype), device=device)
            for claim in parameters(self.config, self.rank)
        }
        return engine_shards(
            named,
            self.config,
            tp_rank=self.rank.tp_rank,
            tp_size=self.rank.tp_size,
            pp_rank=self.rank.pp_rank,
            pp_size=self.rank.pp_size,
            dp_rank=self.rank.dp_rank,
            dp_size=self.rank.dp_size,
            expert_parallel=self.rank.expert_parallel,
        )
