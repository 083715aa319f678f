"""What a ``config.json`` is read as, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.config import MlaConfig, ModelConfig, MoeConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.presets import PRESETS

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
QWEN3_MOE = {
    **QWEN2,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "moe_intermediate_size": 10,
}


def without(mapping, *keys):
    return {key: value for key, value in mapping.items() if key not in keys}


def moe_layers(config):
    return [layer for layer in range(config.num_layers) if config.is_moe(layer)]


def test_a_dense_model_is_read():
    assert ModelConfig.from_dict(QWEN2) == ModelConfig(
        family="qwen2",
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        qkv_bias=True,
    )


def test_a_model_with_latent_attention_is_read():
    config = ModelConfig.from_dict(PRESETS["deepseek-v3"])
    assert config.mla == MlaConfig(1536, 512, 128, 64, 128)
    assert config.moe == MoeConfig(256, 2048, shared_intermediate_size=2048, score_bias=True, first=3)
    assert config.num_kv_heads == config.num_heads == 128
    assert moe_layers(config) == list(range(3, 61))
    assert not moe_layers(config.with_layers(3))


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 3}, [2, 5]),
        ({"mlp_only_layers": [6, 0]}, [1, 2, 3, 4, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"mlp_only_layers": None}, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_layers_with_experts_are_those_of_the_qwen_rule(change, layers):
    assert moe_layers(ModelConfig.from_dict({**QWEN3_MOE, "num_hidden_layers": 7, **change})) == layers


@pytest.mark.parametrize(("change", "layers"), [({}, [3, 4, 5, 6, 7]), ({"moe_layer_freq": 2}, [4, 6])])
def test_the_layers_with_experts_are_those_of_the_deepseek_rule(change, layers):
    config = ModelConfig.from_dict({**PRESETS["deepseek-v3"], "num_hidden_layers": 8, **change})
    assert moe_layers(config) == layers


def test_a_router_without_auxiliary_free_balancing_has_no_bias():
    config = ModelConfig.from_dict({**PRESETS["deepseek-v3"], "num_hidden_layers": 4, "topk_method": "greedy"})
    assert not [tensor.name for tensor in logical_tensors(config) if "correction" in tensor.name]


@pytest.mark.parametrize(
    ("mapping", "head_dim"),
    [
        (QWEN2, 6),
        ({**QWEN2, "head_dim": 8}, 8),
        ({**QWEN2, "head_dim": None}, 6),
        ({**QWEN2, "architectures": ["Qwen3ForCausalLM"]}, 128),
        (QWEN3_MOE, 6),
    ],
)
def test_the_head_dim_is_given_or_what_transformers_takes(mapping, head_dim):
    assert ModelConfig.from_dict(mapping).head_dim == head_dim


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
    ],
)
def test_the_dtype_has_an_old_and_a_new_key(change, dtype):
    assert ModelConfig.from_dict({**QWEN2, **change}).dtype == dtype


def test_a_quantized_checkpoint_says_so():
    mapping = {**PRESETS["deepseek-v3"], "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    assert ModelConfig.from_dict(mapping).quantization == "fp8"


def test_the_model_type_decides_where_no_architecture_is_given():
    assert ModelConfig.from_dict(without(QWEN2, "architectures")).family == "qwen2"
    assert ModelConfig.from_dict(without(PRESETS["kimi-k2"], "architectures")).family == "deepseek_v3"


def test_only_llama_does_without_the_number_of_kv_heads():
    mapping = without(QWEN2, "num_key_value_heads")
    assert ModelConfig.from_dict({**mapping, "architectures": ["LlamaForCausalLM"]}).num_kv_heads == 4
    with pytest.raises(ConfigError, match="lacks 'num_key_value_heads'"):
        ModelConfig.from_dict(mapping)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "unknown model architecture None; known: llama, .*kimi_k2"),
        ({**QWEN2, "architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel'; known: LlamaForCausalLM, "),
        ({**QWEN2, "architectures": [None]}, "architecture None"),
        ({"model_type": "bert"}, "architecture 'bert'"),
        (without(QWEN2, "hidden_size"), "lacks 'hidden_size'"),
        ({**QWEN2, "vocab_size": 0}, "vocab_size=0 is not an integer of at least 1"),
        ({**QWEN2, "vocab_size": "50"}, "vocab_size='50' is not an integer of at least 1"),
        ({**QWEN2, "num_hidden_layers": True}, "num_hidden_layers=True is not an integer"),
        ({**QWEN2, "num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({**QWEN2, "hidden_size": 26}, "hidden_size=26 must be a multiple of num_attention_heads=4"),
        ({**QWEN2, "tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
        ({**QWEN2, "torch_dtype": "bf16"}, "unknown dtype 'bf16'"),
        ({**QWEN2, "torch_dtype": 16}, "torch_dtype=16 is not a string"),
        ({**QWEN2, "quantization_config": "fp8"}, "quantization_config='fp8' is not an object"),
        (without(QWEN3_MOE, "num_experts"), "lacks 'num_experts'"),
        ({**QWEN3_MOE, "mlp_only_layers": 3}, "mlp_only_layers=3 is not a list of integers"),
        ({**QWEN3_MOE, "mlp_only_layers": [-1]}, r"mlp_only_layers=\[-1\] is not a list of integers"),
        (without(PRESETS["kimi-k2"], "kv_lora_rank"), "lacks 'kv_lora_rank'"),
        (
            {**PRESETS["kimi-k2"], "first_k_dense_replace": -1},
            "first_k_dense_replace=-1 is not an integer of at least 0",
        ),
    ],
)
def test_a_bad_configuration_is_refused_by_key_and_value(mapping, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(mapping)


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_a_model_is_not_made_deeper(layers):
    with pytest.raises(ConfigError, match=f"layers={layers} is not between 1 and the model's 3"):
        ModelConfig.from_dict(QWEN2).with_layers(layers)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_whatever_a_key_holds_the_answer_is_a_model_or_a_config_error(name, data):
    mapping = dict(PRESETS[name])
    mapping[data.draw(st.sampled_from(sorted(mapping)))] = data.draw(ANYTHING)
    try:
        assert isinstance(ModelConfig.from_dict(mapping), ModelConfig)
    except ConfigError:
        pass


@pytest.mark.parametrize("mapping", [None, [], "x"])
def test_a_configuration_that_is_no_mapping_is_refused(mapping: object) -> None:
    with pytest.raises(ConfigError, match=f"not {type(mapping).__name__}"):
        ModelConfig.from_dict(mapping)  # type: ignore[arg-type]
