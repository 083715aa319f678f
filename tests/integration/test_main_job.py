"""The main job as a user starts it: a process of its own, with a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.runtime.test_cli import PLAN_KEYS
from wavecast.runtime.demo import Weights
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.layout.shard import Piece
from wavecast.runtime.presets import PRESETS

pytestmark = pytest.mark.timeout(240)

SYNC_KEYS = {"verified", "transport", "device", "versions", "repeats", "extra_bytes_peak"}


def write_checkpoint(directory: Path) -> None:
    """Write a model of two layers in two files, as large models are published."""
    mapping = {**PRESETS["tiny-qwen2"], "num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(mapping), encoding="utf-8")
    weights, tensors = Weights(seed=5), {}
    for tensor in logical_tensors(ModelConfig.from_dict(mapping)):
        box = Box((0,) * len(tensor.shape), tensor.shape)
        piece = Piece(tensor.name, box, tensor.shape, "bfloat16")
        tensors[tensor.name] = torch.empty(tensor.shape, dtype=torch.bfloat16)
        weights.write(piece, 0, tensors[tensor.name], None)

    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)

    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def synced(*argv: str) -> dict[str, Any]:
    """Run the command and return the object that it printed, and printed alone."""
    done = subprocess.run(
        [sys.executable, "-m", "wavecast.runtime", "sync", *argv, "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_mixture_of_experts_cut_to_two_layers_arrives_bit_for_bit() -> None:
    """Latent attention and a dense layer, then experts shared out over four trainers: 4 of them to 3 ranks."""
    meshes = ["--src", "tp=2,dp=2,ep=4", "--dst", "tp=3,etp=3", "--replicas", "1"]
    result = synced("--preset", "tiny-deepseek-v3", "--layers", "2", *meshes, "--repeat", "1")
    assert result["verified"] is True
    assert result["actors"] == 7
    assert result["versions"] == [0]


def test_a_checkpoint_reaches_every_replica_and_stdout_holds_the_result_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    meshes = ["--src", "tp=3", "--dst", "tp=2", "--replicas", "2"]
    result = synced("--checkpoint", str(tmp_path), *meshes, "--repeat", "2")
    assert result.keys() >= SYNC_KEYS | set(PLAN_KEYS)
    assert result["seconds"].keys() >= {"describe", "reshard", "schedule", "connect", "transfer", "verify"}
    assert result["verified"] is True
    assert result["actors"] == 7
    assert result["versions"] == [1, 1]
    assert [repeat["version"] for repeat in result["repeats"]] == [0, 1]
    assert result["waves"] >= result["bound_waves"]
