"""The rows of the layout zoo: pairs of sides, and what other systems say of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import zoo_sides as sides
from torch.distributed.tensor import Partial
from zoo_sides import Side, Tensors

from wavecast.runtime import Shard
from wavecast.runtime.layout import dtensor, fp8, lora
from wavecast.runtime.layout.config import ModelConfig

__all__ = ("Case", "CASES")

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 192,
}
#: 8 elements a head; all widths divide by 2, 3, 4 and 6, but 4 key heads do not by 3.
DENSE = ModelConfig.from_dict({**_SIZES, "model_type": "qwen2", "head_dim": 8, "tie_word_embeddings": False})
#: Widths that divide by little: vocabulary 197, inner width 50, 5 layers.
ODD = replace(DENSE, vocab_size=197, intermediate_size=50, num_layers=5)
TIED = replace(DENSE, tie_word_embeddings=True)
#: Fewer key heads than tensor parallel ranks.
FEW = replace(DENSE, num_kv_heads=2)
MOE = ModelConfig.from_dict(
    {
        **_SIZES,
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    }
)
#: Mixtral's names: ``block_sparse_moe``, ``w1``, ``w3``, ``w2``.
MIXTRAL = ModelConfig.from_dict(
    {**_SIZES, "model_type": "mixtral", "head_dim": 8, "num_hidden_layers": 2, "num_local_experts": 8}
)
#: DeepSeek-V3: latent attention, a dense layer, then layers with routed and shared experts and a bias in float32.
LATENT = ModelConfig.from_dict(
    {
        **_SIZES,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 12,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "tie_word_embeddings": False,
    }
)
_MODELS = {
    "dense": DENSE,
    "odd": ODD,
    "tied": TIED,
    "few": FEW,
    "moe": MOE,
    "mixtral": MIXTRAL,
    "latent": LATENT,
}


@dataclass(frozen=True)
class Case:
    """
    One pair of layouts.

    :ivar name: unique in the zoo
    :ivar model: of :data:`_MODELS`
    :ivar dtype: of the source's elements
    :ivar truth: from the source's whole tensors to those that ought to arrive
    :ivar refusal: the class of the error, where there must be one
    :ivar colocated: actor ``i`` of the source and of the destination are on one device
    :ivar seed: what the seed says, where its rules for meshes do not tell
    :ivar m2n: what M2N says, where the shards do not tell
    """

    name: str
    model: str
    source: Side
    destination: Side
    dtype: torch.dtype = torch.bfloat16
    truth: Callable[[Tensors], Tensors] = dict
    refusal: str | None = None
    colocated: bool = False
    seed: str | None = None
    m2n: str | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return _MODELS[self.model]


def _pair(name: str, model: str, source: str, destination: str, replicas: int = 1, **said: str | None) -> Case:
    config = _MODELS[model]
    to = sides.mesh(config, destination)
    return Case(name, model, sides.mesh(config, source), to.times(replicas) if replicas > 1 else to, **said)  # type: ignore[arg-type]


def _without(side: Side, change: Callable[[Shard], Shard | None], title: str) -> Side:
    def changed(shards: list[Shard]) -> list[Shard]:
        return [kept for shard in shards if (kept := change(shard)) is not None]

    return side.then(title, changed)


def _mixed_fleet(config: ModelConfig, spec: str) -> Side:
    """Return two replicas of a mesh of which one holds FP8 pairs and the other bfloat16."""
    quantised, plain = sides.pairs(config, spec), sides.mesh(config, spec)

    def build(tensors: Tensors) -> list[sides.Actor]:
        whole = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if not name.endswith(fp8.SCALE)}
        return [*quantised.build(tensors), *plain.build(whole)]

    return Side(f"{quantised.title}, and {plain.title} in bfloat16", build)


def _to_bfloat16(tensors: Tensors) -> Tensors:
    """Round float32 to the nearest bfloat16, ties to even, by integers alone."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        bits = tensor.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        found[name] = rounded.to(torch.int32).to(torch.int16).view(torch.bfloat16)

    return found


