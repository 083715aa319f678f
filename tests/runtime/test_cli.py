"""The command line: one line for what cannot be, one JSON object for what was asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wavecast.runtime.cli import main
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.presets import PRESETS, preset

PLAN_KEYS = (
    "actors",
    "pieces",
    "routes",
    "tasks",
    "nbytes",
    "waves",
    "bound_waves",
    "makespan_bytes",
    "bound_bytes",
    "gap",
    "strategy",
    "ports",
    "digest",
    "seconds",
)


def call(argv: Sequence[str]) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(argv)

    assert isinstance(caught.value.code, int)
    return caught.value.code


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert call(["plan", "--json", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def refused(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    """Run a command that must be refused, and return its one line."""
    assert call(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wavecast: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


REFUSALS = [
    (["plan", "--preset", "qwen9"], "unknown preset 'qwen9'; known: qwen2.5-0.5b"),
    (["plan", "--src", "tp=0"], "mesh 'tp=0': tp='0' is not a positive integer"),
    (["plan", "--src", "tp=2,xp=2"], "'xp=2' is not AXIS=SIZE"),
    (["plan", "--dst", "pp=99"], "pp=99 exceeds the model's 8 layers"),
    (["plan", "--src", "tp=1000"], "tp=1000 exceeds num_attention_heads=12"),
    (["plan", "--dst", "tp=2,ep=2"], "ep=2 asks for experts"),
    (["plan", "--strategy", "fastest"], "strategy is 'fastest'"),
    (["plan", "--ports", "both"], "'both' is not one of 'half', 'full'"),
    (["plan", "--replicas", "0"], "replicas is 0, it must be at least 1"),
    (["plan", "--replicas", "two"], "'two' is not a valid integer"),
    (["plan", "--layers", "0"], "layers=0 is not between 1 and the model's 8"),
    (["plan", "--dtype", "float17"], "unknown dtype 'float17'"),
    (["plan", "--chunk-bytes", "1"], "chunk_bytes is 1; an element may need 16"),
    (["plan", "--chunk-bytes", "-5"], "chunk_bytes is -5; an element may need 16"),
    (["plan", "--chunk-bytes", "100"], "chunk_bytes is 100: it cuts 36983552 bytes into 369844 tasks, more than 65536"),
    (["plan", "--checkpoint", "/nowhere"], "checkpoint directory '/nowhere' does not exist"),
    (["plan", "--checkpoint", "/nowhere", "--preset", "tiny-qwen2"], "--preset and --layers do not go with it"),
    (["plan", "--checkpoint", "/nowhere", "--layers", "2"], "--preset and --layers do not go with it"),
    (["plan", "--no-such-flag"], "No such option '--no-such-flag'"),
    (["plan", "something"], "unexpected extra argument (something)"),
    (["plant"], "No such command 'plant'"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSALS)
def test_what_cannot_be_planned_is_one_line_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in refused(capsys, argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeat", "0"], "repeat is 0, it must be at least 1"),
        (["--deadline", "inf"], "option deadline_seconds is inf"),
        (["--deadline", "0"], "option deadline_seconds is 0.0"),
        (["--budget-bytes", "1000"], "option budget_bytes is 1000, it must be at least 65536"),
        (["--in-flight", "0"], "option in_flight is 0"),
        (["--lookahead", "-1"], "option lookahead is -1"),
        (["--strategy", "fastest"], "option strategy is 'fastest'"),
        (["--preset", "qwen9"], "unknown preset 'qwen9'"),
        (["--src", "tp=0"], "tp='0' is not a positive integer"),
        (["--replicas", "0"], "replicas is 0"),
        (["--checkpoint", "/nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_synced_is_refused_before_any_actor_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("ray.init", never)
    assert message in refused(capsys, ["sync", *argv])


def small() -> ModelConfig:
    return preset("tiny-qwen2").with_layers(2)


def write_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of two layers, of zeros, and return its weight file."""
    (folder / "config.json").write_text(json.dumps({**PRESETS["tiny-qwen2"], "num_hidden_layers": 2}))
    file = folder / "model.safetensors"
    save_file(
        {tensor.name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in logical_tensors(small())}, file
    )
    return file


def test_a_checkpoint_is_planned_as_its_preset_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    of_checkpoint = plan(capsys, "--checkpoint", str(tmp_path))
    of_preset = plan(capsys, "--layers", "2")
    assert {**of_checkpoint, "seconds": 0} == {**of_preset, "seconds": 0}


def test_a_truncated_checkpoint_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    message = refused(capsys, ["plan", "--checkpoint", str(tmp_path)])
    assert "model.safetensors" in message
    assert "truncated" in message
    file.write_bytes(whole[:100])
    assert "does not fit in a file of 100 bytes" in refused(capsys, ["plan", "--checkpoint", str(tmp_path)])


