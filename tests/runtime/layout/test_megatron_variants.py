"""Megatron-core models that were changed by hand: what later releases and other packages make of them, and refusals."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from tests.runtime.layout.known_bits import known_checkpoint
from tests.runtime.layout.megatron_configs import BIASED, DEEPSEEK, LLAMA, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, TIED
from tests.runtime.layout.megatron_models import Parallel, build, fake_rank
from tests.runtime.layout.megatron_whole import fill, whole_shards, whole_tensors
from tests.runtime.layout.moving import move
from wavecast.runtime import ConfigError, LayoutError, describe
from wavecast.runtime.layout import lora
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.megatron import model_config, shards, trainable_names
from wavecast.runtime.layout.megatron.modules import tensor_ranks
from wavecast.runtime.layout.megatron.names import catalogue


def filled(mapping, parallel=None):
    """Return a model of one rank that holds the known checkpoint, and the checkpoint."""
    parallel = parallel or Parallel()
    checkpoint = known_checkpoint(ModelConfig.from_dict(mapping))
    with fake_rank(0, parallel):
        [model] = build(mapping, parallel)
        fill([model], whole_tensors(checkpoint, mapping, 23))

    return model, checkpoint


def assert_brings(model, mapping, checkpoint):
    received = {name: torch.zeros_like(value) for name, value in checkpoint.items()}
    move([shards(model, ModelConfig.from_dict(mapping))], [whole_shards(received)])
    for name, value in checkpoint.items():
        assert torch.equal(received[name], value), name


class Around(torch.nn.Module):
    """An adapter around a layer: its own parameters are not the checkpoint's."""

    def __init__(self, inner: torch.nn.Module, base: str) -> None:
        super().__init__()
        setattr(self, base, inner)
        self.adapter = torch.nn.Linear(3, 3)


@pytest.mark.parametrize("base", ["to_wrap", "base_layer"])
@pytest.mark.parametrize("mapping", [QWEN2, QWEN3_MOE])
def test_adapters_are_looked_through(mapping, base):
    model, checkpoint = filled(mapping)
    for module in list(model.modules()):
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer"):
            if isinstance(getattr(module, name, None), torch.nn.Module):
                setattr(module, name, Around(getattr(module, name), base))

    assert_brings(model, mapping, checkpoint)


def test_an_adapter_on_the_fused_projection_is_merged_into_queries_keys_and_values():
    config = ModelConfig.from_dict(QWEN2)
    base = {name: value.float() for name, value in known_checkpoint(config).items()}
    for value in base.values():
        value.copy_(torch.arange(value.numel()).view(value.shape) % 31)

    # Megatron's whole B: 2 groups of 6 queries, a key and a value of 2 elements each.
    a = torch.arange(3 * 24.0).view(3, 24) % 7
    b = torch.arange(32 * 3.0).view(32, 3) % 5
    parallel = Parallel(tp=2, options={"params_dtype": torch.float32, "pipeline_dtype": torch.float32})
    sources = []
    for rank in range(2):
        with fake_rank(rank, parallel):
            [model] = build(QWEN2, parallel)
            fill([model], whole_tensors(base, QWEN2, 24))

        attention = model.decoder.layers[1].self_attention
        attention.linear_qkv = Around(attention.linear_qkv, "to_wrap")
        held = shards(model, config)
        adapters = lora.attached(held, attention.linear_qkv.to_wrap.weight, a, b[16 * rank : 16 * rank + 16], scale=0.5)
        sources.append(lora.merged(held, adapters))

    received = {name: torch.zeros_like(value) for name, value in base.items()}
    move(sources, [whole_shards(received)])
    parts = (0.5 * b @ a).view(2, 16, 24).split([12, 2, 2], dim=1)
    added = {f"model.layers.1.self_attn.{kind}_proj.weight": part for kind, part in zip("qkv", parts, strict=True)}
    for name, value in base.items():
        wanted = value + added[name].reshape(-1, 24) if name in added else value
        assert torch.equal(received[name], wanted), name


