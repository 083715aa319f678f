"""
Sides of the layout zoo: what actors hold under one layout, cut from whole tensors by rules written here.

The memory is cut without any of the library's geometry; only then an adapter says what is in it. A destination is built
twice, once from the tensors that ought to arrive: that memory is what the other is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.distributed.tensor import Placement, Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor.placement_types import _StridedShard

from wavecast.runtime import MeshSpec, Shard
from wavecast.runtime.layout import dtensor, fp8, hf_live, vllm
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.flat import flat_shards
from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.layout.megatron.runs import Run, gated, query_groups, window

__all__ = (
    "Actor",
    "Side",
    "Tensors",
    "dtensors",
    "engine",
    "fsdp1",
    "megatron",
    "mesh",
    "pairs",
    "quantised",
    "whole",
    "zero3",
)

Tensors = dict[str, torch.Tensor]

#: The blocks of the zoo's FP8 pairs: small, as its models are.
BLOCK = (8, 8)

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(eq=False)
class Actor:
    """
    What one actor holds.

    :ivar memory: all of its tensors, padding included
    :ivar shards: what an adapter says of them
    """

    memory: list[torch.Tensor] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put a copy of ``tensor`` into the actor's memory and return it."""
        self.memory.append(tensor.clone().contiguous())
        return self.memory[-1]


@dataclass(frozen=True)
class Side:
    """
    One side of a sync.

    :ivar title: how the layout is called in the zoo
    :ivar build: from whole tensors to actors
    :ivar mesh: the mesh that it is, if it is one; ``replicas`` times
    """

    title: str
    build: Callable[[Tensors], list[Actor]]
    mesh: MeshSpec | None = None
    replicas: int = 1

    def times(self, replicas: int) -> Side:
        """Return so many replicas of this side."""
        build = self.build
        return Side(
            f"{self.title}, {replicas} replicas",
            lambda tensors: [actor for _ in range(replicas) for actor in build(tensors)],
            self.mesh,
            replicas,
        )

    def then(self, title: str, change: Callable[[list[Shard]], list[Shard]]) -> Side:
        """Return this side with every actor's shards changed."""
        build = self.build

        def changed(tensors: Tensors) -> list[Actor]:
            return [Actor(actor.memory, change(actor.shards)) for actor in build(tensors)]

        return Side(f"{self.title}, {title}" if title else self.title, changed, self.mesh, self.replicas)


# The mesh of the command line: heads, widths and vocabulary dealt out as evenly as possible.


def mesh(config: ModelConfig, spec: str) -> Side:
    """Return the side that ``spec`` describes, such as ``"tp=2,pp=2"``."""
    sizes = MeshSpec.parse(spec)

    def build(tensors: Tensors) -> list[Actor]:
        found: list[Actor] = []
        for rank, layout in enumerate(layouts(config, sizes)):
            held = _of_rank(tensors, config, sizes, rank)
            if [piece.tensor for piece in layout.pieces] != list(held):
                raise AssertionError(f"rank {rank} of {spec} holds other tensors than the rules say")

            actor = Actor()
            for piece in layout.pieces:
                local = actor.keep(held[piece.tensor])
                actor.shards.append(Shard(piece.tensor, local, piece.box.offset, piece.global_shape))

            found.append(actor)

        return found

    return Side(spec, build, sizes)


def _of_rank(tensors: Tensors, config: ModelConfig, sizes: MeshSpec, rank: int) -> Tensors:
    """Return what a rank of a mesh holds."""
    stage, local = divmod(rank, sizes.tp * sizes.dp)
    tp, etp, ep = local % sizes.tp, local % sizes.etp, local // sizes.etp % sizes.ep
    layers = torch.arange(config.num_layers).tensor_split(sizes.pp)[stage].tolist()
    experts = torch.arange(config.moe.num_experts).tensor_split(sizes.ep)[ep].tolist() if config.moe else []
    last = stage == sizes.pp - 1
    found: Tensors = {}
    for name, tensor in tensors.items():
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        if layer is not None:
            here = int(layer.group(1)) in layers and (expert is None or int(expert.group(1)) in experts)
        elif name == "model.embed_tokens.weight":
            here = stage == 0 or (last and config.tie_word_embeddings)
        else:
            here = last

        if here:
            parts = (sizes.etp, etp) if expert is not None else (sizes.tp, tp)
            found[name] = _cut(name, tensor, config, *parts)

    return found


