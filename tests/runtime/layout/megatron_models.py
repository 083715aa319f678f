"""
Real Megatron-core models of known weights.

The weights go in, and are read back, by Megatron's own rules: ``sharded_state_dict()`` says where in a whole tensor
each local one sits. What the whole tensors are made of is written here, from what each architecture does with them.
The adapter takes no part.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is not installed, and what is deprecated
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig, multi_latent_attention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe import grouped_gemm_util, moe_utils
    from megatron.core.transformer.moe.experts import GroupedMLP, TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from wavecast.runtime import Shard

__all__ = (
    "LLAMA",
    "BIASED",
    "QWEN2",
    "TIED",
    "QWEN3",
    "QWEN2_MOE",
    "QWEN3_MOE",
    "MIXTRAL",
    "DEEPSEEK",
    "Parallel",
    "fake_rank",
    "real_rank",
    "build",
    "padded",
    "whole_tensors",
    "whole_shards",
    "fill",
    "read",
    "logits",
)

Tensors = dict[str, torch.Tensor]

# Hugging Face configurations, small, with sizes that many meshes divide.
BASE = {"hidden_size": 24, "num_hidden_layers": 4, "vocab_size": 23, "intermediate_size": 48, "num_attention_heads": 12}
LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 4}
BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True}
QWEN2 = {**BASE, "model_type": "qwen2", "num_key_value_heads": 2}
TIED = {**QWEN2, "tie_word_embeddings": True}
QWEN3 = {**BASE, "model_type": "qwen3", "num_key_value_heads": 6, "head_dim": 4}
QWEN2_MOE = {
    **QWEN2,
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "decoder_sparse_step": 2,
}
QWEN3_MOE = {**QWEN3, "model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 8, "mlp_only_layers": [1]}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}
DEEPSEEK = {
    **BASE,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}


@dataclass(frozen=True)
class Parallel:
    """
    How a model is spread.

    :ivar vpp: chunks of a rank, or None
    :ivar options: further settings of the ``TransformerConfig``
    :ivar experts: "sequential", "grouped" or "te"
    :ivar fused_norms: norms sit in the linear modules behind them, as Transformer Engine's do
    :ivar padding: rows of the embedding are padded to a multiple of this times tp
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    experts: str = "sequential"
    fused_norms: bool = False
    padding: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class Norm(torch.nn.Module):
    """An RMS norm that does not mind sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(states.float(), states.shape[-1:], self.weight.float(), self.eps).to(states)


class CoreAttention(torch.nn.Module):
    """Causal attention in plain torch, with keys and values of different widths: Megatron's own allows none."""

    def __init__(self, *, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object):
        """Take and return (sequence, batch, heads, width), the last two joined in what is returned."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


class NormedColumnParallel(ColumnParallelLinear):
    """Stands for Transformer Engine's linear module with a norm in front: the same parameters and names."""

    def __init__(self, input_size: int, output_size: int, **options: object) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))


class Duplicated(torch.nn.Module):
    """Stands for Transformer Engine's linear module that is whole on every rank."""

    def __init__(self, input_size: int, output_size: int, **_: object) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return the whole tensor, as Megatron's module does."""
        return make_sharded_tensors_for_checkpoint({"weight": self.weight}, prefix, {}, sharded_offsets)


class Grouped(torch.nn.Module):
    """Stands for Transformer Engine's grouped linear module: a parameter for each expert, numbered."""

    dim = 0

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, pg_collection: object, **options: object
    ) -> None:
        super().__init__()
        self.groups = pg_collection
        shape = [output_size, input_size]
        shape[self.dim] //= pg_collection.expt_tp.size()  # type: ignore[attr-defined]
        for index in range(num_gemms):
            self.register_parameter(f"weight{index}", torch.nn.Parameter(torch.empty(shape)))

        self.count = num_gemms

    def sharded_state_dict(self, prefix: str, sharded_offsets: tuple = (), metadata: object = None) -> dict:
        """Return one whole tensor for all experts, as Megatron's module does."""
        ep = self.groups.ep  # type: ignore[attr-defined]
        found = {}
        for index in range(self.count):
            expert = (len(sharded_offsets), ep.rank() * self.count + index, ep.size() * self.count)
            offsets = (*sharded_offsets, expert)
            own = {"weight": getattr(self, f"weight{index}")}
            made = make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {"weight": self.dim},
                offsets,
                tp_group=self.groups.expt_tp,  # type: ignore[attr-defined]
                dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
            found[f"{prefix}weight{index}"] = made[f"{prefix}weight"]

        return found


class GroupedColumn(Grouped):
    """Splits rows."""


class GroupedRow(Grouped):
    """Splits columns."""

    dim = 1


