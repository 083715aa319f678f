"""A model's logical tensors under their Hugging Face names, and who holds what of them on a mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import MlaConfig, ModelConfig, MoeConfig
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.mesh import Coordinates, MeshSpec, split_even
from wavecast.runtime.layout.shard import Layout, Piece

__all__ = ("LogicalTensor", "Split", "Stage", "layouts", "logical_tensors", "num_parameters", "stage_layers")

#: Where in the model a tensor sits: it decides the pipeline stage.
Stage = Literal["embedding", "layer", "head"]


@dataclass(frozen=True, slots=True)
class Split:
    """
    How one dim of a tensor is cut: into runs that stay whole, dealt out as evenly as possible.

    What is dealt out is ``heads``; ``group`` consecutive ones share a run of ``size * group / heads`` elements. Each
    column of an MLP is a head (``heads`` is the dim's size), so is each query head; a key or value head is a run shared
    by the ``group`` query heads that attend to it. A rank holds the runs that its heads need: a run whose heads are on
    two ranks is on both.

    :ivar dim: the dim that is cut
    :ivar heads: how many things are dealt out
    :ivar group: how many of them share a run
    """

    dim: int
    heads: int
    group: int = 1

    def run(self, size: int, *, parts: int, index: int) -> tuple[int, int]:
        """Return ``(start, stop)`` of part ``index`` of ``parts``, in elements of a dim of ``size``."""
        start, stop = split_even(self.heads, parts, index)
        width = size // (self.heads // self.group)
        return start // self.group * width, -(-stop // self.group) * width


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """
    A whole parameter, and how meshes cut it.

    :ivar name: its name in a Hugging Face checkpoint
    :ivar shape: its shape there
    :ivar stage: where in the model it sits
    :ivar split: how tensor parallelism cuts it (for an expert's matrices: expert tensor parallelism), ``None`` where
        every rank holds it whole
    :ivar layer: its decoder layer, where it is in one
    :ivar expert: its routed expert, where it is in one
    :ivar dtype: the dtype it keeps whatever the model's, or ``None``
    """

    name: str
    shape: tuple[int, ...]
    stage: Stage = "layer"
    split: Split | None = None
    layer: int | None = None
    expert: int | None = None
    dtype: str | None = None

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def box(self, *, parts: int, index: int) -> Box:
        """Return what part ``index`` of ``parts`` holds."""
        if self.split is None:
            return Box((0,) * len(self.shape), self.shape)

        dim = self.split.dim
        start, stop = self.split.run(self.shape[dim], parts=parts, index=index)
        offset = tuple(start if d == dim else 0 for d in range(len(self.shape)))
        return Box(offset, (*self.shape[:dim], stop - start, *self.shape[dim + 1 :]))


def logical_tensors(config: ModelConfig) -> tuple[LogicalTensor, ...]:
    """
    Return every tensor of a Hugging Face checkpoint of ``config``, in the order of the module's ``state_dict``.

    Names, shapes and order are those of Transformers' modules. With tied embeddings there is no ``lm_head.weight``;
    multi-token-prediction layers are left out.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    by_row = Split(0, config.vocab_size)
    tensors = [LogicalTensor("model.embed_tokens.weight", vocabulary, "embedding", by_row)]
    for layer in range(config.num_layers):
        tensors.extend(_layer(config, layer))

    tensors.append(LogicalTensor("model.norm.weight", (config.hidden_size,), "head"))
    if not config.tie_word_embeddings:
        tensors.append(LogicalTensor("lm_head.weight", vocabulary, "head", by_row))

    return tuple(tensors)


def num_parameters(config: ModelConfig) -> int:
    """Return how many elements the checkpoint of ``config`` has; tied embeddings count once."""
    return sum(tensor.numel for tensor in logical_tensors(config))


def stage_layers(config: ModelConfig, mesh: MeshSpec, *, pp_layers: Sequence[int] | None = None) -> tuple[range, ...]:
    """
    Return the decoder layers of each pipeline stage.

    :param pp_layers: layers of each stage in turn; by default as even as possible, the remainder to the first stages
    :raises ConfigError: when there are more stages than layers, or ``pp_layers`` does not add up
    """
    if pp_layers is None:
        if mesh.pp > config.num_layers:
            raise ConfigError(f"pp={mesh.pp} exceeds the model's {config.num_layers} layers")

        return tuple(range(*split_even(config.num_layers, mesh.pp, index)) for index in range(mesh.pp))

    counts = tuple(pp_layers)
    if len(counts) != mesh.pp or sum(counts) != config.num_layers:
        raise ConfigError(f"pp_layers={counts} are not pp={mesh.pp} stages of {config.num_layers} layers together")

    # The first and the last stage hold the embedding and the head even without a layer; one between would hold nothing.
    if min(counts) < 0 or 0 in counts[1:-1]:
        raise ConfigError(f"pp_layers={counts} leave a stage between the first and the last with nothing")

    stops = tuple(itertools.accumulate(counts))
    return tuple(range(stop - count, stop) for count, stop in zip(counts, stops, strict=True))


def layouts(
    config: ModelConfig, mesh: MeshSpec, *, dtype: str = "bfloat16", pp_layers: Sequence[int] | None = None
) -> tuple[Layout, ...]:
    """
    Return what each rank of ``mesh`` holds of the model, in rank order.

    Tensor parallelism cuts query heads (whole), the MLP's inner width and the vocabulary as evenly as possible, uneven
    where they do not divide; a rank holds exactly the key and value heads that its query heads attend to. Norms, the
    router and what latent attention compresses are whole on every rank; shared experts are cut like a dense MLP.
    Experts go to ``ep`` in contiguous ranges, each expert's inner width to ``etp``. The embedding is on the first
    pipeline stage, final norm and head on the last; where they are tied, the last stage holds the embedding too.

    Ranks that hold the same share one object. Time and memory are O(logical tensors x (tp + etp) + pieces of distinct
    ranks): data-parallel copies cost nothing.

    :param dtype: of every piece but those whose tensor keeps its own
    :param pp_layers: layers of each pipeline stage; by default as even as possible
    :raises ConfigError: when the mesh does not fit the model, or for an unknown dtype
    """
    itemsize(dtype)
    _check_mesh(config, mesh)
    stages = stage_layers(config, mesh, pp_layers=pp_layers)
    tensors = logical_tensors(config)
    cutter = _Cutter(mesh, dtype)
    blocks = [cutter.blocks(_on_stage(tensors, config, stages, index)) for index in range(mesh.pp)]
    known: dict[tuple[int, int, int, int], Layout] = {}
    ranks: list[Layout] = []
    for rank in range(mesh.world_size):
        at = mesh.coordinates(rank)
        key = (at.pp, at.tp, at.etp, at.ep)
        if key not in known:
            known[key] = Layout(tuple(piece for block in blocks[at.pp] for piece in block.at(at)))

        ranks.append(known[key])

    return tuple(ranks)


@dataclass(frozen=True, slots=True)
class _Block:
    """
    Consecutive tensors of a stage, all of a layer's routed experts or none of them, cut for every rank.

    :ivar cuts: the pieces of each tensor in turn, for each index along tp (of experts: along etp)
    :ivar experts: for each index along ep, which pieces are of its experts; empty where the tensors are no experts'
    """

    cuts: tuple[tuple[Piece, ...], ...]
    experts: tuple[slice, ...] = ()

    def at(self, at: Coordinates) -> tuple[Piece, ...]:
        """Return what the rank at ``at`` holds."""
        return self.cuts[at.etp][self.experts[at.ep]] if self.experts else self.cuts[at.tp]


class _Cutter:
    """Cuts tensors for one mesh. Equal boxes and pieces are the same object, which keeps a million of them small."""

    def __init__(self, mesh: MeshSpec, dtype: str) -> None:
        self._mesh = mesh
        self._dtype = dtype
        self._boxes: dict[tuple[tuple[int, ...], Split | None, int], tuple[Box, ...]] = {}

    def blocks(self, tensors: Sequence[LogicalTensor]) -> list[_Block]:
        """Return the tensors of one stage, cut."""
        runs = itertools.groupby(tensors, key=lambda tensor: (tensor.layer, tensor.expert is not None))
        return [self._block(tuple(run), routed=routed) for (_, routed), run in runs]

    def _block(self, tensors: tuple[LogicalTensor, ...], *, routed: bool) -> _Block:
        parts = self._mesh.etp if routed else self._mesh.tp
        cuts = tuple(zip(*(self._cut(tensor, parts) for tensor in tensors), strict=True))
        if not routed:
            return _Block(cuts)

        experts = len({tensor.expert for tensor in tensors})
        each = len(tensors) // experts
        ranges = (split_even(experts, self._mesh.ep, index) for index in range(self._mesh.ep))
        return _Block(cuts, tuple(slice(start * each, stop * each) for start, stop in ranges))

    def _cut(self, tensor: LogicalTensor, parts: int) -> tuple[Piece, ...]:
        """Return the tensor's piece for each of ``parts``."""
        key = (tensor.shape, tensor.split, parts)
        boxes = self._boxes.get(key)
        if boxes is None:
            cut = (tensor.box(parts=parts, index=index) for index in range(parts))
            equal: dict[Box, Box] = {}
            boxes = self._boxes[key] = tuple(equal.setdefault(box, box) for box in cut)

        # Ranks that share a run (or hold all) are neighbours: looking at the last piece finds every equal one.
        name, shape, dtype = tensor.name, tensor.shape, tensor.dtype or self._dtype
        last = Piece(name, boxes[0], shape, dtype)
        pieces = [last]
        for box in boxes[1:]:
            if box is not last.box:
                last = Piece(name, box, shape, dtype)

            pieces.append(last)

        return tuple(pieces)


def _on_stage(
    tensors: tuple[LogicalTensor, ...], config: ModelConfig, stages: tuple[range, ...], index: int
) -> list[LogicalTensor]:
    """Return the tensors of pipeline stage ``index``, in checkpoint order."""
    last = index == len(stages) - 1
    holds = {"embedding": index == 0 or (last and config.tie_word_embeddings), "head": last}
    layers = stages[index]
    return [tensor for tensor in tensors if (holds[tensor.stage] if tensor.layer is None else tensor.layer in layers)]


def _check_mesh(config: ModelConfig, mesh: MeshSpec) -> None:
    """Raise for a mesh that would leave a rank without its part of some tensor."""
    limits = [("num_attention_heads", config.num_heads), ("vocab_size", config.vocab_size)]
    routed = [config.is_moe(layer) for layer in range(config.num_layers)]
    moe = config.moe if any(routed) else None
    if not all(routed):
        limits.append(("intermediate_size", config.intermediate_size))

    if moe is not None and moe.shared_intermediate_size:
        limits.append(("the shared experts' width", moe.shared_intermediate_size))

    for what, size in limits:
        if mesh.tp > size:
            raise ConfigError(f"tp={mesh.tp} exceeds {what}={size}")

    if moe is None:
        if mesh.ep > 1:
            raise ConfigError(
                f"ep={mesh.ep} asks for experts, and none of the model's {config.num_layers} layers has any"
            )

        return

    if mesh.ep > moe.num_experts:
        raise ConfigError(f"ep={mesh.ep} exceeds the model's {moe.num_experts} experts")

    if mesh.etp > moe.intermediate_size:
        raise ConfigError(f"etp={mesh.etp} exceeds the width {moe.intermediate_size} of an expert")


def _layer(config: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    """Yield the tensors of one decoder layer."""
    prefix = f"model.layers.{layer}."
    hidden = (config.hidden_size,)
    mla, moe = config.mla, config.moe
    yield from _attention(config, layer) if mla is None else _latent_attention(config, mla, layer)
    if moe is not None and moe.at(layer):
        yield from _experts(config, moe, layer)
    else:
        yield from _mlp(config, f"{prefix}mlp.", layer, config.intermediate_size, bias=config.mlp_bias)

    yield LogicalTensor(f"{prefix}input_layernorm.weight", hidden, layer=layer)
    yield LogicalTensor(f"{prefix}post_attention_layernorm.weight", hidden, layer=layer)


def _linear(
    name: str,
    shape: tuple[int, int],
    split: Split | None = None,
    *,
    layer: int,
    expert: int | None = None,
    bias: bool = False,
) -> Iterator[LogicalTensor]:
    """Yield a linear layer's weight ``(out, in)`` and, if it has one, its bias, cut only where the output is."""
    yield LogicalTensor(f"{name}.weight", shape, split=split, layer=layer, expert=expert)
    if bias:
        of_bias = split if split is not None and split.dim == 0 else None
        yield LogicalTensor(f"{name}.bias", shape[:1], split=of_bias, layer=layer, expert=expert)


def _attention(config: ModelConfig, layer: int) -> Iterator[LogicalTensor]:
    """Yield grouped-query attention."""
    prefix = f"model.layers.{layer}.self_attn."
    hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    shared = Split(0, heads, heads // kv_heads)
    bias = config.qkv_bias
    yield from _linear(f"{prefix}q_proj", (heads * head_dim, hidden), Split(0, heads), layer=layer, bias=bias)
    yield from _linear(f"{prefix}k_proj", (kv_heads * head_dim, hidden), shared, layer=layer, bias=bias)
    yield from _linear(f"{prefix}v_proj", (kv_heads * head_dim, hidden), shared, layer=layer, bias=bias)
    yield from _linear(f"{prefix}o_proj", (hidden, heads * head_dim), Split(1, heads), layer=layer, bias=config.o_bias)
    if config.qk_norm:
        yield LogicalTensor(f"{prefix}q_norm.weight", (head_dim,), layer=layer)
        yield LogicalTensor(f"{prefix}k_norm.weight", (head_dim,), layer=layer)


def _latent_attention(config: ModelConfig, mla: MlaConfig, layer: int) -> Iterator[LogicalTensor]:
    """Yield multi-head latent attention: whole where it compresses, cut by heads where it expands."""
    prefix = f"model.layers.{layer}.self_attn."
    hidden, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
    queries = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    keys_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    compressed = mla.kv_lora_rank + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        yield from _linear(f"{prefix}q_proj", (queries, hidden), Split(0, heads), layer=layer)
    else:
        yield from _linear(f"{prefix}q_a_proj", (mla.q_lora_rank, hidden), layer=layer, bias=bias)
        yield LogicalTensor(f"{prefix}q_a_layernorm.weight", (mla.q_lora_rank,), layer=layer)
        yield from _linear(f"{prefix}q_b_proj", (queries, mla.q_lora_rank), Split(0, heads), layer=layer)

    yield from _linear(f"{prefix}kv_a_proj_with_mqa", (compressed, hidden), layer=layer, bias=bias)
    yield LogicalTensor(f"{prefix}kv_a_layernorm.weight", (mla.kv_lora_rank,), layer=layer)
    yield from _linear(f"{prefix}kv_b_proj", (keys_values, mla.kv_lora_rank), Split(0, heads), layer=layer)
    values = heads * mla.v_head_dim
    yield from _linear(f"{prefix}o_proj", (hidden, values), Split(1, heads), layer=layer, bias=config.o_bias)


def _mlp(
    config: ModelConfig,
    prefix: str,
    layer: int,
    width: int,
    *,
    expert: int | None = None,
    bias: bool = False,
) -> Iterator[LogicalTensor]:
    """Yield a gated MLP of inner width ``width``."""
    inward, outward = (width, config.hidden_size), (config.hidden_size, width)
    yield from _linear(f"{prefix}gate_proj", inward, Split(0, width), layer=layer, expert=expert, bias=bias)
    yield from _linear(f"{prefix}up_proj", inward, Split(0, width), layer=layer, expert=expert, bias=bias)
    yield from _linear(f"{prefix}down_proj", outward, Split(1, width), layer=layer, expert=expert, bias=bias)


def _experts(config: ModelConfig, moe: MoeConfig, layer: int) -> Iterator[LogicalTensor]:
    """Yield router, routed and shared experts, each family in its module's order."""
    mixtral, deepseek = config.family == "mixtral", config.family == "deepseek_v3"
    prefix = f"model.layers.{layer}.{'block_sparse_moe' if mixtral else 'mlp'}."
    routed = _mixtral_experts if mixtral else _routed_experts
    if not deepseek:
        yield LogicalTensor(f"{prefix}gate.weight", (moe.num_experts, config.hidden_size), layer=layer)

    yield from routed(config, moe, prefix, layer)
    if deepseek:
        yield LogicalTensor(f"{prefix}gate.weight", (moe.num_experts, config.hidden_size), layer=layer)
        if moe.score_bias:
            yield LogicalTensor(
                f"{prefix}gate.e_score_correction_bias", (moe.num_experts,), layer=layer, dtype="float32"
            )

    if moe.shared_intermediate_size:
        shared = f"{prefix}{'shared_experts' if deepseek else 'shared_expert'}."
        yield from _mlp(config, shared, layer, moe.shared_intermediate_size)

    if moe.shared_gate:
        yield LogicalTensor(f"{prefix}shared_expert_gate.weight", (1, config.hidden_size), layer=layer)


def _routed_experts(config: ModelConfig, moe: MoeConfig, prefix: str, layer: int) -> Iterator[LogicalTensor]:
    for expert in range(moe.num_experts):
        yield from _mlp(config, f"{prefix}experts.{expert}.", layer, moe.intermediate_size, expert=expert)


def _mixtral_experts(config: ModelConfig, moe: MoeConfig, prefix: str, layer: int) -> Iterator[LogicalTensor]:
    """Yield experts under Mixtral's names: w1 gates, w3 goes up, w2 goes down."""
    hidden, width = config.hidden_size, moe.intermediate_size
    for expert in range(moe.num_experts):
        name = f"{prefix}experts.{expert}."
        yield from _linear(f"{name}w1", (width, hidden), Split(0, width), layer=layer, expert=expert)
        yield from _linear(f"{name}w2", (hidden, width), Split(1, width), layer=layer, expert=expert)
        yield from _linear(f"{name}w3", (width, hidden), Split(0, width), layer=layer, expert=expert)