def _cut(name: str, tensor: torch.Tensor, config: ModelConfig, parts: int, index: int) -> torch.Tensor:
    """Return part ``index`` of a tensor under tensor parallelism."""
    module = name.split(".")[-2]
    heads = torch.arange(config.num_heads).tensor_split(parts)[index]
    if module in ("k_proj", "v_proj"):
        heads = (heads // (config.num_heads // config.num_kv_heads)).unique()

    if module in ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"):
        count = config.num_kv_heads if module in ("k_proj", "v_proj") else config.num_heads
        found: torch.Tensor = tensor.unflatten(0, (count, -1))[heads].flatten(0, 1)
        return found

    if module == "o_proj":
        found = tensor.unflatten(1, (config.num_heads, -1))[:, heads].flatten(1, 2)
        return found

    if module in ("gate_proj", "up_proj", "w1", "w3", "embed_tokens", "lm_head"):
        return tensor.tensor_split(parts)[index]

    return tensor.tensor_split(parts, dim=1)[index] if module in ("down_proj", "w2") else tensor


def pairs(config: ModelConfig, spec: str) -> Side:
    """Return the side of a mesh that holds FP8 weights and their scales."""
    sizes = MeshSpec.parse(spec)

    def build(tensors: Tensors) -> list[Actor]:
        plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(fp8.SCALE)}
        scales = {name: tensor for name, tensor in tensors.items() if name.endswith(fp8.SCALE)}
        wholes = {name.removesuffix(fp8.SCALE): tensor for name, tensor in scales.items()}
        found: list[Actor] = []
        for rank, layout in enumerate(layouts(config, sizes)):
            held = _of_rank(plain, config, sizes, rank)
            held_scales = _of_rank(wholes, config, sizes, rank)
            actor = Actor()
            for piece in layout.pieces:
                shard = Shard(piece.tensor, actor.keep(held[piece.tensor]), piece.box.offset, piece.global_shape)
                if piece.tensor in held_scales:
                    actor.shards += fp8.paired(shard, actor.keep(held_scales[piece.tensor]), block=BLOCK)
                else:
                    actor.shards.append(shard)

            found.append(actor)

        return found

    return Side(f"{spec}, FP8 pairs", build, sizes)


def quantised(side: Side) -> Side:
    """Return a source that quantises what it sends."""
    return side.then("quantised as it is sent", lambda shards: fp8.quantised(shards, block=BLOCK))


# Live modules.


def whole(config: ModelConfig) -> Side:
    """Return one actor with an unsharded Transformers module, its experts stacked as version 5 stacks them."""

    def build(tensors: Tensors) -> list[Actor]:
        actor = Actor()
        state = {name: actor.keep(tensor) for name, tensor in _stacked(tensors).items()}
        actor.shards = hf_live.shards(state, config)
        return [actor]

    return Side("Transformers module", build, MeshSpec())


