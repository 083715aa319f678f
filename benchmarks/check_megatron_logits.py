"""
Whether a Megatron-core model and a Transformers model compute the same after weights went from one to the other.

    python benchmarks/check_megatron_logits.py                  # all families on one GPU, a JSON object
    python benchmarks/check_megatron_logits.py qwen3 qwen3-moe --dtype bfloat16
    python benchmarks/check_megatron_logits.py --device cpu     # without a GPU, where Megatron would ask for one

For each family: a Megatron ``GPTModel`` with random weights is the source, a Transformers model of the same
configuration, with other weights, the destination; shards, plan and copies are the library's. Then the Transformers
model gets new weights, and they go the other way. Weights move in the dtype asked for; logits are computed in float32
from what arrived, since rounding on the way through the layers would choose other experts. Needs megatron-core and
transformers; exits with 1 where a logit differs by more than one part in 10,000 of the largest.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from common import environment

from wavecast.runtime import Shard, describe, plan_reshard
from wavecast.runtime.layout import hf_live, megatron
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.program import Cut

__all__ = ("main",)

Config = dict[str, Any]

_BASE: Config = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_EXPERTS: Config = {"num_experts": 8, "moe_intermediate_size": 256}
_DEEPSEEK: Config = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

#: Transformers' configurations, and what Megatron is told besides of how experts are chosen.
MODELS: Mapping[str, tuple[Config, Config]] = {
    "llama": ({"model_type": "llama"}, {}),
    "llama-biased": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, {}),
    "qwen2-tied": ({"model_type": "qwen2", "tie_word_embeddings": True}, {}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 64}, {}),
    "qwen2-moe": (
        {"model_type": "qwen2_moe", **_EXPERTS, "shared_expert_intermediate_size": 256, "norm_topk_prob": False},
        {"moe_router_pre_softmax": True},
    ),
    "qwen3-moe": ({"model_type": "qwen3_moe", "head_dim": 64, **_EXPERTS, "norm_topk_prob": True}, {}),
    "mixtral": ({"model_type": "mixtral", "num_local_experts": 8}, {}),
    "deepseek-v3": (
        {"model_type": "deepseek_v3", **_DEEPSEEK},
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5},
    ),
}

_TOLERANCE = 1e-4


class TorchAttention(torch.nn.Module):
    """Causal attention in plain torch: Megatron's own needs keys and values of one width."""

    def __init__(self, *, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> torch.Tensor:
        """Take and return (sequence, batch, heads, width), the last two joined in what is returned."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", choices=[*MODELS, []], metavar="MODEL", help=f"of {', '.join(MODELS)}; by default all"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    results = {}
    with warnings.catch_warnings(), _one_rank(arguments.device, arguments.seed):
        warnings.simplefilter("ignore")
        for name in arguments.models or MODELS:
            results[name] = check(name, arguments.device, arguments.dtype, arguments.seed)

    passed = all(result["passed"] for result in results.values())
    packages = {name: importlib.metadata.version(name) for name in ("megatron-core", "transformers")}
    report = {**environment(), "packages": packages, "dtype": arguments.dtype, "models": results, "passed": passed}
    print(json.dumps(report, indent=2))
    return 0 if passed else 1


def check(name: str, device: str, dtype: str, seed: int) -> dict[str, Any]:
    """Move weights both ways between two models of the family, and compare their logits after each."""
    family, routing = MODELS[name]
    mapping = {**_BASE, **family}
    config = ModelConfig.from_dict(mapping)
    trainer = megatron_model(mapping, routing, device, getattr(torch, dtype))
    engine = transformers_model(mapping, device, getattr(torch, dtype))
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (2, 64), generator=generator, device=device)
    directions: dict[str, dict[str, Any]] = {}
    for direction in ("megatron to transformers", "transformers to megatron"):
        for model in (trainer, engine):
            randomise(model, generator)

        sides = megatron.shards(trainer, config), hf_live.shards(engine, config)
        start = time.perf_counter()
        nbytes = move(*(sides if direction.startswith("megatron") else sides[::-1]))
        seconds = time.perf_counter() - start
        found, wanted = megatron_logits(trainer, tokens)[..., : config.vocab_size], transformers_logits(engine, tokens)
        differences, scale = (found - wanted).abs().amax(-1), wanted.abs().max().item()
        directions[direction] = {
            "nbytes": nbytes,
            "seconds": seconds,
            "largest_difference": differences.max().item(),
            "largest_logit": scale,
            # One or two of many, with experts: a tie that was decided otherwise. More: weights in the wrong place.
            "tokens_that_differ": int((differences > _TOLERANCE * scale).sum()),
            "passed": bool((differences <= _TOLERANCE * scale).all()),
        }

    return {**directions, "passed": all(result["passed"] for result in directions.values())}


def move(source: Sequence[Shard], destination: Sequence[Shard]) -> int:
    """Plan, then copy route by route from one list of shards to the other; return the bytes moved."""
    plan = plan_reshard([describe(source)], [describe(destination)])
    held, wanted = Memory(source), Memory(destination)
    for route in plan.routes:
        cut = Cut(route.tensor, route.offset, route.extent, route.dtype)
        elements = held.source(cut)
        for target in wanted.targets(cut):
            as_bits(target).copy_(as_bits(elements.to(target.dtype)))

    return plan.nbytes


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give a model weights of its own; gains stay near one, so that logits have some size."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, torch.nn.Parameter) or name.endswith(("expert_bias", "e_score_correction_bias")):
            gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            tensor.copy_(noise * 0.1 + gain)


@contextlib.contextmanager
def in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Let a model compute in float32, with the weights it has."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in kept:
        parameter.data = data.float()

    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@torch.no_grad()
def megatron_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits, computed in float32."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    mask = torch.ones((1, 1, tokens.shape[1], tokens.shape[1]), dtype=torch.bool, device=tokens.device).triu(1)
    with in_float32(model):
        logits: torch.Tensor = model(tokens, positions, mask)
        return logits


@torch.no_grad()
def transformers_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits, computed in float32."""
    with in_float32(model):
        logits: torch.Tensor = model(tokens).logits
        return logits


def transformers_model(mapping: Config, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return Transformers' model of a configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in mapping.items() if key != "model_type"}
    config = AutoConfig.for_model(mapping["model_type"], **settings)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as checkpoints are loaded

    return model.to(device).eval()


def megatron_model(mapping: Config, routing: Config, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return Megatron's model of a configuration, in Megatron's own modules, its vocabulary padded."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    config = transformer_config(mapping, routing, dtype)
    own = device == "cuda" and "kv_lora_rank" not in mapping
    with (
        contextlib.nullcontext()
        if own
        else mock.patch.object(LocalSpecProvider, "core_attention", return_value=TorchAttention)
    ):
        model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
            vocab_size=-(-mapping["vocab_size"] // 128) * 128,
            max_sequence_length=mapping["max_position_embeddings"],
            share_embeddings_and_output_weights=mapping["tie_word_embeddings"],
            position_embedding_type="rope",
            parallel_output=False,
        )

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)

    moved: torch.nn.Module = model.to(device).eval()
    return moved


def transformer_config(mapping: Config, routing: Config, dtype: torch.dtype) -> Any:
    """Return what a user of Megatron would set for the model."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    family, biased = mapping["model_type"], bool(mapping.get("attention_bias", False))
    options: Config = {
        "num_layers": mapping["num_hidden_layers"],
        "hidden_size": mapping["hidden_size"],
        "ffn_hidden_size": mapping["intermediate_size"],
        "num_attention_heads": mapping["num_attention_heads"],
        "num_query_groups": mapping["num_key_value_heads"],
        "kv_channels": mapping.get("head_dim", mapping["hidden_size"] // mapping["num_attention_heads"]),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": mapping["rms_norm_eps"],
        "add_bias_linear": biased,
        "add_qkv_bias": biased or family in ("qwen2", "qwen2_moe"),
        "qk_layernorm": family in ("qwen3", "qwen3_moe", "deepseek_v3"),
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": True,
        "perform_initialization": False,
    }
    experts = next(
        (mapping[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in mapping), 0
    )
    if experts:
        width = mapping.get("moe_intermediate_size", mapping["intermediate_size"])
        shared = mapping.get("shared_expert_intermediate_size", mapping.get("n_shared_experts", 0) * width)
        dense = mapping.get("first_k_dense_replace", 0)
        options |= {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": width,
            "moe_router_topk": mapping["num_experts_per_tok"],
            "moe_router_dtype": "fp32",
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid" if family == "deepseek_v3" else "softmax",
            "moe_router_enable_expert_bias": family == "deepseek_v3",
            "moe_token_dispatcher_type": "allgather",
            "moe_layer_freq": [int(layer >= dense) for layer in range(mapping["num_hidden_layers"])],
            "moe_shared_expert_intermediate_size": shared or None,
            "moe_shared_expert_gate": family == "qwen2_moe",
            **routing,
        }

    if family != "deepseek_v3":
        return TransformerConfig(**options)

    return MLATransformerConfig(
        **options,
        q_lora_rank=mapping["q_lora_rank"],
        kv_lora_rank=mapping["kv_lora_rank"],
        qk_head_dim=mapping["qk_nope_head_dim"],
        qk_pos_emb_head_dim=mapping["qk_rope_head_dim"],
        v_head_dim=mapping["v_head_dim"],
        rope_type="rope",
    )


@contextlib.contextmanager
def _one_rank(device: str, seed: int) -> Iterator[None]:
    """Set Megatron up for a world of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.moe import moe_utils

    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        # Without Transformer Engine some releases leave these undefined, or defined as no type.
        if getattr(multi_latent_attention, "TELinear", None) is None:
            stack.enter_context(mock.patch.object(multi_latent_attention, "TELinear", type("Absent", (), {})))

        if not hasattr(moe_utils, "te_general_gemm"):
            stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None, create=True))

        if device == "cuda":
            model_parallel_cuda_manual_seed(seed)
        else:
            stack.enter_context(mock.patch("torch.cuda.current_device", return_value="cpu"))

        yield


if __name__ == "__main__":
    sys.exit(main())
