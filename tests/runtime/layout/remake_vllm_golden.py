"""
Remake ``golden/vllm.json``: what vLLM's own loader makes of small checkpoints, rank by rank.

Each case builds vLLM's model class on this CPU in one process a rank (gloo; no engine and no forward pass), lets it
load a checkpoint of known bits, and writes down every parameter's name, shape, dtype and hash. Then it zeroes the live
module, brings it the checkpoint through the shards that the adapter finds in it, and compares. Run it from the
repository's root in an environment with torch, vLLM 0.33 and this package, for all cases or those whose names begin
as given: ``python -m tests.runtime.layout.remake_vllm_golden [CASE ...]``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from tests.runtime.layout.known_bits import known_checkpoint, quantised_checkpoint, sha256_of
from tests.runtime.layout.moving import move
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.vllm import EngineFormat, shards

GOLDEN = Path(__file__).with_name("golden") / "vllm.json"

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}
LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {**BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
QWEN2 = {**BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
QWEN2_MOE = {
    **BASE,
    **EXPERTS,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 48,
}
QWEN3_MOE = {
    **BASE,
    **EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_key_value_heads": 2,
}
MIXTRAL = {
    **BASE,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
DEEPSEEK = {
    **BASE,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_nextn_predict_layers": 0,
}
BLOCK = (128, 128)
QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
FLOAT8 = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "head_dim": 128,
    "num_attention_heads": 4,
    "quantization_config": QUANTISED,
}
PLAIN_GATE = {"quantization_config": {**QUANTISED, "modules_to_not_convert": ["model.layers.0.mlp.gate"]}}
LATENT_FLOAT8 = {
    **FLOAT8,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
BIASED = {"attention_bias": True, "mlp_bias": True}


@dataclass(frozen=True)
class Case:
    """A model, the engine's parallel sizes, and environment variables that change what vLLM builds."""

    config: dict[str, object]
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    pp_layers: tuple[int, ...] | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Return what vLLM is to load."""
        config = ModelConfig.from_dict(self.config)
        return known_checkpoint(config) if config.quantization is None else quantised_checkpoint(config, BLOCK)


CASES: dict[str, Case] = {
    "llama tp2, every bias": Case({**LLAMA, **BIASED}, tp=2),
    "llama tp2 pp2, tied, three layers": Case(
        {**LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True}, tp=2, pp=2
    ),
    "llama tp1 pp3, four layers": Case({**LLAMA, "num_hidden_layers": 4}, pp=3),
    "llama pp2, layers as given": Case({**LLAMA, "num_hidden_layers": 4}, pp=2, pp_layers=(1, 3)),
    "mistral tp2": Case(MISTRAL, tp=2),
    "qwen2 tp4, two kv heads, tied, a rank without vocabulary": Case(
        {**QWEN2, "vocab_size": 70, "tie_word_embeddings": True}, tp=4
    ),
    "qwen3 tp2": Case(QWEN3, tp=2),
    "qwen3 tp2, biases": Case({**QWEN3, "attention_bias": True}, tp=2),
    "qwen2_moe tp2": Case(QWEN2_MOE, tp=2),
    "qwen2_moe tp2 ep": Case({**QWEN2_MOE, "decoder_sparse_step": 2}, tp=2, ep=True),
    "qwen3_moe tp2, a dense layer": Case({**QWEN3_MOE, "mlp_only_layers": [0]}, tp=2),
    "qwen3_moe tp2 ep, five experts": Case({**QWEN3_MOE, "num_experts": 5}, tp=2, ep=True),
    "qwen3_moe tp2 pp2 ep, tied": Case({**QWEN3_MOE, "tie_word_embeddings": True}, tp=2, pp=2, ep=True),
    "qwen3_moe tp4, two kv heads": Case(QWEN3_MOE, tp=4),
    "qwen3_moe tp2 dp2": Case(QWEN3_MOE, tp=2, dp=2),
    "qwen3_moe tp2 dp2 ep": Case(QWEN3_MOE, tp=2, dp=2, ep=True),
    "mixtral tp2": Case(MIXTRAL, tp=2),
    "mixtral tp4 ep": Case(MIXTRAL, tp=4, ep=True),
    "deepseek_v3 tp2": Case(DEEPSEEK, tp=2),
    "deepseek_v3 tp2 ep": Case(DEEPSEEK, tp=2, ep=True),
    "deepseek_v3 tp2 dp2 ep": Case(DEEPSEEK, tp=2, dp=2, ep=True),
    "deepseek_v3 pp2, queries uncompressed": Case({**DEEPSEEK, "q_lora_rank": None}, pp=2),
    "deepseek_v3 tp2, plain attention": Case(DEEPSEEK, tp=2, environment=(("VLLM_MLA_DISABLE", "1"),)),
    "qwen3 float8 tp2": Case({**QWEN3, **FLOAT8, "num_hidden_layers": 1}, tp=2),
    "qwen3_moe float8 tp2": Case({**QWEN3_MOE, **FLOAT8, **PLAIN_GATE, "num_hidden_layers": 1}, tp=2),
    "deepseek_v3 float8 tp2 ep": Case({**DEEPSEEK, **LATENT_FLOAT8}, tp=2, ep=True),
}


def load(rank: int, case: Case, port: int, folder: str) -> None:
    """Build and load the model as worker ``rank`` (dp slowest, then pp, then tp); write its parameters down."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", **dict(case.environment))
    if case.pp_layers is not None:
        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, case.pp_layers))

    # Let vLLM take this machine for a CPU, whatever its wheel was built for.
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    from vllm import config as settings
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.models import ModelRegistry

    # Float8 kernels there are none here; the weights and their scales do not depend on them.
    fp8.init_fp8_linear_kernel = lambda **_: None
    fp8.select_fp8_moe_backend = lambda **_: (Fp8MoeBackend.TRITON, None)

    dp_rank, local = divmod(rank, case.tp * case.pp)
    parallel = settings.ParallelConfig(
        tensor_parallel_size=case.tp,
        pipeline_parallel_size=case.pp,
        data_parallel_size=case.dp,
        enable_expert_parallel=case.ep,
        distributed_executor_backend="mp",
    )
    parallel.data_parallel_rank = dp_rank
    parallel.data_parallel_master_ip = "127.0.0.1"
    parallel.data_parallel_master_port = port
    parallel._data_parallel_master_port_list = [port]
    model_config = settings.ModelConfig(
        model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64
    )
    config = settings.VllmConfig(
        model_config=model_config, parallel_config=parallel, device_config=settings.DeviceConfig("cpu")
    )
    with settings.set_current_vllm_config(config):
        init_distributed_environment(case.tp * case.pp, local, f"tcp://127.0.0.1:{port}", local, "gloo")
        initialize_model_parallel(case.tp, case.pp)
        torch.set_default_dtype(torch.bfloat16)
        model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config=model_config)
        model = model_class(vllm_config=config)
        loaded = model.load_weights(iter(load_file(Path(folder) / "model.safetensors").items()))

    # Scales of the cache are none of the model's weights.
    named = {name: tensor for name, tensor in model.named_parameters() if not name.endswith("_scale")}
    unknown = set() if loaded is None else set(named) - set(loaded)
    if unknown:
        raise SystemExit(f"vLLM left parameters of rank {rank} as they were: {sorted(unknown)}")

    summary = {name: summarise(parameter) for name, parameter in named.items()}
    sync_into(named, case)
    again = {name: summarise(parameter) for name, parameter in named.items()}
    if again != summary:
        differing = [name for name in named if again[name] != summary[name]]
        raise SystemExit(f"a sync into the live module of rank {rank} leaves other bits in {differing}")

    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(summary), encoding="ascii")


