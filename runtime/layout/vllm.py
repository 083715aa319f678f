"""
Shards of an inference engine's live parameters, for engines of vLLM's make.

The engine's modules merge and cut what a checkpoint holds apart and whole: query, key and value heads in one
``qkv_proj``, gate and up in one ``gate_up_proj``, a rank's experts in ``w13_weight`` and ``w2_weight``, a padded slice
of the vocabulary. Each parameter is therefore a few shards, views into it; nothing is copied. What a parameter holds is
worked out from the model's configuration and the engine's parallel sizes, and held against the live shapes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig, require_config
from wavecast.runtime.layout.shard import Layout, Piece, Shard
from wavecast.runtime.layout.vllm_format import VLLM, EngineFormat, EngineParameter, EngineRank, Slot
from wavecast.runtime.layout.vllm_parameters import alternatives, parameters

if TYPE_CHECKING:
    import torch

__all__ = ("EngineFormat", "EngineParameter", "EngineRank", "Slot", "VLLM", "layout", "parameters", "shards")

#: Parts of names that versions and wrappers put in or leave out, and what they are called here.
_SPELLINGS = (
    (".base_layer.", "."),
    (".experts.routed_experts.", ".experts."),
    (".fused_qkv_a_proj_with_mqa.", ".fused_qkv_a_proj."),
)

#: Parameters of the engine's own that no checkpoint of the model's weights has: scales of its cache.
_OWN = (".attn.q_scale", ".attn.k_scale", ".attn.v_scale", ".attn.prob_scale")

#: How many differences an error spells out.
_SHOWN = 4


def shards(
    named_parameters: Iterable[tuple[str, torch.Tensor]] | Mapping[str, torch.Tensor],
    config: ModelConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    pp_rank: int = 0,
    pp_size: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    expert_parallel: bool = False,
    fmt: EngineFormat = VLLM,
) -> list[Shard]:
    """
    Return the shards of one worker's live parameters: views of them, in their own order.

    Padding (the vocabulary's last rows) is in no shard: it stays as the engine left it, which with vLLM is zero.
    Tied weights are one logical tensor, whatever the engine calls them.

    :param named_parameters: ``model.named_parameters()`` of the worker's model, or a mapping; every one must be known,
        but for the scales of the engine's cache, which are left alone
    :param config: of the model, as the checkpoint the engine was started with has it
    :param tp_rank: see :class:`EngineRank` for this and what follows
    :param fmt: what the engine chose to do otherwise than vLLM by default
    :raises ConfigError: where the sizes do not fit the model, or ``config`` is no :class:`ModelConfig`
    :raises LayoutError: where the live parameters are not those that the configuration and the sizes lead to; the
        message says which are unknown, of another shape, or missing
    """
    require_config(config)
    if not isinstance(named_parameters, Iterable):
        raise LayoutError(f"named_parameters is a {type(named_parameters).__name__}: give names with their tensors")

    rank = EngineRank(tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size, expert_parallel)
    named = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
    live = [(name, parameter.detach()) for name, parameter in named if not name.endswith(_OWN)]
    expected = {_spell(claim.name): claim for claim in parameters(config, rank, fmt=fmt)}
    known = {_spell(claim.name): claim for claim in alternatives(config, rank, fmt=fmt)} | expected
    claims = [(name, parameter, known.get(_spell(name))) for name, parameter in live]
    differences = [*_mismatches(claims), *_lacking(claims, expected.values(), rank, tied=config.tie_word_embeddings)]
    if differences:
        raise _disagreement(differences, config, rank)

    return [shard for _, parameter, claim in claims if claim is not None for shard in _views(parameter, claim)]


def layout(config: ModelConfig, rank: EngineRank, *, fmt: EngineFormat = VLLM, dtype: str = "bfloat16") -> Layout:
    """
    Return what ``describe(shards(...))`` is on ``rank`` of vLLM 0.33, without an engine and without torch.

    :param dtype: the engine's; parameters with a dtype of their own keep it
    :raises ConfigError: where the sizes do not fit the model
    """
    require_config(config)
    return Layout(
        tuple(
            Piece(slot.tensor, slot.box, slot.global_shape, claim.dtype or dtype)
            for claim in parameters(config, rank, fmt=fmt)
            for slot in claim.slots
        )
    )


def _spell(name: str) -> str:
    for spelling, ours in _SPELLINGS:
        name = name.replace(spelling, ours)

    return name


def _views(parameter: torch.Tensor, claim: EngineParameter) -> Iterator[Shard]:
    """Yield a parameter's shards; one with a dim for the experts has a logical tensor's dims behind it."""
    stacked = parameter.dim() > 2
    units = parameter.unbind(0) if stacked else (parameter,)
    for slot in claim.slots:
        view = units[slot.start[0]] if stacked else parameter
        start = slot.start[1:] if stacked else slot.start
        for dim, length in enumerate(slot.box.extent):
            if view.shape[dim] != length:
                view = view.narrow(dim, start[dim], length)

        yield Shard(slot.tensor, view, slot.box.offset, slot.global_shape)


def _mismatches(claims: Iterable[tuple[str, torch.Tensor, EngineParameter | None]]) -> Iterator[str]:
    """Yield what is wrong with the parameters that are there."""
    for name, parameter, claim in claims:
        shape = tuple(parameter.shape)
        if claim is None:
            yield f"{name} of shape {shape} is none of the model's"
        elif shape != claim.shape:
            yield f"{name} has shape {shape} where {claim.shape} is expected"
        elif parameter.element_size() == 1 and claim.dtype is None:
            yield f"{name} is quantised ({parameter.dtype}), and fmt.scale_block does not say in which blocks"
        elif _is_quantisation(name, parameter) and str(parameter.dtype) != f"torch.{claim.dtype}":
            yield f"{name} has dtype {parameter.dtype} where torch.{claim.dtype} is expected"


def _is_quantisation(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter is a quantised weight or its scales: what is of no use in another dtype."""
    return parameter.element_size() == 1 or name.endswith("_scale_inv")


def _lacking(
    claims: Sequence[tuple[str, torch.Tensor, EngineParameter | None]],
    expected: Collection[EngineParameter],
    rank: EngineRank,
    *,
    tied: bool,
) -> Iterator[str]:
    """Yield the expected parameters whose elements no live parameter holds, under whatever name."""
    names = {_spell(name) for name, _, _ in claims}
    if all(_spell(claim.name) in names for claim in expected):
        return

    held: set[tuple[str, Box]] = {
        (slot.tensor, slot.box) for _, _, claim in claims if claim is not None for slot in claim.slots
    }
    # A quantised engine may keep some layers as they are: those have no scales.
    plain = {f"{_spell(name)}_scale_inv" for name, parameter, _ in claims if parameter.element_size() > 1}
    for claim in expected:
        lacks = any((slot.tensor, slot.box) not in held for slot in claim.slots)
        if lacks and _spell(claim.name) not in plain and not _is_spare(claim, rank, tied=tied):
            yield f"{claim.name} of shape {claim.shape} is missing"


def _is_spare(claim: EngineParameter, rank: EngineRank, *, tied: bool) -> bool:
    """Tell whether a stage can do without: some models build embedding, norm and head on stages that never use them."""
    first, last = rank.pp_rank == 0, rank.pp_rank == rank.pp_size - 1
    if claim.name == "model.embed_tokens.weight":
        return not (first or (last and tied))

    return claim.name in ("model.norm.weight", "lm_head.weight") and not last


def _disagreement(differences: list[str], config: ModelConfig, rank: EngineRank) -> LayoutError:
    shown = "; ".join(differences[:_SHOWN])
    more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    experts = "expert parallel" if rank.expert_parallel else "not expert parallel"
    return LayoutError(
        f"the engine's parameters are not those of this {config.family} model on rank "
        f"tp {rank.tp_rank}/{rank.tp_size}, pp {rank.pp_rank}/{rank.pp_size}, dp {rank.dp_rank}/{rank.dp_size}, "
        f"{experts}: {shown}{more}"
    )
