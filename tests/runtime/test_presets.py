"""Presets have the shapes of the published models: parameter totals are those of the models' own cards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout import hf
from wavecast.runtime.layout.hf import logical_tensors, num_parameters
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("qwen2.5-0.5b", 494_032_768, 290),
        ("qwen2.5-7b", 7_615_616_512, 339),
        ("llama-3-8b", 8_030_261_248, 291),
        ("llama-3-70b", 70_553_706_496, 723),
        ("qwen3-8b", 8_190_735_360, 399),
        ("qwen3-30b-a3b", 30_532_122_624, 18_867),
        ("qwen3-235b-a22b", 235_093_634_560, 36_945),
        ("mixtral-8x7b", 46_702_792_704, 995),
    ],
)
def test_totals_are_the_published_ones(name, parameters, tensors):
    assert num_parameters(preset(name)) == parameters
    assert len(logical_tensors(preset(name))) == tensors


@pytest.mark.parametrize(
    ("name", "heads", "experts", "dense", "vocab"),
    [("deepseek-v3", 128, 256, 3, 129280), ("kimi-k2", 64, 384, 1, 163840)],
)
def test_totals_of_latent_attention_add_up_by_hand(name, heads, experts, dense, vocab):
    hidden, layers = 7168, 61
    attention = (
        hidden * 1536 + 1536 + 1536 * heads * 192 + hidden * (512 + 64) + 512 + 512 * heads * 256 + heads * 128 * hidden
    )
    expert = 3 * hidden * 2048
    moe = experts * expert + expert + experts * hidden + experts
    total = layers * (attention + 2 * hidden) + dense * 3 * hidden * 18432 + (layers - dense) * moe
    total += 2 * vocab * hidden + hidden
    assert num_parameters(preset(name)) == total
    assert {"deepseek-v3": 671_026_419_200, "kimi-k2": 1_026_408_232_448}[name] == total


def test_the_small_presets_are_small_and_cut_many_ways():
    assert 2 * num_parameters(preset("tiny-qwen2")) == 36_983_552
    assert 2 * num_parameters(preset("tiny-qwen3-moe")) == 30_465_280
    assert 2 * num_parameters(preset("tiny-mixtral")) == 19_943_936
    assert 2 * num_parameters(preset("tiny-deepseek-v3")) == 18_708_320
    assert preset("tiny-qwen2").tie_word_embeddings
    for name in ("tiny-qwen2", "tiny-qwen3-moe", "tiny-mixtral", "tiny-deepseek-v3"):
        for tp in (1, 2, 3, 4, 6, 12):
            assert len(hf.layouts(preset(name), MeshSpec(tp=tp, pp=2))) == 2 * tp


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_in_bfloat16(name):
    assert preset(name).dtype == "bfloat16"
    assert preset(name).quantization is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_cut_to_its_first_layers(name):
    whole, cut = preset(name), preset(name).with_layers(2)
    names = {tensor.name for tensor in logical_tensors(cut)}
    assert {name for name in names if ".layers." in name} == {
        tensor.name for tensor in logical_tensors(whole) if tensor.layer in (0, 1)
    }


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"unknown preset 'gpt-5'; known: qwen2\.5-0\.5b, .*tiny-qwen3-moe"):
        preset("gpt-5")


def test_presets_and_layouts_need_neither_torch_nor_ray():
    code = (
        "import sys; from wavecast.runtime.layout import hf, mesh; from wavecast.runtime.presets import preset\n"
        "hf.layouts(preset('tiny-qwen2'), mesh.MeshSpec.parse('tp=3'))\n"
        "print([name for name in ('torch', 'ray', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
