"""The page on layouts of one's own: its code runs, and moves what it says it moves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.runtime.layout.moving import move
from wavecast.runtime import Shard, describe
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.naming import name_layouts

PAGE = Path(__file__).parents[3] / "docs" / "custom.md"
VOCABULARY, HIDDEN, INNER = 7, 4, 6


@pytest.fixture(scope="module")
def page():
    """Everything that the page's code defines."""
    defined = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), defined)

    return defined


class Layer(torch.nn.Module):
    def __init__(self, ranks):
        super().__init__()
        self.gate_up = torch.nn.Linear(HIDDEN, 2 * INNER // ranks, bias=False)
        self.down = torch.nn.Linear(INNER // ranks, HIDDEN, bias=False)
        self.norm = torch.nn.LayerNorm(HIDDEN, bias=False)


class Model(torch.nn.Module):
    """A rank's part of a model as the page has it."""

    def __init__(self, wholes, rank, ranks):
        super().__init__()
        self.embed = torch.nn.Embedding(-(-VOCABULARY // ranks), HIDDEN)
        self.layers = torch.nn.ModuleList([Layer(ranks)])
        layer, mine = self.layers[0], slice(rank * INNER // ranks, (rank + 1) * INNER // ranks)
        padded = torch.cat([wholes["model.embed_tokens.weight"], torch.full((ranks, HIDDEN), -7.0)])
        with torch.no_grad():
            self.embed.weight.copy_(padded[rank * self.embed.weight.shape[0] :][: self.embed.weight.shape[0]])
            mlp = "model.layers.0.mlp."
            layer.gate_up.weight.copy_(
                torch.cat([wholes[f"{mlp}gate_proj.weight"][mine], wholes[f"{mlp}up_proj.weight"][mine]])
            )
            layer.down.weight.copy_(wholes[f"{mlp}down_proj.weight"][:, mine])
            layer.norm.weight.copy_(wholes["model.layers.0.post_attention_layernorm.weight"])


SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
}


def wholes_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("sources", "destinations"), [(3, 2), (2, 3), (6, 1)])
def test_the_pages_own_module_is_resharded(page, sources, destinations):
    new, old = wholes_of(1), wholes_of(2)
    trainers = [Model(new, rank, sources) for rank in range(sources)]
    engines = [Model(old, rank, destinations) for rank in range(destinations)]
    expected = [Model(new, rank, destinations) for rank in range(destinations)]
    held = [page["shards"](model, rank, sources, VOCABULARY) for rank, model in enumerate(trainers)]
    wanted = [page["shards"](model, rank, destinations, VOCABULARY) for rank, model in enumerate(engines)]
    assert page["check"](held, wanted).endswith(" bytes")
    move(held, wanted)
    for engine, model in zip(engines, expected, strict=True):
        for (name, got), want in zip(engine.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(got, want), name


def test_the_pages_own_module_fits_in_twenty_lines(page):
    block = next(block for block in PAGE.read_text(encoding="utf-8").split("```") if "def shards(" in block)
    body = [line for line in block.split("def shards(")[1].splitlines()[1:] if line.strip()]
    assert len(body) <= 20


def test_a_missing_part_is_found_without_moving_anything(page):
    held = page["shards"](Model(wholes_of(1), 0, 2), 0, 2, VOCABULARY)
    with pytest.raises(LayoutError, match=r"no source holds 'model\.embed_tokens\.weight' at offset \(4, 0\)"):
        page["check"]([held], [[Shard("model.embed_tokens.weight", torch.zeros(7, 4), (0, 0), (7, 4))]])


def test_the_pages_groups_have_names_and_its_options_aliases(page):
    policy, rollout = page["groups"](["trainer"], [["engine 0"], ["engine 1"]])
    naming = name_layouts(
        [held("wte", "rope.freqs")],
        [held("engine.lm_head.weight", "model.embed_tokens.weight")],
        source_names=policy.names,
        destination_names=rollout.names,
        aliases=page["TIED"].aliases,
    )
    assert [piece.tensor for piece in naming.sources[0].pieces] == ["model.embed_tokens.weight"]
    assert [piece.tensor for piece in naming.destinations[0].pieces] == ["model.embed_tokens.weight"] * 2


def held(*names):
    return describe([Shard(name, torch.zeros(1), (0,), (1,)) for name in names])


def test_the_other_functions_of_the_page_give_shards(page):
    model = Model(wholes_of(1), 0, 1)
    for function in (page["fsdp2_or_tensor_parallel"], page["fsdp1"]):
        assert len(function(model)) == 4

    assert len(page["any_flat_buffer"](torch.zeros(5), [("w", (2, 2))], 0)) == 1
    assert [
        shard.view.dtype for shard in page["quantised"]([Shard("a.up_proj.weight", torch.ones(2, 2), (0, 0), (2, 2))])
    ] == [
        torch.float8_e4m3fn,
        torch.float32,
    ]
