"""Logical tensors and layouts, held against Transformers' modules and arrays cut by the frameworks' own rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.hf import Split, layouts, logical_tensors, stage_layers
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.presets import preset

CASES = json.loads(Path(__file__).with_name("transformers_tensors.json").read_text("ascii"))

BASE = {"hidden_size": 12, "num_hidden_layers": 5, "vocab_size": 23}
QWEN2 = {
    **BASE,
    "model_type": "qwen2",
    "intermediate_size": 17,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LLAMA = {**QWEN2, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
QWEN2_MOE = {
    **QWEN2,
    "model_type": "qwen2_moe",
    "num_experts": 7,
    "moe_intermediate_size": 9,
    "shared_expert_intermediate_size": 11,
    "decoder_sparse_step": 2,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 7}
DEEPSEEK = {
    **BASE,
    "model_type": "deepseek_v3",
    "intermediate_size": 17,
    "num_attention_heads": 6,
    "moe_intermediate_size": 9,
    "n_routed_experts": 7,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "attention_bias": True,
}
MODELS = [QWEN2, LLAMA, QWEN2_MOE, MIXTRAL, DEEPSEEK]


# The oracle: whole tensors, cut by numpy. It knows no boxes, and tells a tensor's kind from the end of its name.


def oracle_cut(name, whole, mapping, *, tp, tp_size, etp, etp_size):
    """Return the part of ``whole`` that Megatron's rules give a rank, uneven parts allowed."""
    heads = mapping["num_attention_heads"]
    group = heads // mapping.get("num_key_value_heads", heads)
    parent, leaf = name.rsplit(".", 1)
    module = parent.rsplit(".", 1)[-1]
    index, size = (etp, etp_size) if ".experts." in name else (tp, tp_size)
    if module in ("embed_tokens", "lm_head", "gate_proj", "up_proj", "w1", "w3"):
        return np.array_split(whole, size, axis=0)[index]

    if module in ("down_proj", "w2"):
        return whole if leaf == "bias" else np.array_split(whole, size, axis=1)[index]

    mine = np.array_split(np.arange(heads), size)[index]
    if module == "o_proj":
        if leaf == "bias":
            return whole

        by_head = whole.reshape(len(whole), heads, -1)
        return by_head[:, mine].reshape(len(whole), -1)

    if module in ("q_proj", "q_b_proj", "kv_b_proj"):
        return whole.reshape(heads, -1, *whole.shape[1:])[mine].reshape(-1, *whole.shape[1:])

    if module in ("k_proj", "v_proj"):
        kv = sorted({int(head) // group for head in mine})
        return whole.reshape(heads // group, -1, *whole.shape[1:])[kv].reshape(-1, *whole.shape[1:])

    assert "norm" in module or module in ("q_a_proj", "kv_a_proj_with_mqa", "gate", "shared_expert_gate")
    return whole


def oracle_rank(wholes, mapping, mesh, rank):
    """Return everything that ``rank`` holds."""
    ranks = np.arange(mesh.world_size)
    pp, _, tp = (int(i) for i in np.argwhere(ranks.reshape(mesh.pp, mesh.dp, mesh.tp) == rank)[0])
    _, _, ep, etp = (int(i) for i in np.argwhere(ranks.reshape(mesh.pp, -1, mesh.ep, mesh.etp) == rank)[0])
    layers = np.array_split(np.arange(mapping["num_hidden_layers"]), mesh.pp)[pp]
    experts = mapping.get("num_experts", mapping.get("num_local_experts", mapping.get("n_routed_experts", 0)))
    mine = np.array_split(np.arange(experts), mesh.ep)[ep]
    held = {}
    for name, whole in wholes.items():
        words = name.split(".")
        if words[1] == "layers":
            here = int(words[2]) in layers and (
                "experts" not in words or int(words[words.index("experts") + 1]) in mine
            )
        elif words[1] == "embed_tokens":
            here = pp == 0 or (pp == mesh.pp - 1 and mapping.get("tie_word_embeddings", False))
        else:
            here = pp == mesh.pp - 1

        if here:
            held[name] = oracle_cut(name, whole, mapping, tp=tp, tp_size=mesh.tp, etp=etp, etp_size=mesh.etp)

    return held


def whole_tensors(config):
    """Return each logical tensor with numbers that no other element of the model has."""
    wholes, used = {}, 0
    for tensor in logical_tensors(config):
        wholes[tensor.name] = np.arange(used, used + tensor.numel).reshape(tensor.shape)
        used += tensor.numel

    return wholes


def cut(whole, box):
    return whole[tuple(slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True))]


@st.composite
def models_and_meshes(draw):
    mapping = draw(st.sampled_from(MODELS))
    tp, pp, dp = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    ep, etp = 1, 0
    if mapping is not QWEN2 and mapping is not LLAMA:
        fits = [(a, b) for a in range(1, 8) for b in range(1, 10) if (tp * dp) % (a * b) == 0]
        ep, etp = draw(st.sampled_from(fits))

    return mapping, MeshSpec(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp)


@settings(max_examples=60)
@given(models_and_meshes())
def test_every_rank_holds_what_the_frameworks_rules_give_it(model_and_mesh):
    mapping, mesh = model_and_mesh
    config = ModelConfig.from_dict(mapping)
    wholes = whole_tensors(config)
    seen = {name: np.zeros(whole.shape, bool) for name, whole in wholes.items()}
    for rank, layout in enumerate(layouts(config, mesh)):
        expected = oracle_rank(wholes, mapping, mesh, rank)
        assert [piece.tensor for piece in layout.pieces] == list(expected)
        for piece in layout.pieces:
            assert piece.global_shape == wholes[piece.tensor].shape
            np.testing.assert_array_equal(cut(wholes[piece.tensor], piece.box), expected[piece.tensor])
            cut(seen[piece.tensor], piece.box)[...] = True

    assert all(mask.all() for mask in seen.values())


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_order_are_those_of_the_transformers_module(case):
    config = ModelConfig.from_dict(CASES[case]["config"])
    ours = [[tensor.name, list(tensor.shape)] for tensor in logical_tensors(config)]
    assert ours == CASES[case]["tensors"]


def piece(layout, name):
    return next(piece for piece in layout.pieces if piece.tensor == name)


def boxes(config, text, name, **options):
    return [piece(layout, name).box for layout in layouts(config, MeshSpec.parse(text), **options)]


def test_two_kv_heads_over_three_ranks_are_where_their_query_heads_are():
    config = preset("tiny-qwen2")  # 12 query heads and 2 KV heads of 32, hidden 384
    prefix = "model.layers.0.self_attn."
    assert boxes(config, "tp=3", f"{prefix}q_proj.weight") == [
        Box((0, 0), (128, 384)),
        Box((128, 0), (128, 384)),
        Box((256, 0), (128, 384)),
    ]
    kv = [Box((0, 0), (32, 384)), Box((0, 0), (64, 384)), Box((32, 0), (32, 384))]
    assert boxes(config, "tp=3", f"{prefix}k_proj.weight") == kv
    assert boxes(config, "tp=3", f"{prefix}v_proj.weight") == kv
    assert boxes(config, "tp=3", f"{prefix}k_proj.bias") == [Box((0,), (32,)), Box((0,), (64,)), Box((32,), (32,))]
    assert boxes(config, "tp=3", f"{prefix}o_proj.weight") == [
        Box((0, 0), (384, 128)),
        Box((0, 128), (384, 128)),
        Box((0, 256), (384, 128)),
    ]
    assert boxes(config, "tp=3", "model.layers.0.mlp.gate_proj.weight") == [
        Box((0, 0), (342, 384)),
        Box((342, 0), (341, 384)),
        Box((683, 0), (341, 384)),
    ]
    assert boxes(config, "tp=3", "model.embed_tokens.weight") == [
        Box((0, 0), (5462, 384)),
        Box((5462, 0), (5461, 384)),
        Box((10923, 0), (5461, 384)),
    ]
    assert boxes(config, "tp=3", "model.norm.weight") == [Box((0,), (384,))] * 3


def test_six_query_heads_over_four_ranks_are_uneven_and_whole():
    config = ModelConfig.from_dict(LLAMA)  # heads of 2, two queries to a KV head
    assert boxes(config, "tp=4", "model.layers.0.self_attn.q_proj.weight") == [
        Box((0, 0), (4, 12)),
        Box((4, 0), (4, 12)),
        Box((8, 0), (2, 12)),
        Box((10, 0), (2, 12)),
    ]
    assert boxes(config, "tp=4", "model.layers.0.self_attn.k_proj.weight") == [
        Box((0, 0), (2, 12)),
        Box((2, 0), (2, 12)),
        Box((4, 0), (2, 12)),
        Box((4, 0), (2, 12)),
    ]


@pytest.mark.parametrize(("kv_heads", "tp"), [(2, 4), (2, 6), (3, 6), (1, 3), (4, 12)])
def test_fewer_kv_heads_than_ranks_are_replicated_as_vllm_does(kv_heads, tp):
    split = Split(0, 12, 12 // kv_heads)
    replicas = tp // kv_heads
    for rank in range(tp):
        assert split.run(kv_heads * 8, parts=tp, index=rank) == (rank // replicas * 8, (rank // replicas + 1) * 8)


@pytest.mark.parametrize(("kv_heads", "tp"), [(4, 2), (6, 3), (12, 4), (4, 4)])
def test_kv_heads_that_divide_are_cut_the_standard_way(kv_heads, tp):
    split = Split(0, 12, 12 // kv_heads)
    each = kv_heads * 8 // tp
    assert [split.run(kv_heads * 8, parts=tp, index=i) for i in range(tp)] == [
        (i * each, (i + 1) * each) for i in range(tp)
    ]


def test_experts_are_dealt_out_over_folded_ranks():
    config = preset("tiny-qwen3-moe")  # 16 experts of width 128
    mesh = MeshSpec.parse("tp=2,dp=3,ep=3,etp=2")
    ranks = layouts(config, mesh)
    held = [
        sorted(
            {int(p.tensor.split(".")[5]) for p in layout.pieces if p.tensor.startswith("model.layers.0.mlp.experts.")}
        )
        for layout in ranks
    ]
    assert held == [[*range(6)]] * 2 + [[*range(6, 11)]] * 2 + [[*range(11, 16)]] * 2
    name = "model.layers.0.mlp.experts.7.down_proj.weight"
    assert piece(ranks[2], name).box == Box((0, 0), (256, 64))
    assert piece(ranks[3], name).box == Box((0, 64), (256, 64))


@pytest.mark.parametrize(
    ("pp", "pp_layers", "expected"),
    [
        (1, None, [range(0, 8)]),
        (3, None, [range(0, 3), range(3, 6), range(6, 8)]),
        (5, None, [range(0, 2), range(2, 4), range(4, 6), range(6, 7), range(7, 8)]),
        (3, (1, 6, 1), [range(0, 1), range(1, 7), range(7, 8)]),
        (3, (0, 8, 0), [range(0, 0), range(0, 8), range(8, 8)]),
    ],
)
def test_stages_take_consecutive_layers(pp, pp_layers, expected):
    assert stage_layers(preset("tiny-qwen2"), MeshSpec(pp=pp), pp_layers=pp_layers) == tuple(expected)


def test_a_tied_embedding_is_on_the_first_and_the_last_stage():
    config = preset("tiny-qwen2")
    ranks = layouts(config, MeshSpec.parse("pp=3"), pp_layers=[2, 5, 1])
    ends = [[p.tensor for p in layout.pieces if ".layers." not in p.tensor] for layout in ranks]
    assert ends == [["model.embed_tokens.weight"], [], ["model.embed_tokens.weight", "model.norm.weight"]]
    assert {int(p.tensor.split(".")[2]) for p in ranks[1].pieces} == {2, 3, 4, 5, 6}
    assert piece(ranks[0], "model.embed_tokens.weight") == piece(ranks[2], "model.embed_tokens.weight")


def test_an_untied_head_is_on_the_last_stage_alone():
    ranks = layouts(preset("tiny-qwen3-moe"), MeshSpec.parse("pp=2"))
    ends = [[p.tensor for p in layout.pieces if ".layers." not in p.tensor] for layout in ranks]
    assert ends == [["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]]


def test_the_scores_bias_stays_in_float32():
    (layout,) = layouts(ModelConfig.from_dict(DEEPSEEK), MeshSpec(), dtype="float16")
    dtypes = {p.tensor: p.dtype for p in layout.pieces}
    kept = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert kept == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2, 3, 4)}
    assert set(dtypes.values()) == {"float16", "float32"}


def test_equal_pieces_are_one_object():
    ranks = layouts(preset("tiny-qwen2"), MeshSpec.parse("tp=4,dp=2"))
    assert [ranks[rank] is ranks[rank + 4] for rank in range(4)] == [True] * 4
    norm, k_proj = "model.layers.3.input_layernorm.weight", "model.layers.3.self_attn.k_proj.weight"
    assert len({id(piece(layout, norm)) for layout in ranks}) == 1
    assert piece(ranks[0], k_proj) is piece(ranks[1], k_proj)
    assert piece(ranks[2], k_proj) is piece(ranks[3], k_proj)
    assert piece(ranks[0], norm).box is piece(ranks[0], "model.layers.7.input_layernorm.weight").box


@pytest.mark.parametrize(
    ("name", "mesh", "pieces", "objects"),
    [
        ("kimi-k2", "tp=8,pp=8,dp=4,ep=32,etp=1", 96_480, 72_551),
        ("qwen3-235b-a22b", "tp=4,pp=4,dp=4,ep=8,etp=2", 85_776, 74_175),
    ],
)
def test_a_large_mixture_of_experts_stays_small(name, mesh, pieces, objects):
    ranks = layouts(preset(name), MeshSpec.parse(mesh))
    held = [p for layout in ranks for p in layout.pieces]
    assert len(held) == pieces
    assert len({id(p) for p in held}) == objects
    assert len({id(p.box) for p in held}) < 200


def test_a_layout_is_the_same_every_time():
    config, mesh = preset("tiny-qwen3-moe"), MeshSpec.parse("tp=3,pp=2,dp=2,ep=2")
    assert layouts(config, mesh) == layouts(config, mesh)


@pytest.mark.parametrize(
    ("mapping", "mesh", "message"),
    [
        (QWEN2, "tp=7", "tp=7 exceeds num_attention_heads=6"),
        ({**QWEN2, "vocab_size": 3}, "tp=4", "tp=4 exceeds vocab_size=3"),
        ({**QWEN2, "intermediate_size": 3}, "tp=4", "tp=4 exceeds intermediate_size=3"),
        ({**QWEN2_MOE, "shared_expert_intermediate_size": 2}, "tp=3", "tp=3 exceeds the shared experts' width=2"),
        (QWEN2, "pp=6", "pp=6 exceeds the model's 5 layers"),
        (QWEN2, "dp=2,ep=2", "ep=2 asks for experts, and none of the model's 5 layers has any"),
        ({**DEEPSEEK, "num_hidden_layers": 1}, "dp=2,ep=2", "ep=2 asks for experts, and none of the model's 1 layers"),
        (MIXTRAL, "dp=8,ep=8", "ep=8 exceeds the model's 7 experts"),
        (DEEPSEEK, "dp=10,etp=10", "etp=10 exceeds the width 9 of an expert"),
    ],
)
def test_an_impossible_mesh_is_refused(mapping, mesh, message):
    with pytest.raises(ConfigError, match=message):
        layouts(ModelConfig.from_dict(mapping), MeshSpec.parse(mesh))


@pytest.mark.parametrize("pp_layers", [(4, 4), (3, 3, 3), (9, -1, 0), (4, 0, 4), ()])
def test_stages_that_do_not_add_up_are_refused(pp_layers):
    with pytest.raises(ConfigError, match=r"pp_layers=\("):
        layouts(preset("tiny-qwen2"), MeshSpec(pp=3), pp_layers=pp_layers)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="unknown dtype 'bf16'"):
        layouts(preset("tiny-qwen2"), MeshSpec(), dtype="bf16")


def test_an_all_experts_model_needs_no_width_for_a_dense_mlp():
    config = ModelConfig.from_dict({**MIXTRAL, "intermediate_size": 3})
    assert len(layouts(config, MeshSpec.parse("tp=4,etp=2"))) == 4
