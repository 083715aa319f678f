"""What is given in the place of a module, a configuration or a number is refused by the adapters, typed and told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from wavecast.runtime.errors import ConfigError, LayoutError, WavecastError
from wavecast.runtime.layout import dtensor, flat, fp8, hf_live, lora, vllm
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Shard, describe
from wavecast.runtime.presets import preset

CONFIG = preset("tiny-qwen2")
NO_CONFIG: ModelConfig = {"model_type": "qwen2"}  # type: ignore[assignment]
A, B = torch.ones(2, 4), torch.ones(4, 2)
SHARD = Shard("q_proj.weight", torch.ones(4, 4), (0, 0), (4, 4))

MISTAKES: dict[str, tuple[Callable[[], object], type[WavecastError], str]] = {
    "vllm: no parameters": (lambda: vllm.shards(None, CONFIG), LayoutError, "named_parameters is a NoneType"),
    "vllm: a mapping for a configuration": (lambda: vllm.shards({}, NO_CONFIG), ConfigError, "config is a dict"),
    "vllm: the same of a layout": (
        lambda: vllm.layout(NO_CONFIG, vllm.EngineRank()),
        ConfigError,
        r"config is a dict: give a ModelConfig, such as ModelConfig\.from_dict",
    ),
    "hf_live: no module": (lambda: hf_live.shards(None), LayoutError, "a NoneType is neither a module nor a state"),
    "hf_live: a list": (lambda: hf_live.shards([A]), LayoutError, "a list is neither a module nor a state"),
    "hf_live: a mapping for a configuration": (
        lambda: hf_live.shards(torch.nn.Linear(2, 2), NO_CONFIG),
        ConfigError,
        "config is a dict",
    ),
    "dtensor: no module": (lambda: dtensor.shards(None), LayoutError, "a NoneType is neither a module nor tensors"),
    "fp8: one number for a block": (lambda: fp8.quantised([SHARD], block=128), ConfigError, "block=128 must be two"),
    "fp8: a pair of such": (lambda: fp8.paired(SHARD, A, block=128), ConfigError, "block=128 must be two"),
    "flat: a fraction": (
        lambda: flat.flat_shards(torch.ones(4), [("w", (4,))], start=0.5),
        LayoutError,
        r"a start of at least 0, not \(4,\) at 0\.5",
    ),
    "lora: a scale of letters": (
        lambda: lora.adapter("w", A, B, scale="a"),
        LayoutError,
        "the scale of the adapter on 'w' is 'a', it must be a finite number",
    ),
    "lora: no number": (lambda: lora.adapter("w", A, B, scale=float("nan")), LayoutError, "'w' is nan"),
    "lora: no factor": (lambda: lora.adapter("w", None, B, scale=1), LayoutError, "'w.lora_A.weight' is a NoneType"),
    "describe: nothing": (lambda: describe(None), LayoutError, "a NoneType is no list of shards"),
    "describe: a number": (lambda: describe([SHARD, 3]), LayoutError, "number 1 of the shards is a int"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_plain_mistake_is_told(mistake: str) -> None:
    call, kind, why = MISTAKES[mistake]
    with pytest.raises(kind, match=why):
        call()
