"""Which model a command is about, and who holds what of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from wavecast.runtime.errors import CheckpointError, ConfigError
from wavecast.runtime.model import DEFAULT_PRESET, Sides, as_table, describe_sides, resolve_model
from wavecast.runtime.plan_job import gigabytes, make_plan, plan_as_json
from wavecast.runtime.presets import preset


def test_without_a_name_it_is_the_default_preset() -> None:
    assert resolve_model(preset_name=None, checkpoint=None, layers=None) == preset(DEFAULT_PRESET)
    assert resolve_model(preset_name="qwen2.5-7b", checkpoint=None, layers=None) == preset("qwen2.5-7b")


def test_a_preset_can_be_scaled_down() -> None:
    config = resolve_model(preset_name="qwen3-30b-a3b", checkpoint=None, layers=3)
    assert config == preset("qwen3-30b-a3b").with_layers(3)
    assert config != preset("qwen3-30b-a3b")


@pytest.mark.parametrize(("preset_name", "layers"), [("tiny-qwen2", None), (None, 2), ("tiny-qwen2", 2)])
def test_a_checkpoint_goes_with_neither_preset_nor_layers(preset_name: str | None, layers: int | None) -> None:
    with pytest.raises(ConfigError, match="--checkpoint brings its own configuration"):
        resolve_model(preset_name=preset_name, checkpoint="/nowhere", layers=layers)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone' does not exist"):
        resolve_model(preset_name=None, checkpoint=str(tmp_path / "gone"), layers=None)


def sides(src: str, dst: str, replicas: int) -> Sides:
    return describe_sides(preset("tiny-qwen2").with_layers(2), src=src, dst=dst, replicas=replicas, dtype="bfloat16")


def test_sides_have_a_layout_a_rank_and_equal_replicas() -> None:
    found = sides("tp=2,pp=2", "tp=3", 2)
    assert len(found.sources) == 4
    assert [len(replica) for replica in found.replicas] == [3, 3]
    assert found.replicas[0] == found.replicas[1]
    assert found.destinations == (*found.replicas[0], *found.replicas[1])
    held = {piece.tensor for layout in found.sources for piece in layout.pieces}
    assert held == {piece.tensor for layout in found.replicas[0] for piece in layout.pieces}


@pytest.mark.parametrize("replicas", [0, -1])
def test_there_is_at_least_one_replica(replicas: int) -> None:
    with pytest.raises(ConfigError, match=f"replicas is {replicas}, it must be at least 1"):
        sides("tp=1", "tp=1", replicas)


@pytest.mark.parametrize(("src", "dst"), [("tp=0", "tp=1"), ("tp=1", "pp=3"), ("tp=13", "tp=1"), ("tp=1", "ep=2")])
def test_an_impossible_mesh_on_either_side_is_refused(src: str, dst: str) -> None:
    with pytest.raises(ConfigError):
        sides(src, dst, 1)


def test_a_plan_counts_what_it_planned() -> None:
    outcome = make_plan(
        preset("tiny-qwen2").with_layers(2),
        src="tp=2",
        dst="tp=1",
        replicas=1,
        dtype="bfloat16",
        strategy="first_fit",
        ports="full",
        chunk_bytes=1 << 20,
    )
    found = plan_as_json(outcome)
    elements = sum(piece.box.numel for layout in outcome.sides.destinations for piece in layout.pieces)
    assert found["nbytes"] == 2 * elements == sum(route.nbytes for route in outcome.plan.routes)
    assert found["actors"] == 3
    assert found["tasks"] == sum(len(wave.tasks) for wave in outcome.schedule.waves)
    assert found["waves"] == len(outcome.schedule.waves)
    assert found["gap"] == outcome.schedule.makespan_bytes / outcome.schedule.bound.nbytes
    assert (found["strategy"], found["ports"]) == ("first_fit", "full")


def test_a_table_is_aligned_under_its_title() -> None:
    assert as_table("title", {"a": "1", "long": "2, 3"}) == "title\n  a     1\n  long  2, 3"


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (15_231_233_024, "15.23 GB")],
)
def test_bytes_are_shown_in_units_of_a_thousand(nbytes: int, shown: str) -> None:
    assert gigabytes(nbytes) == shown