def test_wrappers_around_a_model_are_looked_through():
    model, checkpoint = filled(QWEN2)
    outer = torch.nn.Module()
    outer.module = torch.nn.Module()
    outer.module.module = model
    assert_brings(outer, QWEN2, checkpoint)
    assert_brings([outer], QWEN2, checkpoint)


def test_gate_and_up_in_alternating_blocks():
    model, checkpoint = filled(QWEN3_MOE, Parallel(experts="te"))
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.config.moe_mlp_glu_interleave_size = 2
            for weight in layer.mlp.experts.linear_fc1.parameters():
                weight.data = weight.data.view(2, -1, 2, 24).transpose(0, 1).reshape(weight.shape)

    assert_brings(model, QWEN3_MOE, checkpoint)


def test_one_parameter_for_all_experts():
    model, checkpoint = filled(QWEN3_MOE, Parallel(experts="te"))
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "experts"):
            for module in (layer.mlp.experts.linear_fc1, layer.mlp.experts.linear_fc2):
                stacked = torch.stack([getattr(module, f"weight{index}").data for index in range(6)])
                for index in range(6):
                    delattr(module, f"weight{index}")

                module.weight = torch.nn.Parameter(stacked)

    assert_brings(model, QWEN3_MOE, checkpoint)


def test_queries_and_keys_compressed_by_one_projection_with_its_norm():
    model, checkpoint = filled(DEEPSEEK)
    for layer in model.decoder.layers:
        attention = layer.self_attention
        both = torch.nn.Module()
        both.weight = torch.nn.Parameter(
            torch.cat([attention.linear_q_down_proj.weight.data, attention.linear_kv_down_proj.weight.data])
        )
        both.layer_norm_weight = layer.input_layernorm.weight
        del attention.linear_q_down_proj, attention.linear_kv_down_proj
        attention.linear_qkv_down_proj, layer.input_layernorm = both, torch.nn.Identity()

    assert_brings(model, DEEPSEEK, checkpoint)


def test_norms_kept_less_one_are_made_good_as_they_are_read():
    model, checkpoint = filled(QWEN3)
    checkpoint = {name: value.round() if "norm" in name else value for name, value in checkpoint.items()}
    for module in model.modules():
        module_config = getattr(module, "config", None)
        if module_config is not None:
            module_config.layernorm_zero_centered_gamma = True

    named = dict(model.named_parameters())
    norms = [name for name in named if "norm" in name]
    for name in norms:
        named[name].data.copy_(torch.arange(named[name].numel()) - 1)

    for name, value in checkpoint.items():
        if "norm" in name:
            value.copy_(torch.arange(value.numel()))

    assert len(norms) == 4 * 4 + 1
    assert_brings(model, QWEN3, checkpoint)


def test_layers_for_predicting_further_tokens_are_left_out():
    model, checkpoint = filled(QWEN2)
    model.mtp = torch.nn.Linear(4, 4)
    assert_brings(model, QWEN2, checkpoint)


def test_shards_are_described_without_the_models_memory():
    model, checkpoint = filled(QWEN2)
    layout = describe(shards(model, ModelConfig.from_dict(QWEN2)))
    assert {piece.tensor for piece in layout.pieces} == set(checkpoint)
    assert {piece.dtype for piece in layout.pieces} == {"bfloat16"}


def test_names_are_trainable_where_any_of_their_parameters_is():
    model, _ = filled(QWEN2)
    model.requires_grad_(False)
    config = ModelConfig.from_dict(QWEN2)
    assert trainable_names(model, config) == frozenset()
    model.decoder.layers[1].self_attention.linear_qkv.bias.requires_grad_(True)
    model.decoder.layers[2].mlp.linear_fc1.weight.requires_grad_(True)
    assert trainable_names(model, config) == {
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    }
    held = {shard.name for shard in shards(model, config)}
    assert held - set(describe(shards(model, config)).frozen) == trainable_names(model, config)