def _to_pairs(tensors: Tensors) -> Tensors:
    """Quantise every projection block by block, one after the other."""
    found = dict(tensors)
    height, width = sides.BLOCK
    for name, tensor in tensors.items():
        if not fp8.is_linear_weight(name):
            continue

        rows, columns = (size // unit for size, unit in zip(tensor.shape, sides.BLOCK, strict=True))
        values, scales = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                at = (slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
                block = tensor[at].float()
                scales[row, column] = block.abs().max() / torch.tensor(448.0)
                values[at] = (block / scales[row, column]).to(torch.float8_e4m3fn)

        found[name], found[f"{name}_scale_inv"] = values, scales

    return found


_ADAPTED = tuple(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4))


def _factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(name.split(".")[2]))
    a, b = (torch.randint(-4, 5, shape, generator=generator) for shape in ((3, 48), (96, 3)))
    return a.bfloat16(), b.bfloat16()


def _with_adapters(side: Side) -> Side:
    def merge(shards: list[Shard]) -> list[Shard]:
        made = [lora.adapter(name, *_factors(name), scale=0.5) for name in _ADAPTED]
        return lora.merged(shards, made, allow_unused=True)

    return side.then("LoRA merged as it is sent", merge)


def _merged(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name in _ADAPTED:
        a, b = _factors(name)
        found[name] = (tensors[name].double() + 0.5 * (b.double() @ a.double())).float().bfloat16()

    return found


def _pending(config: ModelConfig) -> Side:
    """Return FSDP2 trainers of which one tensor's sums are still to be made."""

    def spoiled(tensors: Tensors) -> list[sides.Actor]:
        held = sides._Distributed(torch.Size((4,)), sides._Mesh((2,), (0,)), (Partial(),), torch.zeros(4))
        return [sides.Actor(shards=dtensor.tensor_shards("model.norm.weight", held))]  # type: ignore[arg-type]

    return Side("DTensor with a sum pending", spoiled)


def _norm_as(dtype: torch.dtype) -> Callable[[Shard], Shard]:
    def change(shard: Shard) -> Shard:
        assert isinstance(shard.view, torch.Tensor)
        return replace(shard, view=shard.view.to(dtype)) if shard.name == "model.norm.weight" else shard

    return change


def _padded_shape(shard: Shard) -> Shard:
    if shard.name != "lm_head.weight":
        return shard

    return replace(shard, global_shape=(256, *shard.global_shape[1:]))


_MEGATRON_ONLY = "out of reach: maps ranks of Megatron's axes only"
_NO_SUCH = "out of reach: its trainers and engines know no such layout"
_TWO_FAMILIES = "out of reach: its engines load Qwen and Llama only"
_ONE_CHUNK = "refuses: virtual pipeline stages"
_D, _O, _M, _T, _F, _X, _L = DENSE, ODD, MOE, TIED, FEW, MIXTRAL, LATENT

CASES: tuple[Case, ...] = (
    # Tensor and pipeline parallelism of any two sizes.
    _pair("tp 2 to 2", "dense", "tp=2", "tp=2"),
    _pair("tp 3 to 2", "dense", "tp=3", "tp=2"),
    _pair("tp 2 to 3", "dense", "tp=2", "tp=3"),
    _pair("tp 4 to 6", "dense", "tp=4", "tp=6"),
    _pair("tp 6 to 4, uneven", "odd", "tp=6", "tp=4"),
    _pair("tp 5 to 7, uneven", "odd", "tp=5", "tp=7"),
    _pair("one to tp 12", "dense", "tp=1", "tp=12"),
    _pair("tp 4 to one", "dense", "tp=4", "tp=1"),
    _pair("pp 2 x tp 2 to tp 4, 3 replicas", "dense", "tp=2,pp=2", "tp=4", 3),
    _pair("tp 2 to tp 4, 3 replicas", "dense", "tp=2", "tp=4", 3),
    _pair("one to tp 2, 3 replicas", "dense", "tp=1", "tp=2", 3),
    _pair("dp 2 x tp 2 to one, 2 replicas", "dense", "tp=2,dp=2", "tp=1", 2),
    _pair("pp 4 to tp 2, 2 replicas", "dense", "pp=4", "tp=2", 2),
    _pair("pp 3 to pp 2, 5 replicas", "odd", "pp=3", "pp=2", 5),
    _pair("pp 1 to pp 4", "dense", "tp=4", "pp=4"),
    _pair("dp 3 to one, 7 replicas", "dense", "dp=3", "tp=1", 7),
    _pair("odd destination offset: 3 sources, tp 1 to 2", "dense", "dp=3", "tp=2"),
    _pair(
        "tied embeddings on both ends of a pipeline",
        "tied",
        "tp=2,pp=2",
        "tp=4",
        seed="untold: tied embeddings were mended in a later version",
    ),
    # Experts.
    _pair("ep 8 to tp 4", "moe", "dp=8,ep=8", "tp=4"),
    _pair("ep 2 to ep 4", "moe", "tp=1,dp=2,ep=2", "tp=1,dp=4,ep=4"),
    _pair("ep 4 x tp 2 to tp 4, 2 replicas", "moe", "tp=2,dp=2,ep=4", "tp=4", 2),
    _pair("ep 2 x etp 2 to etp 3", "moe", "tp=2,dp=2,ep=2,etp=2", "tp=3,etp=3"),
    _pair("ep 3 (8 experts) to ep 8", "moe", "tp=1,dp=3,ep=3", "dp=8,ep=8"),
    _pair("pp 2 x ep 2 to one, 3 replicas", "moe", "dp=2,pp=2,ep=2", "tp=1", 3),
    _pair("Mixtral, ep 4 x etp 2 to etp 3", "mixtral", "tp=2,dp=4,ep=4,etp=2", "tp=3,etp=3", seed=_TWO_FAMILIES),
    _pair("latent attention, pp 2 x ep 4 to ep 3", "latent", "tp=2,dp=2,pp=2,ep=4", "dp=3,ep=3", 2, seed=_TWO_FAMILIES),
    _pair("latent attention, tp 5 to 3", "latent", "tp=5", "tp=3", seed=_TWO_FAMILIES),
    # Engines of vLLM's make.
    Case("Megatron tp 2 to vLLM tp 4", "dense", sides.megatron(_D, tp=2), sides.engine(_D, tp=4)),
    Case(
        "Megatron pp 2 to vLLM pp 2, 3 replicas",
        "dense",
        sides.megatron(_D, tp=2, pp=2),
        sides.engine(_D, tp=2, pp=2).times(3),
    ),
    Case("fewer key heads than tp: vLLM tp 12", "few", sides.megatron(_F, tp=2), sides.engine(_F, tp=12)),
    Case("query groups cut: Megatron tp 4 to vLLM tp 2", "few", sides.megatron(_F, tp=4), sides.engine(_F, tp=2)),
    Case("Megatron tp 2 to Megatron tp 4 x pp 2", "few", sides.megatron(_F, tp=2), sides.megatron(_F, tp=4, pp=2)),
    Case(
        "virtual stages: Megatron pp 2 x 2 to vLLM tp 2",
        "dense",
        sides.megatron(_D, tp=2, pp=2, virtual=2),
        sides.engine(_D, tp=2).times(2),
        seed=_ONE_CHUNK,
    ),
    Case(
        "virtual stages of uneven depth to pp 3",
        "odd",
        sides.megatron(_O, tp=1, pp=2, virtual=2),
        sides.mesh(_O, "tp=2,pp=3"),
        seed=_ONE_CHUNK,
    ),
    Case(
        "to virtual stages: tp 3 to Megatron pp 2 x 2",
        "dense",
        sides.mesh(_D, "tp=3"),
        sides.megatron(_D, tp=2, pp=2, virtual=2),
        seed=_ONE_CHUNK,
    ),
    Case("vLLM to Megatron", "dense", sides.engine(_D, tp=4), sides.megatron(_D, tp=2, pp=2), seed=_NO_SUCH),
    Case("experts shared out: ep 8 to vLLM tp 4", "moe", sides.mesh(_M, "dp=8,ep=8"), sides.engine(_M, tp=4, ep=True)),
    Case("experts sliced: ep 2 to vLLM tp 2", "moe", sides.mesh(_M, "dp=2,ep=2"), sides.engine(_M, tp=2).times(2)),
    Case(
        "Transformers to vLLM, experts stacked",
        "moe",
        sides.whole(_M),
        sides.engine(_M, tp=4).times(3),
        seed=_MEGATRON_ONLY,
    ),
    Case(
        "Mixtral, ep 8 to vLLM tp 4",
        "mixtral",
        sides.mesh(_X, "dp=8,ep=8"),
        sides.engine(_X, tp=4).times(2),
        seed=_TWO_FAMILIES,
    ),
    Case(
        "latent attention, ep 4 x etp 2 to vLLM tp 4, experts shared out",
        "latent",
        sides.mesh(_L, "tp=2,dp=4,ep=4,etp=2"),
        sides.engine(_L, tp=4, ep=True),
        seed=_TWO_FAMILIES,
    ),
    Case(
        "latent attention, tp 3 to vLLM tp 2 x pp 2",
        "latent",
        sides.mesh(_L, "tp=3"),
        sides.engine(_L, tp=2, pp=2),
        seed=_TWO_FAMILIES,
    ),
    Case("tied head to vLLM", "tied", sides.mesh(_T, "tp=3"), sides.engine(_T, tp=4, pp=2)),
    # FSDP, ZeRO, and meshes of more dims.
    Case("FSDP2 on 5 ranks to vLLM tp 4", "dense", sides.dtensors(fsdp=5), sides.engine(_D, tp=4), seed=_MEGATRON_ONLY),
    Case("FSDP2 on 7 ranks to tp 2", "odd", sides.dtensors(fsdp=7), sides.mesh(_O, "tp=2"), seed=_MEGATRON_ONLY),
    Case(
        "FSDP2 x tp to vLLM: 2-D tiles",
        "dense",
        sides.dtensors(fsdp=3, tp=2),
        sides.engine(_D, tp=4).times(2),
        seed=_MEGATRON_ONLY,
    ),
    Case(
        "HSDP x tp to a pipeline",
        "dense",
        sides.dtensors(fsdp=2, tp=2, replicas=2),
        sides.mesh(_D, "tp=2,pp=2"),
        seed=_MEGATRON_ONLY,
    ),
    Case("tp to FSDP2", "odd", sides.mesh(_O, "tp=3"), sides.dtensors(fsdp=4), seed=_NO_SUCH),
    Case(
        "2-D tiles to 2-D tiles",
        "dense",
        sides.dtensors(fsdp=2, tp=3),
        sides.dtensors(fsdp=3, tp=2),
        seed=_MEGATRON_ONLY,
    ),
    Case("ZeRO-3 on 7 ranks to vLLM tp 2", "dense", sides.zero3(7), sides.engine(_D, tp=2), seed=_MEGATRON_ONLY),
    Case("FSDP1 on 3 ranks to tp 4", "dense", sides.fsdp1(3), sides.mesh(_D, "tp=4"), seed=_MEGATRON_ONLY),
    Case(
        "FSDP2 of a mixture of experts to ep 3",
        "moe",
        sides.dtensors(fsdp=6),
        sides.mesh(_M, "dp=3,ep=3"),
        seed=_MEGATRON_ONLY,
    ),
    # Places, dtypes, elements worked out on the way.
    Case("colocated, tp 2 to 3", "dense", sides.mesh(_D, "tp=2"), sides.mesh(_D, "tp=3"), colocated=True),
    Case(
        "float32 to bfloat16, tp 3 to 2",
        "dense",
        sides.mesh(_D, "tp=3"),
        sides.mesh(_D, "tp=2"),
        torch.float32,
        _to_bfloat16,
    ),
    Case(
        "bfloat16 to FP8 pairs",
        "dense",
        sides.quantised(sides.mesh(_D, "tp=1,pp=2")),
        sides.pairs(_D, "tp=2"),
        truth=_to_pairs,
        seed="refuses: FP8 was taken out again",
        m2n="refuses: one dtype on both sides",
    ),
    Case(
        "LoRA to vLLM tp 4",
        "dense",
        _with_adapters(sides.whole(_D)),
        sides.engine(_D, tp=4),
        truth=_merged,
        seed=_MEGATRON_ONLY,
        m2n="serves only weights that were merged before",
    ),
    # What cannot be.
    Case(
        "a tensor that no source has",
        "dense",
        _without(sides.mesh(_D, "tp=2"), lambda s: None if s.name == "lm_head.weight" else s, "no lm_head"),
        sides.mesh(_D, "tp=3"),
        refusal="LayoutError",
        seed="keeps stale weights",
        m2n="not asked: a call has both ends",
    ),
    Case(
        "part of the rows",
        "dense",
        _without(
            sides.mesh(_D, "tp=2"),
            lambda s: None if s.offset == (96, 0) else s,
            "second half of the vocabulary left out",
        ),
        sides.mesh(_D, "tp=3"),
        refusal="LayoutError",
        seed="keeps stale weights",
        m2n="not asked: a call has both ends",
    ),
    Case(
        "global shapes that disagree",
        "dense",
        sides.mesh(_D, "tp=2"),
        _without(sides.mesh(_D, "tp=2"), _padded_shape, "lm_head said to have 256 rows"),
        refusal="LayoutError",
        seed="not checked unless it validates",
        m2n="refuses",
    ),
    Case(
        "float to integer",
        "dense",
        sides.mesh(_D, "tp=2"),
        _without(sides.mesh(_D, "tp=2"), _norm_as(torch.int32), "an int32 norm"),
        refusal="LayoutError",
        seed="not checked unless it validates",
        m2n="refuses: one dtype on both sides",
    ),
    Case(
        "FP8 without its scales",
        "dense",
        _without(sides.mesh(_D, "tp=2"), _norm_as(torch.float8_e4m3fn), "a float8 norm"),
        sides.mesh(_D, "tp=2"),
        refusal="LayoutError",
        seed="not checked unless it validates",
        m2n="refuses: one dtype on both sides",
    ),
    Case(
        "FP8 blocks cut between ranks",
        "dense",
        sides.quantised(sides.mesh(_D, "tp=5")),
        sides.pairs(_D, "tp=2"),
        truth=_to_pairs,
        refusal="LayoutError",
        seed="refuses: FP8 was taken out again",
        m2n="refuses: one dtype on both sides",
    ),
    Case(
        "a mixed fleet: FP8 pairs and bfloat16 in one group",
        "dense",
        sides.quantised(sides.mesh(_D, "tp=2")),
        _mixed_fleet(_D, "tp=2"),
        truth=_to_pairs,
        refusal="LayoutError",
        seed="refuses: FP8 was taken out again",
        m2n="not asked: a call has one destination",
    ),
    Case(
        "sums pending",
        "dense",
        _pending(_D),
        sides.mesh(_D, "tp=2"),
        refusal="LayoutError",
        seed=_MEGATRON_ONLY,
        m2n="refuses: no partial sums",
    ),
    Case(
        "an engine that cannot be: tp 5",
        "dense",
        sides.mesh(_D, "tp=2"),
        Side("vLLM tp=5", sides.engine(_D, tp=5).build),
        refusal="ConfigError",
        seed="refuses",
        m2n="not asked: no such engine",
    ),
)