def _stacked(tensors: Tensors) -> Tensors:
    state: Tensors = {}
    gathered: dict[str, dict[str, list[torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.search(name)
        if expert is None:
            state[name] = tensor
        else:
            path, kind = f"{name[: expert.start()]}.experts", name.split(".")[-2]
            gathered.setdefault(path, {}).setdefault(kind, []).append(tensor)

    for path, by_kind in gathered.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in by_kind else ("gate_proj", "up_proj", "down_proj")
        both = [torch.cat(pair) for pair in zip(by_kind[gate], by_kind[up], strict=True)]
        state[f"{path}.gate_up_proj"] = torch.stack(both)
        state[f"{path}.down_proj"] = torch.stack(by_kind[down])

    return state


def engine(config: ModelConfig, *, tp: int, pp: int = 1, ep: bool = False) -> Side:
    """Return the workers of an engine of vLLM's make."""

    def build(tensors: Tensors) -> list[Actor]:
        found: list[Actor] = []
        for stage in range(pp):
            for rank in range(tp):
                actor = Actor()
                parameters = _engine_parameters(tensors, config, (rank, tp), (stage, pp), ep=ep)
                live = {name: actor.keep(tensor) for name, tensor in parameters.items()}
                actor.shards = vllm.shards(
                    live, config, tp_rank=rank, tp_size=tp, pp_rank=stage, pp_size=pp, expert_parallel=ep
                )
                found.append(actor)

        return found

    spec = f"tp={tp}" + (f",pp={pp}" if pp > 1 else "") + (", experts shared out" if ep else "")
    return Side(f"vLLM {spec}", build, MeshSpec(tp=tp, pp=pp))


def _engine_parameters(
    tensors: Tensors, config: ModelConfig, tp: tuple[int, int], pp: tuple[int, int], *, ep: bool
) -> Tensors:
    (rank, size), (stage, stages) = tp, pp

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(size)[rank]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return rows(torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % 64)))

    def heads(tensor: torch.Tensor) -> torch.Tensor:
        """Return a rank's key or value heads: one that several ranks share where there are too few."""
        return rows(tensor.unflatten(0, (-1, config.head_dim)).repeat_interleave(copies, 0).flatten(0, 1))

    copies = max(size // config.num_kv_heads, 1)
    # DeepSeek's class builds embedding and head where they are used, those of the other mixtures everywhere.
    everywhere, last = config.moe is not None and config.mla is None, stage == stages - 1
    found: Tensors = {}
    if stage == 0 or everywhere or (last and config.tie_word_embeddings):
        found["model.embed_tokens.weight"] = padded(tensors["model.embed_tokens.weight"])

    for layer in torch.arange(config.num_layers).tensor_split(stages)[stage].tolist():
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for leaf in ("weight", "bias"):
            if f"self_attn.q_proj.{leaf}" in own:
                q, k, v = (own[f"self_attn.{kind}_proj.{leaf}"] for kind in "qkv")
                found[f"{prefix}self_attn.qkv_proj.{leaf}"] = torch.cat([rows(q), heads(k), heads(v)])

        if config.mla is not None:
            attention = f"{prefix}self_attn."
            fused = [own[f"self_attn.{name}.weight"] for name in ("q_a_proj", "kv_a_proj_with_mqa")]
            found[f"{attention}fused_qkv_a_proj.weight"] = torch.cat(fused)
            for name in ("q_b_proj.weight", "kv_b_proj.weight"):
                found[f"{attention}{name}"] = rows(own[f"self_attn.{name}"])

        found[f"{prefix}self_attn.o_proj.weight"] = own["self_attn.o_proj.weight"].chunk(size, dim=1)[rank]
        for path in ("mlp", "mlp.shared_experts"):
            if f"{path}.gate_proj.weight" in own:
                gate, up, down = (own[f"{path}.{kind}_proj.weight"] for kind in ("gate", "up", "down"))
                found[f"{prefix}{path}.gate_up_proj.weight"] = torch.cat([rows(gate), rows(up)])
                found[f"{prefix}{path}.down_proj.weight"] = down.chunk(size, dim=1)[rank]

        if any(".experts." in name for name in own):
            stacked = _stacked(own)
            block = "block_sparse_moe" if "block_sparse_moe.gate.weight" in own else "mlp"
            both, out = stacked[f"{block}.experts.gate_up_proj"], stacked[f"{block}.experts.down_proj"]
            if ep:
                both, out = both.tensor_split(size)[rank], out.tensor_split(size)[rank]
            else:
                gate, up = (half.chunk(size, dim=1)[rank] for half in both.chunk(2, dim=1))
                both, out = torch.cat([gate, up], dim=1), out.chunk(size, dim=2)[rank]

            found[f"{prefix}{block}.experts.w13_weight"], found[f"{prefix}{block}.experts.w2_weight"] = both, out

        found |= {f"{prefix}{name}": value for name, value in own.items() if "norm" in name or ".gate." in name}

    if last or everywhere:
        found["model.norm.weight"] = tensors["model.norm.weight"]
        if not config.tie_word_embeddings:
            found["lm_head.weight"] = padded(tensors["lm_head.weight"])

    return found


# Trainers.


def megatron(config: ModelConfig, *, tp: int, pp: int = 1, virtual: int = 1) -> Side:
    """
    Return trainers that hold a dense model as Megatron does, by the pure part of its adapter.

    :param virtual: chunks of layers on a stage: chunk ``c`` of stage ``s`` follows that of stage ``s - 1``
    """

    def build(tensors: Tensors) -> list[Actor]:
        found: list[Actor] = []
        for stage in range(pp):
            for rank in range(tp):
                found.append(Actor())
                for chunk in range(virtual):
                    _add_chunk(found[-1], tensors, config, (rank, tp), (chunk * pp + stage, pp * virtual))

        return found

    spec = f"tp={tp}" + (f",pp={pp}" if pp > 1 else "") + (f", {virtual} virtual stages each" if virtual > 1 else "")
    return Side(f"Megatron {spec}", build, MeshSpec(tp=tp, pp=pp))


def _add_chunk(actor: Actor, tensors: Tensors, config: ModelConfig, tp: tuple[int, int], pp: tuple[int, int]) -> None:
    """Put chunk ``pp[0]`` of ``pp[1]``, in the order of the layers, into an actor's memory."""
    (rank, size), (stage, stages) = tp, pp

    def add(held: torch.Tensor, runs: Sequence[Run], *, leaf: str = "weight") -> None:
        local, at = actor.keep(held), 0
        for run in runs:
            shape = tuple(tensors[f"{run.name}.{leaf}"].shape)
            rest = (0,) * (len(shape) - 1)
            actor.shards.append(Shard(f"{run.name}.{leaf}", local[at : at + run.length], (run.start, *rest), shape))
            at += run.length

    def add_columns(name: str) -> None:
        tensor = tensors[name]
        local = actor.keep(tensor.chunk(size, dim=1)[rank])
        actor.shards.append(Shard(name, local, (0, rank * local.shape[1]), tuple(tensor.shape)))

    def add_whole(name: str) -> None:
        local = actor.keep(tensors[name])
        actor.shards.append(Shard(name, local, (0,) * local.dim(), tuple(local.shape)))

    def add_vocabulary(name: str) -> None:
        tensor = tensors[f"{name}.weight"]
        held = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % (8 * size))).chunk(size)[rank]
        start = rank * held.shape[0]
        add(held, [Run(name, start, max(min(held.shape[0], tensor.shape[0] - start), 0))])

    if stage == 0:
        add_vocabulary("model.embed_tokens")

    for layer in torch.arange(config.num_layers).tensor_split(stages)[stage].tolist():
        prefix = f"model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn", f"{prefix}mlp"
        names = [f"{attention}.{kind}_proj" for kind in "qkv"]
        groups = config.num_kv_heads
        runs = query_groups(*names, heads=config.num_heads, groups=groups, head_dim=config.head_dim)
        for leaf in ("weight", "bias"):
            grouped = [tensors[f"{name}.{leaf}"].unflatten(0, (groups, -1)) for name in names]
            held = torch.cat(grouped, dim=1).flatten(0, 1).chunk(size)[rank]
            add(held, window(runs, rank * held.shape[0], (rank + 1) * held.shape[0]), leaf=leaf)

        both = [tensors[f"{mlp}.{kind}_proj.weight"].chunk(size)[rank] for kind in ("gate", "up")]
        width = both[0].shape[0]
        add(torch.cat(both), gated(f"{mlp}.gate_proj", f"{mlp}.up_proj", start=rank * width, length=width))
        add_columns(f"{attention}.o_proj.weight")
        add_columns(f"{mlp}.down_proj.weight")
        add_whole(f"{prefix}input_layernorm.weight")
        add_whole(f"{prefix}post_attention_layernorm.weight")

    if stage == stages - 1:
        add_whole("model.norm.weight")
        add_vocabulary("lm_head")


