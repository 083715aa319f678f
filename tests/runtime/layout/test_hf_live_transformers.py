"""Live Transformers modules, held against what Transformers itself loads from a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.runtime.layout.known_bits import known_checkpoint
from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import hf_live, vllm
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.layout.shard import Shard

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "torch_dtype": "bfloat16",
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"]},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 6},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **EXPERTS,
        "shared_expert_intermediate_size": 12,
        "decoder_sparse_step": 2,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        **EXPERTS,
        "head_dim": 6,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3},
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
}


def mapping_of(family):
    return {"model_type": family, **SIZES, **MODELS[family]}


def loaded(family, folder):
    """Return the module that Transformers makes of a checkpoint of known bits."""
    mapping = mapping_of(family)
    (folder / "config.json").write_text(json.dumps(mapping), "ascii")
    save_file(known_checkpoint(ModelConfig.from_dict(mapping)), folder / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def made(family):
    """Return a module with random weights."""
    sizes = mapping_of(family)
    config = transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def whole(tensors):
    return [Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("family", MODELS)
def test_a_modules_shards_are_its_checkpoint(family, tmp_path):
    known = known_checkpoint(ModelConfig.from_dict(mapping_of(family)))
    shards = hf_live.shards(loaded(family, tmp_path))
    assert sorted(shard.name for shard in shards) == sorted(known)
    for shard in shards:
        assert shard.global_shape == tuple(known[shard.name].shape)
        # Version 4.57 rounds the bias on the router scores, which is float32, to the module's dtype.
        assert torch.equal(shard.view, known[shard.name].to(shard.view.dtype))


@pytest.mark.parametrize("family", MODELS)
def test_a_sync_into_a_module_leaves_what_loading_leaves(family, tmp_path):
    known = known_checkpoint(ModelConfig.from_dict(mapping_of(family)))
    module = loaded(family, tmp_path)
    wanted = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensor in module.state_dict().values():
        tensor.zero_()

    move([whole(known)], [hf_live.shards(module)])
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("family", MODELS)
def test_a_module_feeds_an_engine_of_two_ranks(family, tmp_path):
    config = ModelConfig.from_dict(mapping_of(family))
    ranks = [vllm.EngineRank(rank, 2) for rank in range(2)]

    def engine():
        return [
            {
                claim.name: torch.zeros(claim.shape, dtype=getattr(torch, claim.dtype or "bfloat16"))
                for claim in vllm.parameters(config, rank)
            }
            for rank in ranks
        ]

    def shards_of(buffers):
        return [vllm.shards(own, config, tp_rank=rank, tp_size=2) for rank, own in enumerate(buffers)]

    fed, wanted = engine(), engine()
    live = hf_live.shards(loaded(family, tmp_path))
    move([live], shards_of(fed))
    known = known_checkpoint(config)
    move([whole({shard.name: known[shard.name].to(shard.view.dtype) for shard in live})], shards_of(wanted))
    for own, expected in zip(fed, wanted, strict=True):
        assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_shards_are_views_of_the_module():
    module = made("mixtral")
    storages = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    for shard in hf_live.shards(module):
        assert shard.view.untyped_storage().data_ptr() in storages
        assert not shard.view.requires_grad


def test_a_tied_head_is_given_once_and_buffers_may_be_left_out():
    names = [shard.name for shard in hf_live.shards(made("qwen2"))]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names
    score_bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    module = made("deepseek_v3")
    assert score_bias in {shard.name for shard in hf_live.shards(module)}
    assert score_bias not in {shard.name for shard in hf_live.shards(module, buffers=False)}


def test_a_state_dict_of_a_separate_copy_of_the_head_is_the_embedding_too():
    config = ModelConfig.from_dict(mapping_of("qwen2"))
    state = {name: tensor.clone() for name, tensor in made("qwen2").state_dict().items()}
    move([whole(known_checkpoint(config))], [hf_live.shards(state, config)])
    assert torch.equal(state["lm_head.weight"], known_checkpoint(config)["model.embed_tokens.weight"])


def test_a_configuration_of_another_size_is_refused():
    config = ModelConfig.from_dict({**mapping_of("qwen3_moe"), "moe_intermediate_size": 4})
    with pytest.raises(LayoutError, match="where the configuration leads to"):
        hf_live.shards(made("qwen3_moe"), config)


def test_an_architecture_unknown_here_keeps_the_modules_names():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10, n_positions=4)
    module = transformers.GPT2LMHeadModel(config)
    names = [shard.name for shard in hf_live.shards(module)]
    assert names == [name for name in module.state_dict() if name != "lm_head.weight"]


def test_every_module_covers_the_logical_tensors_of_its_family():
    for family in MODELS:
        names = {shard.name for shard in hf_live.shards(made(family))}
        assert names == {tensor.name for tensor in logical_tensors(ModelConfig.from_dict(mapping_of(family)))}