def summarise(parameter: torch.Tensor) -> list[str]:
    """Return shape, dtype and hash."""
    return ["x".join(map(str, parameter.shape)), str(parameter.dtype).removeprefix("torch."), sha256_of(parameter)]


def sync_into(named: dict[str, torch.Tensor], case: Case) -> None:
    """Zero a live module's parameters, then bring it the checkpoint; its place is asked of vLLM's own groups."""
    from vllm.distributed import get_dp_group, get_pp_group, get_tp_group

    config = ModelConfig.from_dict(case.config)
    tp, pp, dp = get_tp_group(), get_pp_group(), get_dp_group()
    for parameter in named.values():
        parameter.data.zero_()

    live = shards(
        named,
        config,
        tp_rank=tp.rank_in_group,
        tp_size=tp.world_size,
        pp_rank=pp.rank_in_group,
        pp_size=pp.world_size,
        dp_rank=dp.rank_in_group,
        dp_size=dp.world_size,
        expert_parallel=case.ep,
        fmt=EngineFormat(pp_layers=case.pp_layers, scale_block=BLOCK if config.quantization else None),
    )
    whole = [
        Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in case.checkpoint().items()
    ]
    move([whole], [live])


def run(case: Case) -> list[dict[str, list[str]]]:
    """Return each rank's parameters."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    world = case.tp * case.pp * case.dp
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config), encoding="ascii")
        save_file(case.checkpoint(), Path(folder) / "model.safetensors")
        torch.multiprocessing.spawn(load, args=(case, port, folder), nprocs=world)
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text("ascii")) for rank in range(world)]


def main(argv: list[str]) -> None:
    """Write the file, case by case; those not asked for stay as they are."""
    golden = json.loads(GOLDEN.read_text("ascii")) if GOLDEN.exists() else {}
    for name, case in CASES.items():
        if not argv or name.startswith(tuple(argv)):
            sizes = {"tp": case.tp, "pp": case.pp, "dp": case.dp, "ep": case.ep, "pp_layers": case.pp_layers}
            golden[name] = {"config": case.config, **sizes, "ranks": run(case)}
            lines = [f"{json.dumps(name)}: {json.dumps(golden[name])}" for name in CASES if name in golden]
            GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