@dataclass
class _Mesh:
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


@dataclass
class _Distributed:
    """As much of a DTensor as its adapter asks for: the zoo has no process group."""

    shape: torch.Size
    device_mesh: _Mesh
    placements: tuple[Placement, ...]
    local: torch.Tensor
    requires_grad: bool = True

    def to_local(self) -> torch.Tensor:
        return self.local

    def numel(self) -> int:
        return self.shape.numel()


def dtensors(*, fsdp: int, tp: int = 1, replicas: int = 1) -> Side:
    """Return FSDP2 trainers: dim 0 in chunks of what a tensor parallel plan left, each chunk on ``replicas`` ranks."""
    sizes = (replicas, fsdp, tp)

    def build(tensors: Tensors) -> list[Actor]:
        found: list[Actor] = []
        for coordinate in torch.cartesian_prod(*(torch.arange(size) for size in sizes)).tolist():
            _, shard, rank = coordinate
            actor = Actor()
            for name, tensor in tensors.items():
                dim = _plan(name) if tp > 1 else None
                local = tensor if dim is None else _chunk(tensor, tp, rank, dim)
                local = actor.keep(_chunk(local, fsdp, shard, 0))
                fully = _StridedShard(0, split_factor=tp) if dim == 0 else Cut(0)
                placements = (Replicate(), fully, Replicate() if dim is None else Cut(dim))
                held = _Distributed(tensor.shape, _Mesh(sizes, tuple(coordinate)), placements, local)
                actor.shards += dtensor.tensor_shards(name, held)  # type: ignore[arg-type]

            found.append(actor)

        return found

    axes = [f"HSDP {replicas} x {fsdp}" if replicas > 1 else f"FSDP2 {fsdp}", *([f"tp={tp}"] if tp > 1 else [])]
    return Side(" x ".join(axes), build)


