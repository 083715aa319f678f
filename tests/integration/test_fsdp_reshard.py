"""Real FSDP2, tensor parallel and FSDP1 modules on four ranks over gloo: what arrives is what torch itself cuts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("fsdp_ranks.py")
WORLD = 4
SECONDS = 150.0

#: Parameters of which each of the four ranks holds something at the destination.
CASES = {
    "fsdp4 to whole": (14, 0, 0, 0),
    "fsdp4 to tp2": (14, 14, 0, 0),
    "fsdp4 to tp3 in bfloat16": (14, 14, 14, 0),
    "fsdp2 x tp2 to tp3": (14, 14, 14, 0),
    "fsdp2 x tp2 to tp4": (14, 14, 14, 14),
    "hsdp 2 x 2 to tp3": (14, 14, 14, 0),
    "fsdp2 x ep2 to fsdp3": (14, 14, 14, 0),
    "tp3 to fsdp2 x tp2": (14, 14, 14, 14),
    "tp4 to fsdp3": (14, 14, 14, 0),
    "tp2 to hsdp 2 x 2": (14, 14, 14, 14),
    "whole to fsdp4": (14, 14, 14, 10),
    "fsdp1 flat to tp3": (14, 14, 14, 0),
    "fsdp1 original to fsdp2 x tp2": (14, 14, 14, 14),
    "fsdp1 unsharded to tp2": (14, 14, 0, 0),
}

pytestmark = pytest.mark.timeout(SECONDS + 10)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank saw of every case, from one run of all of them."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANKS), str(rank), str(WORLD), str(folder / "store"), str(folder / f"rank{rank}")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()

    codes = [process.returncode for process in ranks]
    assert codes == [0] * WORLD, "\n".join(said)
    return [json.loads((folder / f"rank{rank}").read_text(encoding="utf-8")) for rank in range(WORLD)]


def test_every_case_was_run(seen):
    assert [name for name in seen[0] if " to " in name] == list(CASES)


@pytest.mark.parametrize("case", CASES)
def test_every_local_parameter_is_what_torch_cuts_of_the_new_weights(seen, case):
    ranks = [rank[case] for rank in seen]
    assert [rank["differing"] for rank in ranks] == [[]] * WORLD
    assert tuple(rank["differed_before"] for rank in ranks) == CASES[case]
    assert {rank["digest"] for rank in ranks} == {ranks[0]["digest"]}
    # With the experts taken apart, six logical tensors stand for each of the two stacks.
    assert ranks[0]["tensors"] == (24 if "ep2" in case else 14)


def test_a_module_left_gathered_is_read_where_the_optimizer_wrote(seen):
    ranks = [rank["after a forward pass"] for rank in seen]
    assert [rank["gathered"] for rank in ranks] == [14] * WORLD
    assert all(rank["changed"] for rank in ranks)
    assert all(rank["equal"] and rank["shared"] for rank in ranks)


def test_adapters_that_fsdp_cut_are_gathered_and_merged_into_a_base_that_is_not(seen):
    ranks = [rank["adapters under fsdp"] for rank in seen]
    assert [rank["differing"] for rank in ranks] == [[]] * WORLD
    # Of A's three rows one rank has none, so its own shards say nothing of their place.
    assert all(rank["refused"].startswith("this actor lacks 'layers.0.up_proj.lora_") for rank in ranks)