@contextlib.contextmanager
def fake_rank(rank: int, parallel: Parallel) -> Iterator[None]:
    """Make this process rank ``rank`` of a world in which nobody else is: collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=rank, world_size=parallel.world_size, store=FakeStore())
    with _state(parallel, gloo=False):
        yield


@contextlib.contextmanager
def real_rank(rank: int, parallel: Parallel, store: str) -> Iterator[None]:
    """Make this process rank ``rank`` of a world that meets at the file ``store``, on gloo."""
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=parallel.world_size, init_method=f"file://{store}"
    )
    with _state(parallel, gloo=True):
        yield


@contextlib.contextmanager
def _state(parallel: Parallel, *, gloo: bool) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_state.initialize_model_parallel(
                parallel.tp,
                parallel.pp,
                parallel.vpp,
                expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=parallel.etp,
                create_gloo_process_groups=gloo,
            )

        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


class Model(GPTModel):
    """A ``GPTModel`` that does not ask for a GPU to make its tied embeddings equal: here they are filled."""

    def _is_in_embd_group(self) -> bool:
        return False


def build(mapping: Mapping[str, object], parallel: Parallel) -> list[GPTModel]:
    """Return the chunks of the model of a Hugging Face configuration that this rank holds."""
    with (
        warnings.catch_warnings(),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch.object(multi_latent_attention, "TELinear", Duplicated),
        mock.patch.object(grouped_gemm_util, "assert_grouped_gemm_is_available"),
    ):
        warnings.simplefilter("ignore")
        config = _transformer_config(mapping, parallel)
        return [_chunk(mapping, parallel, config, chunk) for chunk in range(parallel.vpp or 1)]


def _chunk(mapping: Mapping[str, object], parallel: Parallel, config: TransformerConfig, chunk: int) -> GPTModel:
    stage = chunk if parallel.vpp else None
    model = Model(
        config,
        _block(config, parallel, stage),
        vocab_size=padded(mapping, parallel),
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=bool(mapping.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        vp_stage=stage,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.params_dtype)

    return model


def padded(mapping: Mapping[str, object], parallel: Parallel) -> int:
    """Return the rows of the embedding, padding included."""
    multiple = parallel.padding * parallel.tp
    return -(-int(mapping["vocab_size"]) // multiple) * multiple  # type: ignore[call-overload]


def _block(config: TransformerConfig, parallel: Parallel, stage: int | None) -> TransformerBlockSubmodules:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    return TransformerBlockSubmodules(
        layer_specs=[_layer(layer, parallel) for layer in spec.layer_specs], layer_norm=Norm
    )


def _layer(spec: ModuleSpec, parallel: Parallel) -> ModuleSpec:
    """Return the layer with norms of our own, and with experts and norms kept in the way asked for."""
    spec = copy.deepcopy(spec)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.core_attention = CoreAttention
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) not in (IdentityOp, None):
            setattr(attention, name, Norm)

    moe = hasattr(layer.mlp.submodules, "experts")
    if parallel.fused_norms:
        if hasattr(attention, "linear_qkv"):
            attention.linear_qkv, layer.input_layernorm = NormedColumnParallel, IdentityOp
        else:
            attention.linear_q_up_proj = attention.linear_kv_up_proj = NormedColumnParallel
            attention.linear_q_down_proj = attention.linear_kv_down_proj = Duplicated
            attention.q_layernorm = attention.kv_layernorm = IdentityOp

        if not moe:
            layer.mlp.submodules.linear_fc1, layer.pre_mlp_layernorm = NormedColumnParallel, IdentityOp

        layer.sharded_state_dict_keys_map = {}

    if moe and parallel.experts == "te":
        experts = copy.copy(layer.mlp.submodules.experts.submodules)
        experts.linear_fc1, experts.linear_fc2 = GroupedColumn, GroupedRow
        layer.mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=experts)
    elif moe and parallel.experts == "grouped":
        layer.mlp.submodules.experts = ModuleSpec(module=GroupedMLP)

    return spec


def _transformer_config(mapping: Mapping[str, object], parallel: Parallel) -> TransformerConfig:
    """Return what a user of Megatron would set for the model."""
    family = mapping["model_type"]
    heads = mapping["num_attention_heads"]
    bias = bool(mapping.get("attention_bias", False))
    options: dict[str, object] = {
        "num_layers": mapping["num_hidden_layers"],
        "hidden_size": mapping["hidden_size"],
        "ffn_hidden_size": mapping["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": mapping.get("num_key_value_heads", heads),
        "kv_channels": mapping.get("head_dim", mapping["hidden_size"] // heads),  # type: ignore[operator]
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "add_bias_linear": bias,
        "add_qkv_bias": bias or family in ("qwen2", "qwen2_moe"),
        "qk_layernorm": family in ("qwen3", "qwen3_moe", "deepseek_v3"),
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "sequence_parallel": parallel.tp > 1 and _experts(mapping) > 0,
    }
    if _experts(mapping):
        options |= _moe_options(mapping)

    if family == "deepseek_v3":
        options |= {
            "multi_latent_attention": True,
            "q_lora_rank": mapping.get("q_lora_rank"),
            "kv_lora_rank": mapping["kv_lora_rank"],
            "qk_head_dim": mapping["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": mapping["qk_rope_head_dim"],
            "v_head_dim": mapping["v_head_dim"],
            "rope_type": "rope",
        }
        return MLATransformerConfig(**{**options, **parallel.options})

    return TransformerConfig(**{**options, **parallel.options})


def _moe_options(mapping: Mapping[str, object]) -> dict[str, object]:
    family, layers = mapping["model_type"], int(mapping["num_hidden_layers"])  # type: ignore[call-overload]
    width = mapping.get("moe_intermediate_size", mapping["intermediate_size"])
    shared = mapping.get("shared_expert_intermediate_size", mapping.get("n_shared_experts", 0) * width)  # type: ignore[operator]
    return {
        "num_moe_experts": _experts(mapping),
        "moe_ffn_hidden_size": width,
        "moe_router_topk": mapping.get("num_experts_per_tok", 2),
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": [int(_is_moe(mapping, layer)) for layer in range(layers)],
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": family == "qwen2_moe",
        "moe_router_enable_expert_bias": family == "deepseek_v3",
        "moe_router_score_function": "sigmoid" if family == "deepseek_v3" else "softmax",
        "moe_router_dtype": "fp32",
    }


def _experts(mapping: Mapping[str, object]) -> int:
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if key in mapping:
            return int(mapping[key])  # type: ignore[call-overload]

    return 0


def _is_moe(mapping: Mapping[str, object], layer: int) -> bool:
    """Tell whether a layer has experts, by what Transformers' modules do with their configurations."""
    if mapping["model_type"] == "deepseek_v3":
        return layer >= mapping["first_k_dense_replace"]  # type: ignore[operator]

    if not _experts(mapping) or layer in mapping.get("mlp_only_layers", ()):  # type: ignore[operator]
        return False

    return (layer + 1) % mapping.get("decoder_sparse_step", 1) == 0  # type: ignore[operator]