def _plan(name: str) -> int | None:
    """Return the dim that the tensor parallel plan cuts."""
    module = name.split(".")[-2]
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return 0

    return 1 if module in ("o_proj", "down_proj") else None


def _chunk(tensor: torch.Tensor, parts: int, index: int, dim: int) -> torch.Tensor:
    """Return what torch's chunks leave for a rank: nothing for the last ones, it may be."""
    chunks = tensor.chunk(parts, dim=dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def zero3(world: int) -> Side:
    """Return ZeRO-3 trainers: each parameter flattened, padded and cut by itself."""

    def build(tensors: Tensors) -> list[Actor]:
        found = [Actor() for _ in range(world)]
        for name, tensor in tensors.items():
            flat = torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % world))
            for rank, part in enumerate(flat.chunk(world)):
                local = found[rank].keep(part)
                found[rank].shards += flat_shards(local, [(name, tensor.shape)], start=rank * part.numel())

        return found

    return Side(f"ZeRO-3 {world}", build)


def fsdp1(world: int) -> Side:
    """Return FSDP1 trainers: eight parameters at a time laid end to end, padded and cut, wherever that falls."""

    def build(tensors: Tensors) -> list[Actor]:
        found = [Actor() for _ in range(world)]
        names = list(tensors)
        for first, stop in pairwise([*range(0, len(names), 8), len(names)]):
            unit = names[first:stop]
            flat = torch.cat([tensors[name].flatten() for name in unit])
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % world))
            for rank, part in enumerate(flat.chunk(world)):
                local = found[rank].keep(part)
                parameters = [(name, tensors[name].shape) for name in unit]
                found[rank].shards += flat_shards(local, parameters, start=rank * part.numel())

        return found

    return Side(f"FSDP1 {world}", build)