def test_a_checkpoint_that_lacks_a_tensor_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path)
    save_file({"model.norm.weight": torch.zeros(1)}, file)
    assert "tensor" in refused(capsys, ["plan", "--checkpoint", str(tmp_path)])


def test_a_plan_as_json_is_one_object_with_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--layers", "2", "--src", "tp=3", "--dst", "tp=2", "--replicas", "2")
    assert tuple(found) == PLAN_KEYS
    assert found["actors"] == 7
    seconds = found["seconds"]
    assert isinstance(seconds, dict)
    assert tuple(seconds) == ("describe", "reshard", "schedule")
    assert all(isinstance(value, float) and value >= 0 for value in seconds.values())
    assert isinstance(found["gap"], float)
    assert (found["strategy"], found["ports"]) != ("auto", "half")
    assert found["ports"] == "half"
    whole = sum(torch.Size(tensor.shape).numel() * 2 for tensor in logical_tensors(preset("tiny-qwen2").with_layers(2)))
    assert isinstance(found["nbytes"], int)
    # Twice the model, and the norms and shared heads that both ranks of a replica hold.
    assert 2 * whole < found["nbytes"] < 2.2 * whole


def test_the_same_plan_has_the_same_digest_and_another_another(capsys: pytest.CaptureFixture[str]) -> None:
    digests = [
        plan(capsys, "--layers", "2", *more)["digest"]
        for more in ([], [], ["--ports", "full"], ["--dst", "tp=2"], ["--dtype", "float32"], ["--chunk-bytes", "99999"])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_a_relay_has_a_task_for_each_receiver_and_a_digest_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    broadcast, auto, chain, tree = (
        plan(capsys, "--layers", "2", "--dst", "tp=1", "--replicas", "3", "--fan-out", method)
        for method in ("broadcast", "auto", "chain", "tree")
    )
    assert auto["digest"] == broadcast["digest"]
    assert len({str(found["digest"]) for found in (broadcast, chain, tree)}) == 3
    assert isinstance(broadcast["tasks"], int)
    assert chain["tasks"] == tree["tasks"] == 3 * broadcast["tasks"]
    assert chain["nbytes"] == broadcast["nbytes"]


def test_explain_adds_the_waves(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--layers", "2", "--explain")
    assert tuple(found) == (*PLAN_KEYS, "explain")
    explanation = found["explain"]
    assert isinstance(explanation, dict)
    waves = explanation["waves"]
    assert isinstance(waves, list)
    assert len(waves) == found["waves"]


def test_a_plan_for_a_person_is_a_table_and_explained_a_line_a_wave(capsys: pytest.CaptureFixture[str]) -> None:
    waves = plan(capsys, "--layers", "2", "--chunk-bytes", "200000")["waves"]
    assert isinstance(waves, int)
    assert call(["plan", "--layers", "2", "--chunk-bytes", "200000"]) == 0
    table, err = capsys.readouterr()
    assert err == ""
    assert table.splitlines()[0] == "tiny-qwen2: tp=2,pp=2 -> 2 x tp=3"
    names = [line.split("  ")[1] for line in table.splitlines()[1:]]
    assert names == [
        "actors", "pieces", "bytes delivered", "routes", "tasks", "waves", "makespan", "gap", "strategy", "seconds",
        "digest",
    ]  # fmt: skip
    assert call(["plan", "--layers", "2", "--chunk-bytes", "200000", "--explain"]) == 0
    explained, _ = capsys.readouterr()
    assert explained.count("\n") >= table.count("\n") + min(waves, 10)


def test_a_mixture_of_experts_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--preset", "tiny-qwen3-moe", "--src", "tp=2,dp=2,ep=4", "--dst", "tp=2", "--replicas", "1")
    assert found["actors"] == 6


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: wavecast [OPTIONS] COMMAND [ARGS]...")
    assert err == ""


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wavecast.runtime.cli.make_plan", interrupt)
    assert call(["plan"]) == 130
    _, err = capsys.readouterr()
    assert err.strip() == "wavecast: interrupted"


def test_a_plan_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    """In a process of its own, with both made impossible to import."""
    write_checkpoint(tmp_path)
    script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "torch", "numpy"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refuse())
from wavecast.runtime.cli import main

for arguments in (["--layers", "2", "--explain"], ["--checkpoint", sys.argv[1]]):
    try:
        main(["plan", "--json", *arguments])
    except SystemExit as exit:
        if exit.code:
            raise
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [tuple(json.loads(line))[:3] for line in lines] == [("actors", "pieces", "routes")] * 2