def whole_tensors(checkpoint: Mapping[str, torch.Tensor], mapping: Mapping[str, object], rows: int) -> Tensors:
    """
    Return Megatron's whole tensors of a checkpoint, under the keys of its distributed checkpoints.

    :param rows: of the vocabulary, padding included; the padding is of a value that no checkpoint here has
    """
    whole: Tensors = {}
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        if name in checkpoint:
            true = checkpoint[name]
            whole[key] = torch.cat([true, torch.full((rows - len(true), true.shape[1]), -7.0, dtype=true.dtype)])

    whole["decoder.final_layernorm.weight"] = checkpoint["model.norm.weight"]
    for layer in range(int(mapping["num_hidden_layers"])):  # type: ignore[call-overload]
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in checkpoint.items() if name.startswith(prefix)}
        for key, value in (_attention(own, mapping) | _mlp(own, mapping)).items():
            whole[f"decoder.layers.{layer}.{key}"] = value

    return whole


def whole_shards(checkpoint: Mapping[str, torch.Tensor]) -> list[Shard]:
    """Return the shards of someone who holds everything."""
    return [Shard(name, value, (0,) * value.dim(), tuple(value.shape)) for name, value in checkpoint.items()]


def _attention(own: Tensors, mapping: Mapping[str, object]) -> Tensors:
    found = {
        "input_layernorm.weight": own["input_layernorm.weight"],
        "self_attention.linear_qkv.layer_norm_weight": own["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": own["post_attention_layernorm.weight"],
        "mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"],
    }
    renamed = {
        "q_norm.weight": ("q_layernorm.weight",),
        "k_norm.weight": ("k_layernorm.weight",),
        "q_a_layernorm.weight": ("q_layernorm.weight", "linear_q_up_proj.layer_norm_weight"),
        "kv_a_layernorm.weight": ("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight"),
        "o_proj.weight": ("linear_proj.weight",),
        "o_proj.bias": ("linear_proj.bias",),
        "q_a_proj.weight": ("linear_q_down_proj.weight",),
        "q_b_proj.weight": ("linear_q_up_proj.weight",),
        "kv_a_proj_with_mqa.weight": ("linear_kv_down_proj.weight",),
        "kv_b_proj.weight": ("linear_kv_up_proj.weight",),
    }
    if "kv_lora_rank" in mapping:
        renamed["q_proj.weight"] = ("linear_q_proj.weight",)

    for name, keys in renamed.items():
        if f"self_attn.{name}" in own:
            found |= {f"self_attention.{key}": own[f"self_attn.{name}"] for key in keys}

    if "kv_lora_rank" not in mapping:
        groups = int(mapping["num_key_value_heads"])  # type: ignore[call-overload]
        for leaf in ("weight", "bias"):
            if f"self_attn.q_proj.{leaf}" in own:
                # Each group of query heads is followed by the key and the value head they share.
                parts = [own[f"self_attn.{kind}_proj.{leaf}"] for kind in "qkv"]
                grouped = [value.reshape(groups, -1, *value.shape[1:]) for value in parts]
                joined = torch.cat(grouped, dim=1)
                found[f"self_attention.linear_qkv.{leaf}"] = joined.reshape(-1, *parts[0].shape[1:])

    return found


