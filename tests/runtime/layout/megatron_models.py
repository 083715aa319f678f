"""Real Megatron-core models, alone in a world of fake ranks or together on real ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what is not installed, and what is deprecated
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig, multi_latent_attention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe import experts, moe_utils
    from megatron.core.transformer.transformer_config import MLATransformerConfig

from tests.runtime.layout.megatron_configs import Config, is_moe, num_experts
from tests.runtime.layout.megatron_stand_ins import CoreAttention, Duplicated, GroupedExperts

__all__ = ("BEFORE_0_19", "Parallel", "build", "fake_rank", "logits", "padded", "real_rank")


#: Later releases have no ``GroupedMLP``, and build latent attention without compressed queries only with Transformer
#: Engine's norms.
BEFORE_0_19 = hasattr(experts, "GroupedMLP")


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


def build(mapping: Config, parallel: Parallel) -> list[GPTModel]:
    """Return the chunks of the model of a Hugging Face configuration that this rank holds."""
    with (
        warnings.catch_warnings(),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        mock.patch.object(multi_latent_attention, "TELinear", Duplicated),
        mock.patch.object(LocalSpecProvider, "core_attention", return_value=CoreAttention),
        mock.patch.object(experts, "gg", mock.NonCallableMagicMock(unsafe=True), create=True),
    ):
        warnings.simplefilter("ignore")
        config = _transformer_config(mapping, parallel)
        return [_chunk(mapping, parallel, config, chunk) for chunk in range(parallel.vpp or 1)]


def _chunk(mapping: Config, parallel: Parallel, config: TransformerConfig, chunk: int) -> GPTModel:
    stage = chunk if parallel.vpp else None
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage)
    model = Model(
        config,
        spec,
        vocab_size=padded(mapping, parallel),
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=bool(mapping.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        vp_stage=stage,
    )
    for layer in model.decoder.layers:
        if parallel.fused_norms:
            _fuse_norms(layer)

        if hasattr(layer.mlp, "experts"):
            _keep_experts(layer.mlp, parallel.experts)

    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.params_dtype)

    return model


def padded(mapping: Config, parallel: Parallel) -> int:
    """Return the rows of the embedding, padding included."""
    multiple = parallel.padding * parallel.tp
    return -(-mapping["vocab_size"] // multiple) * multiple


def _fuse_norms(layer: torch.nn.Module) -> None:
    """Keep norms as Transformer Engine does: in the linear modules behind them, latent projections whole."""
    attention = layer.self_attention
    if hasattr(attention, "linear_qkv"):
        attention.linear_qkv.layer_norm_weight, layer.input_layernorm = layer.input_layernorm.weight, IdentityOp()
    else:
        attention.linear_q_up_proj.layer_norm_weight = attention.q_layernorm.weight
        attention.linear_kv_up_proj.layer_norm_weight = attention.kv_layernorm.weight
        attention.q_layernorm = attention.kv_layernorm = IdentityOp()
        for name in ("linear_q_down_proj", "linear_kv_down_proj"):
            linear = getattr(attention, name)
            setattr(attention, name, Duplicated(linear.input_size, linear.output_size))

    if hasattr(layer.mlp, "linear_fc1"):
        layer.mlp.linear_fc1.layer_norm_weight, layer.pre_mlp_layernorm = layer.pre_mlp_layernorm.weight, IdentityOp()


def _keep_experts(moe: torch.nn.Module, kind: str) -> None:
    """Keep a layer's experts in one of the other ways there are."""
    if kind == "te":
        moe.experts = GroupedExperts(moe.experts)
    elif kind == "grouped":
        groups = ProcessGroupCollection.use_mpu_process_groups()
        moe.experts = experts.GroupedMLP(len(moe.local_expert_indices), moe.config, groups)


def _transformer_config(mapping: Config, parallel: Parallel) -> TransformerConfig:
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
        "kv_channels": mapping.get("head_dim", mapping["hidden_size"] // heads),
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
    }
    if num_experts(mapping):
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


def _moe_options(mapping: Config) -> dict[str, object]:
    family, layers = mapping["model_type"], mapping["num_hidden_layers"]
    width = mapping.get("moe_intermediate_size", mapping["intermediate_size"])
    shared = mapping.get("shared_expert_intermediate_size", mapping.get("n_shared_experts", 0) * width)
    return {
        "num_moe_experts": num_experts(mapping),
        "moe_ffn_hidden_size": width,
        "moe_router_topk": mapping.get("num_experts_per_tok", 2),
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": [int(is_moe(mapping, layer)) for layer in range(layers)],
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": family == "qwen2_moe",
        "moe_router_enable_expert_bias": family == "deepseek_v3",
        "moe_router_score_function": "sigmoid" if family == "deepseek_v3" else "softmax",
        "moe_router_dtype": "fp32",
    }


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