def test_the_bias_on_the_routers_scores_is_sent_unless_buffers_are_left_out():
    model, _ = filled(DEEPSEEK)
    config = ModelConfig.from_dict(DEEPSEEK)
    everything = {shard.name for shard in shards(model, config)}
    biases = {name for name in everything if name.endswith("e_score_correction_bias")}
    assert biases == {name for name in catalogue(config).shapes if name.endswith("e_score_correction_bias")} != set()
    assert {shard.name for shard in shards(model, config, buffers=False)} == everything - biases


def test_the_bias_on_the_routers_scores_is_trained_without_a_gradient_unless_its_rate_is_zero():
    model, _ = filled(DEEPSEEK)
    model.requires_grad_(False)
    config = ModelConfig.from_dict(DEEPSEEK)
    biases = {name for name in catalogue(config).shapes if name.endswith("e_score_correction_bias")}
    assert trainable_names(model, config) == biases
    assert {shard.name for shard in shards(model, config) if shard.trainable} == biases
    for layer in model.decoder.layers[-1:]:
        layer.mlp.config.moe_router_bias_update_rate = 0.0

    assert trainable_names(model, config) == frozenset()


def refuse(model, mapping, text, **options):
    with pytest.raises(LayoutError, match=re.escape(text)):
        shards(model, ModelConfig.from_dict(mapping), **options)


def test_a_parameter_that_no_tensor_of_the_checkpoint_is_made_of_is_refused():
    model, _ = filled(LLAMA)
    model.decoder.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    refuse(model, LLAMA, "the checkpoint has no tensor for decoder.layers.1.mlp.extra")


def test_biases_that_the_checkpoint_lacks_are_refused():
    model, _ = filled(BIASED)
    refuse(model, LLAMA, "linear_qkv.bias is 'model.layers.0.self_attn.q_proj.bias', which the configuration has not")


def test_biases_that_the_model_lacks_are_refused():
    model, _ = filled(LLAMA)
    refuse(model, BIASED, "the model holds nothing of 'model.layers.0.mlp.down_proj.bias'")


def test_norms_of_queries_and_keys_that_the_model_lacks_are_refused():
    model, _ = filled({**QWEN3, "model_type": "llama"})
    refuse(model, QWEN3, "the model holds nothing of 'model.layers.0.self_attn.k_norm.weight'")


def test_a_wrong_number_of_key_heads_is_refused_by_the_shape():
    model, _ = filled(LLAMA)
    refuse(
        model,
        {**LLAMA, "num_key_value_heads": 2},
        "decoder.layers.0.self_attention.linear_qkv.weight has the shape (40, 24): dim 0 is neither 32 nor one of 1",
    )


def test_a_wrong_hidden_size_is_refused_by_the_shape():
    model, _ = filled(LLAMA)
    refuse(model, {**LLAMA, "hidden_size": 36}, "embedding.word_embeddings.weight has the shape (23, 24), which holds")


def test_a_model_of_other_layers_is_refused():
    model, _ = filled(LLAMA)
    refuse(model, {**LLAMA, "num_hidden_layers": 3}, "the model holds layer 3, counted from 0, the configuration has 3")


def test_a_dense_model_of_a_configuration_with_experts_is_refused():
    model, _ = filled(QWEN3)
    refuse(model, QWEN3_MOE, "is 'model.layers.0.mlp.gate_proj.weight', which the configuration has not")


def test_another_number_of_experts_is_refused():
    model, _ = filled(QWEN2_MOE)
    refuse(model, {**QWEN2_MOE, "num_experts": 8}, "the model has 4 experts, the configuration 8")
    refuse(model, QWEN2, "the model has 4 experts, the configuration 0")


def test_a_vocabulary_larger_than_the_models_is_refused():
    model, _ = filled(LLAMA)
    refuse(model, {**LLAMA, "vocab_size": 24}, "word_embeddings.weight has 23 rows on each of 1 ranks")
    refuse(model, LLAMA, "vocab_size is 22, the configuration has 23", vocab_size=22)


