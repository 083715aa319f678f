"""The page of layouts is what its command writes, and its proofs can fail."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "layouts.md"

#: One of each kind: uneven, replicas, experts, engines, padding, 2-D tiles, flat ranges, casts, FP8, LoRA, refusals.
HANDFUL = (
    "tp 5 to 7, uneven",
    "pp 2 x tp 2 to tp 4, 3 replicas",
    "ep 2 x etp 2 to etp 3",
    "query groups cut: Megatron tp 4 to vLLM tp 2",
    "virtual stages: Megatron pp 2 x 2 to vLLM tp 2",
    "latent attention, ep 4 x etp 2 to vLLM tp 4, experts shared out",
    "Mixtral, ep 8 to vLLM tp 4",
    "FSDP2 x tp to vLLM: 2-D tiles",
    "FSDP1 on 3 ranks to tp 4",
    "colocated, tp 2 to 3",
    "float32 to bfloat16, tp 3 to 2",
    "bfloat16 to FP8 pairs",
    "LoRA to vLLM tp 4",
    "part of the rows",
    "FP8 blocks cut between ranks",
)


@pytest.fixture(scope="module")
def zoo():
    """The command's module: benchmarks are scripts, found beside each other."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("layout_zoo")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def cases(zoo, names):
    by_name = {case.name: case for case in zoo.CASES}
    return [by_name[name] for name in names]


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_rows_of_the_page_are_what_the_command_finds(zoo):
    rows = [zoo.run(case) for case in cases(zoo, HANDFUL)]
    assert set(lines_of(zoo.table(rows))) <= set(lines_of(PAGE.read_text(encoding="utf-8")))
    assert [row.result for row in rows[:-2]] == ["pass"] * 13
    assert all(row.elements > 100_000 for row in rows[:-2])


def test_the_page_has_each_case_once_in_order(zoo):
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines_of(PAGE.read_text(encoding="utf-8"))]
    assert names == ["case", "---", *(case.name for case in zoo.CASES)]
    assert len({case.name for case in zoo.CASES}) == len(zoo.CASES)


def test_the_command_writes_between_the_markers_only(zoo, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- zoo: begin -->\nold\n<!-- zoo: end -->\nafter\n", encoding="utf-8")
    (row,) = [zoo.run(case) for case in cases(zoo, ["sums pending"])]
    zoo.write([row], page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- zoo: begin -->\n\n1 pairs: 0 pass")
    assert text.endswith("\n\n<!-- zoo: end -->\nafter\n")
    assert "old" not in text
    assert zoo.table([row]) in text
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks the markers"):
        zoo.write([row], page)


def test_a_case_of_which_nothing_arrives_is_no_pass(zoo, monkeypatch):
    monkeypatch.setattr(zoo, "_move", lambda *_: None)
    for case in cases(zoo, ["tp 3 to 2", "LoRA to vLLM tp 4"]):
        with pytest.raises(AssertionError, match="of destination 0 is wrong"):
            zoo.run(case)


def test_a_single_wrong_element_is_found(zoo, monkeypatch):
    move = zoo._move

    def spoil(ready, sources, destinations):
        move(ready, sources, destinations)
        zoo.as_bits(destinations[-1].memory[-1]).view(-1)[-1] ^= 1

    monkeypatch.setattr(zoo, "_move", spoil)
    with pytest.raises(AssertionError, match="tp 3 to 2: tensor 50 of destination 1 is wrong"):
        zoo.run(*cases(zoo, ["tp 3 to 2"]))


def test_a_case_that_passes_where_it_should_be_refused_is_an_error(zoo):
    (case,) = cases(zoo, ["tp 3 to 2"])
    with pytest.raises(AssertionError, match="expected LayoutError, got pass"):
        zoo.run(replace(case, refusal="LayoutError"))