def _mlp(own: Tensors, mapping: Mapping[str, object]) -> Tensors:
    found: Tensors = {}

    def gated(key: str, name: str) -> None:
        for leaf in ("weight", "bias"):
            if f"{name}.gate_proj.{leaf}" in own:
                found[f"{key}.linear_fc1.{leaf}"] = torch.cat(
                    [own[f"{name}.gate_proj.{leaf}"], own[f"{name}.up_proj.{leaf}"]]
                )
                found[f"{key}.linear_fc2.{leaf}"] = own[f"{name}.down_proj.{leaf}"]

    gated("mlp", "mlp")
    gated("mlp.shared_experts", "mlp.shared_expert")
    gated("mlp.shared_experts", "mlp.shared_experts")
    moe = "block_sparse_moe" if "block_sparse_moe.gate.weight" in own else "mlp"
    for key, name in (
        ("mlp.router.weight", f"{moe}.gate.weight"),
        ("mlp.router.expert_bias", f"{moe}.gate.e_score_correction_bias"),
        ("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),
    ):
        if name in own:
            found[key] = own[name]

    if f"{moe}.gate.weight" in own:
        gate, up, down = ("w1", "w3", "w2") if moe != "mlp" else ("gate_proj", "up_proj", "down_proj")
        experts = [f"{moe}.experts.{index}." for index in range(_experts(mapping))]
        inward = [torch.cat([own[f"{name}{gate}.weight"], own[f"{name}{up}.weight"]]) for name in experts]
        found["mlp.experts.experts.linear_fc1.weight"] = torch.stack(inward)
        found["mlp.experts.experts.linear_fc2.weight"] = torch.stack([own[f"{name}{down}.weight"] for name in experts])

    return found


def fill(chunks: Sequence[GPTModel], whole: Tensors) -> None:
    """Write this rank's part of Megatron's whole tensors into its model."""
    for chunk in chunks:
        for entry in _entries(chunk):
            if isinstance(entry, ShardedTensorFactory):
                value = entry.merge_fn(_map(lambda part: _part(part, whole), entry.build()))
            else:
                value = _part(entry, whole)

            assert value.shape == entry.data.shape
            entry.data.detach().copy_(value)


def read(chunks: Sequence[GPTModel]) -> list[tuple[str, tuple[slice | int, ...], torch.Tensor]]:
    """Return what this rank holds of Megatron's whole tensors: key, where, elements."""
    found: list[tuple[str, tuple[slice | int, ...], torch.Tensor]] = []
    for chunk in chunks:
        for entry in _entries(chunk):
            built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
            _map(lambda part: found.append((part.key, _where(part), part.data.detach().clone())), built)

    return found


def _entries(chunk: GPTModel) -> list[ShardedTensor | ShardedTensorFactory]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})

    return [entry for entry in state.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory)]


def _map(function, built):  # type: ignore[no-untyped-def]
    """Apply ``function`` to each sharded tensor that a factory made."""
    if isinstance(built, ShardedTensor):
        return function(built)

    if isinstance(built, dict):
        return {key: _map(function, value) for key, value in built.items()}

    return [_map(function, value) for value in built]


def _part(part: ShardedTensor, whole: Tensors) -> torch.Tensor:
    value = whole[part.key]
    assert tuple(value.shape) == tuple(part.global_shape), (part.key, value.shape, part.global_shape)
    return value[_where(part)]


def _where(part: ShardedTensor) -> tuple[slice | int, ...]:
    own = part.global_offset[part.prepend_axis_num :]
    return (
        *part.global_offset[: part.prepend_axis_num],
        *(slice(start, start + length) for start, length in zip(own, part.local_shape, strict=True)),
    )


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the model's logits on this CPU, where Megatron asks for a GPU."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        warnings.simplefilter("ignore")
        result: torch.Tensor = model.eval()(tokens, positions, None)
        return result