def test_tied_and_untied_are_not_taken_for_each_other():
    model, _ = filled(TIED)
    refuse(model, QWEN2, "share_embeddings_and_output_weights is True in the model, tie_word_embeddings is False")


def test_offloaded_memory_is_refused():
    model, _ = filled(LLAMA)
    model.decoder.layers[0].mlp.linear_fc1.weight.untyped_storage().resize_(0)
    refuse(model, LLAMA, "decoder.layers.0.mlp.linear_fc1.weight has no memory")
    model, _ = filled(LLAMA)
    model.decoder.layers[0].mlp.linear_fc1.weight.data = torch.empty(0)
    refuse(model, LLAMA, "ColumnParallelLinear has no weight: its layout is not known")


def test_tensors_that_are_not_what_they_show_are_refused():
    class Quantized(torch.Tensor):
        pass

    model, _ = filled(LLAMA)
    linear = model.decoder.layers[0].mlp.linear_fc1
    linear.weight = torch.nn.Parameter(linear.weight.data.as_subclass(Quantized))
    refuse(model, LLAMA, "decoder.layers.0.mlp.linear_fc1.weight is a Quantized, not a plain tensor of the weights")


def test_gates_on_attention_are_refused():
    model, _ = filled(LLAMA)
    model.config.attention_output_gate = True
    refuse(model, LLAMA, "attention_output_gate")


def test_interleaved_rotary_positions_are_refused_without_latent_attention():
    model, _ = filled(LLAMA)
    model.config.rotary_interleaved = True
    refuse(model, LLAMA, "rotary_interleaved")
    latent, checkpoint = filled(DEEPSEEK)
    latent.config.rotary_interleaved = True
    assert_brings(latent, DEEPSEEK, checkpoint)


def test_a_norm_in_two_places_is_refused():
    model, _ = filled(LLAMA)
    layer = model.decoder.layers[2]
    layer.mlp.linear_fc1.layer_norm_weight = torch.nn.Parameter(torch.zeros(24, dtype=torch.bfloat16))
    refuse(
        model,
        LLAMA,
        "decoder.layers.2.pre_mlp_layernorm.weight and decoder.layers.2.mlp.linear_fc1.layer_norm_weight both are",
    )


def test_what_is_no_model_is_refused():
    refuse(torch.nn.Linear(2, 2), LLAMA, "Linear is no Megatron-core GPTModel")
    refuse([], LLAMA, "the list of chunks is empty")
    refuse(None, LLAMA, "NoneType is no Megatron-core GPTModel")
    refuse([None], LLAMA, "NoneType is no Megatron-core GPTModel")


@pytest.mark.parametrize("size", [-5, 0, 2.5, "23"])
def test_a_vocabulary_of_no_size_is_refused(size):
    model, _ = filled(LLAMA)
    with pytest.raises(LayoutError, match=f"vocab_size={size!r} must be a positive integer"):
        shards(model, vocab_size=size)


def test_a_mapping_is_no_configuration():
    model, _ = filled(LLAMA)
    with pytest.raises(ConfigError, match="config is a dict"):
        shards(model, LLAMA)


def test_no_family_is_made_up_for_a_model_that_is_none():
    with fake_rank(0, Parallel()):
        [model] = build(LLAMA, Parallel(options={"gated_linear_unit": False}))

    with pytest.raises(LayoutError, match="no known family"):
        model_config(model)


def test_a_module_that_does_not_say_where_it_is_split_is_refused():
    with pytest.raises(LayoutError, match="Linear does not say along which ranks it is split"):
        tensor_ranks(torch.nn.Linear(2, 2))


def test_modules_of_old_releases_are_placed_by_the_global_state():
    with fake_rank(3, Parallel(tp=2, pp=2)):
        assert tensor_ranks(torch.nn.Linear(2, 2)) == (1, 2)


def test_the_group_that_megatron_keeps_comes_before_transformer_engines():
    module = torch.nn.Linear(2, 2)
    module._tp_group = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    module.tp_group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    assert tensor_ranks(module) == (1, 2)
