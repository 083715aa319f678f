"""Which parameters an inference engine of vLLM's make holds on one rank, and which logical elements are in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import MlaConfig, ModelConfig, MoeConfig
from wavecast.runtime.layout.hf import LogicalTensor, logical_tensors
from wavecast.runtime.layout.mesh import split_even
from wavecast.runtime.layout.vllm_format import VLLM, EngineFormat, EngineParameter, EngineRank, Slot

__all__ = ("alternatives", "parameters")


def parameters(config: ModelConfig, rank: EngineRank, *, fmt: EngineFormat = VLLM) -> tuple[EngineParameter, ...]:
    """
    Return the parameters that vLLM 0.33 holds on ``rank``, layer by layer.

    Time and memory are linear in the model's logical tensors; the last few answers are kept.

    :raises ConfigError: where the sizes do not divide as the engine demands: query heads, MLP widths and the padded
        vocabulary by tensor parallelism, key and value heads by it or it by them; where blocks that share a scale are
        cut in two
    """
    return _known(config, rank, fmt)[0]


def alternatives(config: ModelConfig, rank: EngineRank, *, fmt: EngineFormat = VLLM) -> tuple[EngineParameter, ...]:
    """
    Return parameters that other versions and engines hold on ``rank`` in place of, or beside, those of vLLM 0.33.

    Embedding, final norm and head on any stage, a head of its own though the weights are tied, latent attention's
    compressing projections apart, biases that vLLM 0.33 leaves out.
    """
    return _known(config, rank, fmt)[1]


@lru_cache(maxsize=16)
def _known(
    config: ModelConfig, rank: EngineRank, fmt: EngineFormat
) -> tuple[tuple[EngineParameter, ...], tuple[EngineParameter, ...]]:
    """Return parameters and alternatives; every sync asks for them again."""
    rules = _Rules(config, rank, fmt)
    return tuple(_with_scales(rules.expected(), fmt)), tuple(_with_scales(rules.others(), fmt))


class _Rules:
    """The rules for one rank: from logical tensors to parameters."""

    def __init__(self, config: ModelConfig, rank: EngineRank, fmt: EngineFormat) -> None:
        self._config = config
        self._rank = rank
        self._fmt = fmt
        self._layers = _stage_layers(config, rank, fmt)
        self._logical: dict[str, LogicalTensor] = {tensor.name: tensor for tensor in logical_tensors(config)}

    def expected(self) -> Iterator[EngineParameter]:
        first, last = self._rank.pp_rank == 0, self._rank.pp_rank == self._rank.pp_size - 1
        tied = self._config.tie_word_embeddings
        # vLLM's models differ in what they build on the stages between: those with experts build everything.
        everywhere = self._config.family in ("qwen2_moe", "qwen3_moe", "mixtral")
        # DeepSeek's head is never tied there: it gets the embedding's elements into memory of its own.
        apart = not tied or self._config.family == "deepseek_v3"
        if first or everywhere or (last and not apart):
            yield self._vocabulary("model.embed_tokens.weight")

        for layer in self._layers:
            yield from self._layer(layer)

        if last or everywhere:
            yield self._whole("model.norm.weight")

        if (last or everywhere) and apart:
            yield self._vocabulary("lm_head.weight")

    def others(self) -> Iterator[EngineParameter]:
        yield self._vocabulary("model.embed_tokens.weight")
        yield self._vocabulary("lm_head.weight")
        yield self._whole("model.norm.weight")
        for layer in self._layers:
            prefix = f"model.layers.{layer}."
            attention = f"{prefix}self_attn."
            for name in ("q_a_proj.weight", "q_a_proj.bias", "kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
                if f"{attention}{name}" in self._logical:
                    yield self._whole(f"{attention}{name}")

            if f"{attention}o_proj.bias" in self._logical:
                yield self._whole(f"{attention}o_proj.bias")

    # One decoder layer.

    def _layer(self, layer: int) -> Iterator[EngineParameter]:
        prefix = f"model.layers.{layer}."
        mla, moe = self._config.mla, self._config.moe
        yield from self._attention(prefix) if mla is None else self._latent_attention(prefix, mla)
        if moe is not None and moe.at(layer):
            yield from self._experts(moe, layer)
        else:
            yield from self._mlp(f"{prefix}mlp.")

        yield self._whole(f"{prefix}input_layernorm.weight")
        yield self._whole(f"{prefix}post_attention_layernorm.weight")

    def _attention(self, prefix: str) -> Iterator[EngineParameter]:
        prefix = f"{prefix}self_attn."
        yield self._merged_heads(prefix, "weight")
        if f"{prefix}q_proj.bias" in self._logical:
            yield self._merged_heads(prefix, "bias")

        yield self._columns(f"{prefix}o_proj.weight")
        if self._config.o_bias and self._config.family in ("llama", "mistral"):
            yield self._whole(f"{prefix}o_proj.bias")

        if self._config.qk_norm:
            yield self._whole(f"{prefix}q_norm.weight")
            yield self._whole(f"{prefix}k_norm.weight")

    def _merged_heads(self, prefix: str, leaf: str) -> EngineParameter:
        """Return query, key and value heads, stacked; a key head is on several ranks where there are too few."""
        tp, heads, kv_heads = self._rank.tp_size, self._config.num_heads, self._config.num_kv_heads
        _check_divides(tp, heads, "num_attention_heads")
        if tp >= kv_heads:
            _check_divides(kv_heads, tp, "tp_size", of="num_key_value_heads")
            first, count = self._rank.tp_rank // (tp // kv_heads), 1
        else:
            _check_divides(tp, kv_heads, "num_key_value_heads")
            count = kv_heads // tp
            first = self._rank.tp_rank * count

        size = self._config.head_dim
        queries = (self._rank.tp_rank * heads // tp * size, heads // tp * size)
        shared = (first * size, count * size)
        return self._stacked(
            f"{prefix}qkv_proj.{leaf}",
            [
                (f"{prefix}q_proj.{leaf}", *queries),
                (f"{prefix}k_proj.{leaf}", *shared),
                (f"{prefix}v_proj.{leaf}", *shared),
            ],
        )

    def _latent_attention(self, prefix: str, mla: MlaConfig) -> Iterator[EngineParameter]:
        """Yield latent attention: what compresses is whole on every rank and fused, what expands is cut by heads."""
        prefix = f"{prefix}self_attn."
        _check_divides(self._rank.tp_size, self._config.num_heads, "num_attention_heads")
        compress = (f"{prefix}q_a_proj.weight", f"{prefix}kv_a_proj_with_mqa.weight")
        if mla.q_lora_rank is None:
            yield self._whole(compress[1])
            yield self._rows(f"{prefix}q_proj.weight")
        else:
            parts = [(name, 0, self._logical[name].shape[0]) for name in compress]
            yield self._stacked(f"{prefix}fused_qkv_a_proj.weight", parts)
            yield self._whole(f"{prefix}q_a_layernorm.weight")
            yield self._rows(f"{prefix}q_b_proj.weight")

        yield self._whole(f"{prefix}kv_a_layernorm.weight")
        yield self._rows(f"{prefix}kv_b_proj.weight")
        yield self._columns(f"{prefix}o_proj.weight")

    def _mlp(self, prefix: str, *, whole: bool = False) -> Iterator[EngineParameter]:
        """Yield a gated MLP: gate above up in one parameter."""
        for leaf in ("weight", "bias"):
            gate, up, down = (f"{prefix}{name}_proj.{leaf}" for name in ("gate", "up", "down"))
            if gate not in self._logical:
                continue

            size = self._logical[gate].shape[0]
            run = (0, size) if whole else self._run(size, gate)
            yield self._stacked(f"{prefix}gate_up_proj.{leaf}", [(gate, *run), (up, *run)])
            yield self._whole(down) if whole or leaf == "bias" else self._columns(down)

    def _experts(self, moe: MoeConfig, layer: int) -> Iterator[EngineParameter]:
        """Yield router, routed and shared experts of one layer."""
        mixtral = self._config.family == "mixtral"
        prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}."
        yield self._whole(f"{prefix}gate.weight")
        if moe.score_bias:
            yield self._whole(f"{prefix}gate.e_score_correction_bias")

        yield from self._routed(moe, layer, f"{prefix}experts.", ("w1", "w3", "w2") if mixtral else _PROJECTIONS)
        if moe.shared_intermediate_size:
            deepseek = self._config.family == "deepseek_v3"
            shared = f"{prefix}{'shared_experts' if deepseek else 'shared_expert'}."
            yield from self._mlp(shared, whole=deepseek and self._whole_shared_experts())

        if moe.shared_gate:
            yield self._whole(f"{prefix}shared_expert_gate.weight")

    def _routed(
        self, moe: MoeConfig, layer: int, prefix: str, projections: tuple[str, str, str]
    ) -> Iterator[EngineParameter]:
        """Yield the rank's experts: one slot each in ``w13_weight`` (gate and up) and in ``w2_weight`` (down)."""
        hidden, width, start = self._config.hidden_size, moe.intermediate_size, 0
        if not self._rank.expert_parallel:
            _check_divides(self._rank.moe_size, width, "the width of an expert", of="tp_size * dp_size")
            width //= self._rank.moe_size
            start = self._rank.moe_rank * width

        gate_at, up_at = (0, width) if self._fmt.gate_first else (width, 0)
        inward, outward = Box((start, 0), (width, hidden)), Box((0, start), (hidden, width))
        held = self._held_experts(moe, layer)
        both: list[Slot] = []
        down: list[Slot] = []
        for slot, expert in enumerate(held):
            gate, up, out = (self._logical[f"{prefix}{expert}.{name}.weight"] for name in projections)
            both.append(Slot(gate.name, gate.shape, inward, (slot, gate_at, 0)))
            both.append(Slot(up.name, up.shape, inward, (slot, up_at, 0)))
            down.append(Slot(out.name, out.shape, outward, (slot, 0, 0)))

        where = f"{prefix}routed_experts."
        yield EngineParameter(f"{where}w13_weight", (len(held), 2 * width, hidden), tuple(both))
        yield EngineParameter(f"{where}w2_weight", (len(held), hidden, width), tuple(down))

    def _held_experts(self, moe: MoeConfig, layer: int) -> Sequence[int]:
        if self._fmt.expert_slots is not None:
            if len(self._fmt.expert_slots) != self._config.num_layers:
                raise ConfigError(
                    f"expert_slots are of {len(self._fmt.expert_slots)} layers, the model has {self._config.num_layers}"
                )

            held = self._fmt.expert_slots[layer]
            outside = [expert for expert in held if not 0 <= expert < moe.num_experts]
            if outside:
                raise ConfigError(f"expert_slots of layer {layer} name {outside}, of {moe.num_experts} experts")

            return held

        if not self._rank.expert_parallel:
            return range(moe.num_experts)

        if self._fmt.expert_placement == "round_robin":
            return range(self._rank.moe_rank, moe.num_experts, self._rank.moe_size)

        return range(*split_even(moe.num_experts, self._rank.moe_size, self._rank.moe_rank))

    def _whole_shared_experts(self) -> bool:
        if self._fmt.whole_shared_experts is not None:
            return self._fmt.whole_shared_experts

        return self._rank.expert_parallel and self._rank.tp_size > 1 and self._rank.dp_size > 1

    # Parameters by the way they are cut.

    def _whole(self, name: str) -> EngineParameter:
        """Return a parameter that every rank holds whole."""
        tensor = self._logical[name]
        start = (0,) * len(tensor.shape)
        slot = Slot(name, tensor.shape, Box(start, tensor.shape), start)
        return EngineParameter(name, tensor.shape, (slot,), tensor.dtype)

    def _rows(self, name: str) -> EngineParameter:
        """Return a column-parallel parameter: its outputs, which are rows, are cut."""
        return self._stacked(name, [(name, *self._run(self._logical[name].shape[0], name))])

    def _columns(self, name: str) -> EngineParameter:
        """Return a row-parallel parameter: its inputs, which are columns, are cut."""
        rows, columns = self._logical[name].shape
        start, size = self._run(columns, name)
        slot = Slot(name, (rows, columns), Box((0, start), (rows, size)), (0, 0))
        return EngineParameter(name, (rows, size), (slot,))

    def _run(self, size: int, name: str) -> tuple[int, int]:
        """Return start and length of the rank's even part of a dim."""
        tp = self._rank.tp_size
        _check_divides(tp, size, name)
        return self._rank.tp_rank * size // tp, size // tp

    def _stacked(self, name: str, parts: Sequence[tuple[str, int, int]]) -> EngineParameter:
        """Return runs of rows, each given as (logical tensor, first row, rows), one below the other."""
        slots: list[Slot] = []
        total, rest = 0, self._logical[parts[0][0]].shape[1:]
        zeros = (0,) * len(rest)
        for tensor, first, count in parts:
            shape = self._logical[tensor].shape
            slots.append(Slot(tensor, shape, Box((first, *zeros), (count, *rest)), (total, *zeros)))
            total += count

        return EngineParameter(name, (total, *rest), tuple(slots))

    def _vocabulary(self, name: str) -> EngineParameter:
        """Return the embedding or the head: rows, padded to a multiple and cut evenly; a rank may have none at all."""
        unit, tp = self._fmt.vocab_padding, self._rank.tp_size
        size, hidden = self._config.vocab_size, self._config.hidden_size
        padded = -(-size // unit) * unit
        _check_divides(tp, padded, "the padded vocabulary")
        rows = padded // tp
        start = min(self._rank.tp_rank * rows, size)
        held = min(start + rows, size) - start
        tensor = name if name in self._logical else "model.embed_tokens.weight"
        slot = Slot(tensor, (size, hidden), Box((start, 0), (held, hidden)), (0, 0))
        return EngineParameter(name, (rows, hidden), (slot,) if held else ())


def _with_scales(claims: Iterable[EngineParameter], fmt: EngineFormat) -> Iterator[EngineParameter]:
    """Yield each parameter, and after one that is quantised its scales."""
    for claim in claims:
        linear = "_proj" in claim.name and claim.name.endswith(".weight")
        if fmt.scale_block is None or not (linear or claim.name.endswith(("w13_weight", "w2_weight"))):
            yield claim
        else:
            yield replace(claim, dtype="float8_e4m3fn")
            yield _scales(claim, fmt.scale_block)


def _scales(claim: EngineParameter, block: tuple[int, int]) -> EngineParameter:
    """Return the scales of a quantised parameter: its slots in blocks, each with those of the logical tensor."""
    slots: list[Slot] = []
    for slot in claim.slots:
        start = slot.start[-2:]
        ends = [(a + n) % size for a, n, size in zip(slot.box.offset, slot.box.extent, slot.global_shape, strict=True)]
        if any(
            at % size for numbers in (slot.box.offset, start, ends) for at, size in zip(numbers, block, strict=True)
        ):
            raise ConfigError(
                f"blocks of {block[0]} x {block[1]} are cut in two where {claim.name} holds {slot.tensor} at offset "
                f"{slot.box.offset} with extent {slot.box.extent}"
            )

        offset, start = _in_blocks(slot.box.offset, block), _in_blocks(start, block)
        box = Box(offset, _in_blocks(slot.box.extent, block))
        shape = _in_blocks(slot.global_shape, block)
        slots.append(Slot(f"{slot.tensor}_scale_inv", shape, box, (*slot.start[:-2], *start)))

    shape = (*claim.shape[:-2], *_in_blocks(claim.shape[-2:], block))
    return EngineParameter(f"{claim.name}_scale_inv", shape, tuple(slots), "float32")


def _in_blocks(sizes: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-size // unit) for size, unit in zip(sizes, block, strict=True))


def _stage_layers(config: ModelConfig, rank: EngineRank, fmt: EngineFormat) -> range:
    """Return the decoder layers of the rank's stage."""
    n, stages = config.num_layers, rank.pp_size
    if fmt.pp_layers is not None:
        counts = list(fmt.pp_layers)
        if len(counts) != stages or sum(counts) != n or min(counts) < 0:
            raise ConfigError(f"pp_layers={tuple(counts)} are not pp_size={stages} stages of {n} layers together")
    else:
        counts = [n // stages] * stages
        # The last stage has the head to carry: it gets a layer more only when all have.
        for back in range(2, n % stages + 2):
            counts[-back] += 1

    start = sum(counts[: rank.pp_rank])
    return range(start, start + counts[rank.pp_rank])


def _check_divides(divisor: int, size: int, what: str, *, of: str = "tp_size") -> None:
    if size % divisor:
        raise ConfigError(f"{of}={divisor} does not divide {what}={size}")


#: Gate, up and down of one expert.
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
