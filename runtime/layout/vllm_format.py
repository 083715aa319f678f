"""The words in which an inference engine of vLLM's make is described: a rank, a format, a parameter and its slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.box import Box

__all__ = ("EngineFormat", "EngineParameter", "EngineRank", "Slot", "VLLM")


@dataclass(frozen=True, slots=True)
class EngineRank:
    """
    Where one worker sits in its engine.

    Data parallelism here is the engine's own: its ranks repeat the dense part and share the experts.

    :ivar tp_rank: index along tensor parallelism
    :ivar tp_size: ranks that share one dense layer
    :ivar pp_rank: pipeline stage
    :ivar pp_size: pipeline stages
    :ivar dp_rank: index along data parallelism
    :ivar dp_size: repetitions of the dense part
    :ivar expert_parallel: the ``tp_size * dp_size`` ranks of a stage share out whole experts; otherwise each has a
        slice of every expert
    :raises ConfigError: for a size below 1, a rank outside its size, or a value of another type
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if type(rank) is not int or type(size) is not int:
                raise ConfigError(f"{axis}_rank={rank!r} and {axis}_size={size!r} must be integers")

            if not 0 <= rank < size:
                raise ConfigError(f"{axis}_rank={rank} is not in an engine of {axis}_size={size}")

        _require_bool(expert_parallel=self.expert_parallel)

    @property
    def moe_rank(self) -> int:
        """The rank among those that share the experts."""
        return self.dp_rank * self.tp_size + self.tp_rank

    @property
    def moe_size(self) -> int:
        """How many ranks share the experts."""
        return self.dp_size * self.tp_size


@dataclass(frozen=True, slots=True)
class EngineFormat:
    """
    What an engine may choose about its parameters; the defaults are vLLM's.

    :ivar vocab_padding: the vocabulary is padded to a multiple of this, then cut evenly
    :ivar pp_layers: decoder layers of each pipeline stage in turn (vLLM: ``VLLM_PP_LAYER_PARTITION``); by default as
        even as possible, with the remainder to the last stages but one
    :ivar expert_placement: with expert parallelism, whether a rank has consecutive experts or every n-th
    :ivar expert_slots: for each decoder layer of the model the experts in this rank's slots in turn (none where it has
        none), where an engine balances them in its own way, with redundant ones too; overrides ``expert_placement``
    :ivar gate_first: ``w13_weight`` holds gate above up; ``False`` where the kernel wants up above gate (vLLM with
        FlashInfer's CUTLASS experts)
    :ivar scale_block: rows and columns of the blocks that share a scale, where the linear layers and experts are
        quantised: their weights are float8, and each has a ``weight_scale_inv`` (experts: ``w13_weight_scale_inv``,
        ``w2_weight_scale_inv``) of one float32 a block; ``None`` where they are not
    :ivar whole_shared_experts: DeepSeek's shared experts are whole on every rank; by default what vLLM does: with
        expert parallelism and both tensor and data parallelism (its sequence-parallel experts)
    :raises ConfigError: for sizes that are no positive integers, an unknown placement, and values of another type
    """

    vocab_padding: int = 64
    pp_layers: tuple[int, ...] | None = None
    expert_placement: Literal["linear", "round_robin"] = "linear"
    expert_slots: tuple[tuple[int, ...], ...] | None = None
    gate_first: bool = True
    scale_block: tuple[int, int] | None = None
    whole_shared_experts: bool | None = None

    def __post_init__(self) -> None:
        if self.expert_placement not in ("linear", "round_robin"):
            raise ConfigError(f'expert_placement={self.expert_placement!r} must be "linear" or "round_robin"')

        if not _is_positive(self.vocab_padding):
            raise ConfigError(f"vocab_padding={self.vocab_padding!r} must be a positive integer")

        _require_bool(gate_first=self.gate_first)
        if self.whole_shared_experts is not None:
            _require_bool(whole_shared_experts=self.whole_shared_experts)

        if self.scale_block is not None:
            block = _tuple("scale_block", self.scale_block, _BLOCK)
            if len(block) != 2 or not all(map(_is_positive, block)):
                raise ConfigError(f"scale_block={block!r} must be {_BLOCK}")

            object.__setattr__(self, "scale_block", block)

        if self.pp_layers is not None:
            object.__setattr__(self, "pp_layers", _counts("pp_layers", self.pp_layers, _LAYERS))

        if self.expert_slots is not None:
            slots = _tuple("expert_slots", self.expert_slots, _SLOTS)
            object.__setattr__(self, "expert_slots", tuple(_counts("expert_slots", each, _SLOTS) for each in slots))


_BLOCK = "two positive integers, rows and columns"
_LAYERS = "counts of layers, one a stage"
_SLOTS = "for each decoder layer the numbers of the experts in its slots"


def _require_bool(**values: object) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise ConfigError(f"{name}={value!r} must be True or False")


def _tuple(name: str, value: object, wanted: str) -> tuple[object, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"{name}={value!r} must be {wanted}")

    return tuple(value)


def _counts(name: str, value: object, wanted: str) -> tuple[object, ...]:
    counts = _tuple(name, value, wanted)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ConfigError(f"{name}={value!r} must be {wanted}")

    return counts


def _is_positive(size: object) -> bool:
    return type(size) is int and size > 0


#: vLLM's own choices.
VLLM = EngineFormat()


@dataclass(frozen=True, slots=True)
class Slot:
    """
    The part of a logical tensor that a parameter holds, and where.

    :ivar tensor: the logical tensor's name
    :ivar global_shape: its shape
    :ivar box: the elements held
    :ivar start: where the first of them is in the parameter, one number a dim of the parameter; a parameter with more
        dims than the logical tensor is indexed along the first ones
    """

    tensor: str
    global_shape: tuple[int, ...]
    box: Box
    start: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineParameter:
    """
    A parameter as the engine's module names it.

    :ivar name: in the engine's module
    :ivar shape: on this rank
    :ivar slots: what is in it; the rest, if any, is padding
    :ivar dtype: the dtype it keeps whatever the model's, or ``None``
    """

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    dtype: str | None = None
