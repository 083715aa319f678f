"""The vLLM layout, held against what vLLM's own loader made of the same checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.layout.known_bits import known_checkpoint, quantised_checkpoint, sha256_of
from tests.runtime.layout.moving import move
from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout import fp8, vllm
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Shard, describe
from wavecast.runtime.layout.vllm import EngineFormat, EngineRank
from wavecast.runtime.plan.reshard import plan_reshard

GOLDEN = json.loads((Path(__file__).with_name("golden") / "vllm.json").read_text("ascii"))
BLOCK = (128, 128)


def ranks_of(case):
    """Return every worker of a case, in the order of its dumps."""
    return [
        EngineRank(tp, case["tp"], pp, case["pp"], dp, case["dp"], case["ep"])
        for dp in range(case["dp"])
        for pp in range(case["pp"])
        for tp in range(case["tp"])
    ]


def format_of(case):
    layers, quantised = case["pp_layers"], "quantization_config" in case["config"]
    return EngineFormat(pp_layers=None if layers is None else tuple(layers), scale_block=BLOCK if quantised else None)


def shards_of(named, config, rank, **options):
    return vllm.shards(
        named,
        config,
        tp_rank=rank.tp_rank,
        tp_size=rank.tp_size,
        pp_rank=rank.pp_rank,
        pp_size=rank.pp_size,
        dp_rank=rank.dp_rank,
        dp_size=rank.dp_size,
        expert_parallel=rank.expert_parallel,
        **options,
    )


def buffers_like(dump, fill=0):
    """Return parameters of the names, shapes and dtypes of a dump."""
    return {
        name: torch.full([int(size) for size in shape.split("x")], fill).to(getattr(torch, dtype))
        for name, (shape, dtype, _) in dump.items()
    }


def buffers_for(config, rank, fmt=vllm.VLLM):
    return {
        claim.name: torch.zeros(claim.shape, dtype=getattr(torch, claim.dtype or "bfloat16"))
        for claim in vllm.parameters(config, rank, fmt=fmt)
    }


def whole(config):
    """Return one actor's shards of the whole checkpoint."""
    tensors = known_checkpoint(config) if config.quantization is None else quantised_checkpoint(config, BLOCK)
    return [Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape)) for name, tensor in tensors.items()]


def hashes(buffers):
    return {name: sha256_of(buffer) for name, buffer in buffers.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_sync_into_zeroed_buffers_leaves_what_vllms_loader_leaves(name):
    case = GOLDEN[name]
    config = ModelConfig.from_dict(case["config"])
    ranks, fmt = ranks_of(case), format_of(case)
    engine = [buffers_like(dump) for dump in case["ranks"]]
    move([whole(config)], [shards_of(own, config, rank, fmt=fmt) for own, rank in zip(engine, ranks, strict=True)])
    for own, dump in zip(engine, case["ranks"], strict=True):
        assert hashes(own) == {name: digest for name, (_, _, digest) in dump.items()}


# Attention without its latent form is a choice of the engine's that a layout is told of by the live names only.
@pytest.mark.parametrize("name", [name for name in GOLDEN if "plain attention" not in name])
def test_the_parameters_expected_are_those_vllm_builds(name):
    case = GOLDEN[name]
    config, fmt = ModelConfig.from_dict(case["config"]), format_of(case)
    for rank, dump in zip(ranks_of(case), case["ranks"], strict=True):
        expected = {
            claim.name: ("x".join(map(str, claim.shape)), claim.dtype or "bfloat16")
            for claim in vllm.parameters(config, rank, fmt=fmt)
        }
        assert expected == {name: (shape, dtype) for name, (shape, dtype, _) in dump.items()}
        live = shards_of(buffers_like(dump), config, rank, fmt=fmt)
        pure = vllm.layout(config, rank, fmt=fmt)
        assert sorted(describe(live).pieces, key=repr) == sorted(pure.pieces, key=repr)


def loaded_engine(case):
    """Return a case's engine as vLLM's loader left it: buffers and shards, rank by rank."""
    config = ModelConfig.from_dict(case["config"])
    buffers = [buffers_like(dump) for dump in case["ranks"]]
    held = [shards_of(own, config, rank) for own, rank in zip(buffers, ranks_of(case), strict=True)]
    move([whole(config)], held)
    return buffers, held


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ("qwen3_moe tp4, two kv heads", "qwen3_moe tp2 dp2 ep"),
        ("qwen3_moe tp2 dp2 ep", "qwen3_moe tp4, two kv heads"),
        ("qwen3_moe tp2 dp2", "qwen3_moe tp2 dp2 ep"),
        ("mixtral tp4 ep", "mixtral tp2"),
        ("deepseek_v3 tp2 dp2 ep", "deepseek_v3 tp2"),
        ("deepseek_v3 tp2", "deepseek_v3 tp2 dp2 ep"),
    ],
)
def test_one_engine_can_feed_another_of_a_different_shape(source, destination):
    _, held = loaded_engine(GOLDEN[source])
    config = ModelConfig.from_dict(GOLDEN[destination]["config"])
    engine = [buffers_like(dump) for dump in GOLDEN[destination]["ranks"]]
    ranks = ranks_of(GOLDEN[destination])
    move(held, [shards_of(own, config, rank) for own, rank in zip(engine, ranks, strict=True)])
    for own, dump in zip(engine, GOLDEN[destination]["ranks"], strict=True):
        assert hashes(own) == {name: digest for name, (_, _, digest) in dump.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_shards_are_views_of_the_engines_parameters(name):
    case = GOLDEN[name]
    config, fmt = ModelConfig.from_dict(case["config"]), format_of(case)
    for dump, rank in zip(case["ranks"], ranks_of(case), strict=True):
        live = buffers_like(dump)
        storages = {buffer.untyped_storage().data_ptr() for buffer in live.values()}
        for shard in shards_of(live, config, rank, fmt=fmt):
            assert shard.view.untyped_storage().data_ptr() in storages, shard.name


def test_a_sync_leaves_the_padding_of_the_vocabulary_alone():
    case = GOLDEN["qwen2 tp4, two kv heads, tied, a rank without vocabulary"]
    config = ModelConfig.from_dict(case["config"])
    engine = [buffers_like(dump, fill=7) for dump in case["ranks"]]
    move([whole(config)], [shards_of(own, config, rank) for own, rank in zip(engine, ranks_of(case), strict=True)])
    embeddings = [own["model.embed_tokens.weight"] for own in engine]
    # 70 rows padded to 128 are 32 a rank: 32, 32, 6 and none.
    assert [int((rows != 7).any(dim=1).sum()) for rows in embeddings] == [32, 32, 6, 0]
    assert (embeddings[2][6:] == 7).all()
    assert (embeddings[3] == 7).all()


# Exact places on small sizes of our own.

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 10,
    "hidden_size": 6,
    "intermediate_size": 12,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 2,
    "num_experts": 5,
    "moe_intermediate_size": 8,
}
DEEPSEEK = GOLDEN["deepseek_v3 tp2"]["config"]


def slots(config, name, rank, fmt=vllm.VLLM):
    """Return a parameter's slots as (end of the logical name, offset, extent, start in the parameter)."""
    found = {claim.name: claim for claim in vllm.parameters(config, rank, fmt=fmt)}[name]
    return [(slot.tensor.split("layers.0.")[-1], slot.box.offset, slot.box.extent, slot.start) for slot in found.slots]


def test_merged_heads_repeat_key_heads_where_there_are_fewer_than_ranks():
    config = ModelConfig.from_dict(TINY)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    assert slots(config, name, EngineRank(tp_rank=1, tp_size=2)) == [
        ("self_attn.q_proj.weight", (8, 0), (8, 6), (0, 0)),
        ("self_attn.k_proj.weight", (4, 0), (4, 6), (8, 0)),
        ("self_attn.v_proj.weight", (4, 0), (4, 6), (12, 0)),
    ]
    assert slots(config, name, EngineRank(tp_rank=5, tp_size=8)) == [
        ("self_attn.q_proj.weight", (10, 0), (2, 6), (0, 0)),
        ("self_attn.k_proj.weight", (4, 0), (2, 6), (2, 0)),
        ("self_attn.v_proj.weight", (4, 0), (2, 6), (4, 0)),
    ]


@pytest.mark.parametrize(("gate_first", "gate_at", "up_at"), [(True, 0, 4), (False, 4, 0)])
def test_an_expert_is_a_slice_of_two_parameters(gate_first, gate_at, up_at):
    config, rank = ModelConfig.from_dict(TINY), EngineRank(tp_rank=1, tp_size=2)
    fmt = EngineFormat(gate_first=gate_first)
    w13 = slots(config, "model.layers.0.mlp.experts.routed_experts.w13_weight", rank, fmt)
    assert w13[6:8] == [
        ("mlp.experts.3.gate_proj.weight", (4, 0), (4, 6), (3, gate_at, 0)),
        ("mlp.experts.3.up_proj.weight", (4, 0), (4, 6), (3, up_at, 0)),
    ]
    assert slots(config, "model.layers.0.mlp.experts.routed_experts.w2_weight", rank, fmt)[3] == (
        "mlp.experts.3.down_proj.weight",
        (0, 4),
        (6, 4),
        (3, 0, 0),
    )


def held_experts(config, rank, fmt=vllm.VLLM):
    w2 = slots(config, "model.layers.0.mlp.experts.routed_experts.w2_weight", rank, fmt)
    return [int(tensor.split(".")[2]) for tensor, *_ in w2]


def test_experts_go_to_the_ranks_of_all_engines_copies():
    config = ModelConfig.from_dict(TINY)
    ranks = [EngineRank(tp, 2, dp_rank=dp, dp_size=2, expert_parallel=True) for dp in range(2) for tp in range(2)]
    assert [held_experts(config, rank) for rank in ranks] == [[0, 1], [2], [3], [4]]
    spread = EngineFormat(expert_placement="round_robin")
    assert [held_experts(config, rank, spread) for rank in ranks] == [[0, 4], [1], [2], [3]]


def test_an_engine_that_balances_its_experts_says_where_they_are():
    config = ModelConfig.from_dict({**TINY, "num_hidden_layers": 1})
    # Six slots for five experts: the third is on both ranks.
    placed = [EngineFormat(expert_slots=((4, 0, 2),)), EngineFormat(expert_slots=((2, 3, 1),))]
    ranks = [EngineRank(tp, 2, expert_parallel=True) for tp in range(2)]
    engine = [buffers_for(config, rank, fmt) for rank, fmt in zip(ranks, placed, strict=True)]
    move(
        [whole(config)],
        [shards_of(own, config, rank, fmt=fmt) for own, rank, fmt in zip(engine, ranks, placed, strict=True)],
    )
    weights = known_checkpoint(config)
    for own, fmt in zip(engine, placed, strict=True):
        for slot, expert in enumerate(fmt.expert_slots[0]):
            wanted = weights[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
            assert torch.equal(own["model.layers.0.mlp.experts.routed_experts.w2_weight"][slot], wanted)

    with pytest.raises(ConfigError, match=r"expert_slots of layer 0 name \[5\], of 5 experts"):
        vllm.parameters(config, ranks[0], fmt=EngineFormat(expert_slots=((0, 5),)))

    for slots in ((), ((0,), (1,))):
        with pytest.raises(ConfigError, match=rf"expert_slots are of {len(slots)} layers, the model has 1"):
            vllm.parameters(config, ranks[0], fmt=EngineFormat(expert_slots=slots))


@pytest.mark.parametrize(
    ("pp_size", "counts"), [(1, [7]), (2, [4, 3]), (3, [2, 3, 2]), (4, [2, 2, 2, 1]), (5, [1, 1, 2, 2, 1])]
)
def test_layers_left_over_go_to_the_last_stages_but_one(pp_size, counts):
    config = ModelConfig.from_dict(TINY)
    ranks = [EngineRank(pp_rank=rank, pp_size=pp_size) for rank in range(pp_size)]
    names = [[claim.name.split(".") for claim in vllm.parameters(config, rank)] for rank in ranks]
    assert [len({words[2] for words in held if words[1] == "layers"}) for held in names] == counts


def test_stages_can_be_given_their_layers():
    config = ModelConfig.from_dict(TINY)
    fmt = EngineFormat(pp_layers=(5, 2))
    names = [claim.name for claim in vllm.parameters(config, EngineRank(pp_rank=1, pp_size=2), fmt=fmt)]
    assert {name.split(".")[2] for name in names if "layers" in name} == {"5", "6"}
    with pytest.raises(ConfigError, match=r"pp_layers=\(5, 1\) are not pp_size=2 stages of 7 layers together"):
        vllm.parameters(config, EngineRank(pp_size=2), fmt=EngineFormat(pp_layers=(5, 1)))


@settings(max_examples=40)
@given(
    mapping=st.sampled_from([GOLDEN[name]["config"] for name in sorted(GOLDEN) if "float8" not in name]),
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.integers(1, 3),
    dp=st.sampled_from([1, 2]),
    ep=st.booleans(),
)
def test_the_ranks_of_an_engine_hold_the_whole_model_between_them(mapping, tp, pp, dp, ep):
    config = ModelConfig.from_dict(mapping)
    engine = [
        vllm.layout(config, EngineRank(t, tp, p, pp, d, dp, ep))
        for d in range(dp)
        for p in range(pp)
        for t in range(tp)
    ]
    one = [describe(whole(config))]
    # The planner raises for an element that nobody holds. Biases that vLLM has no parameter for are lost.
    lost = [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(config.num_layers)]
    plan_reshard(engine, one, allow_missing=lost if config.family == "qwen3" and config.o_bias else ())
    plan_reshard(one, engine)


# Other versions and engines of the make.


def test_names_of_other_versions_and_of_wrapped_layers_are_understood():
    config, rank = ModelConfig.from_dict(DEEPSEEK), EngineRank(tp_rank=1, tp_size=2)
    engine = buffers_for(config, rank)
    respelled = {
        name.replace(".routed_experts.", ".")
        .replace(".kv_b_proj.", ".kv_b_proj.base_layer.")
        .replace(".fused_qkv_a_proj.", ".fused_qkv_a_proj_with_mqa."): buffer
        for name, buffer in engine.items()
    }
    assert respelled.keys() != engine.keys()
    move([whole(config)], [shards_of(respelled, config, rank)])
    dump = GOLDEN["deepseek_v3 tp2"]["ranks"][1]
    assert hashes(engine) == {name: digest for name, (_, _, digest) in dump.items()}


def test_compressing_projections_may_stand_apart():
    config, rank = ModelConfig.from_dict(DEEPSEEK), EngineRank()
    engine = buffers_for(config, rank)
    for layer in range(2):
        fused = engine.pop(f"model.layers.{layer}.self_attn.fused_qkv_a_proj.weight")
        engine[f"model.layers.{layer}.self_attn.q_a_proj.weight"] = fused[:24].clone()
        engine[f"model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"] = fused[24:].clone()

    move([whole(config)], [shards_of(engine, config, rank)])
    for name in ("q_a_proj", "kv_a_proj_with_mqa"):
        name = f"model.layers.1.self_attn.{name}.weight"
        assert torch.equal(engine[name], known_checkpoint(config)[name])


def test_a_head_of_its_own_gets_the_embedding_it_is_tied_to():
    case = GOLDEN["qwen2 tp4, two kv heads, tied, a rank without vocabulary"]
    config, rank = ModelConfig.from_dict(case["config"]), EngineRank(tp_rank=2, tp_size=4)
    engine = buffers_for(config, rank)
    engine["lm_head.weight"] = torch.zeros_like(engine["model.embed_tokens.weight"])
    move([whole(config)], [shards_of(engine, config, rank)])
    assert torch.equal(engine["lm_head.weight"], engine["model.embed_tokens.weight"])
    assert engine["lm_head.weight"][:6].any()


def test_a_last_stage_may_hold_the_tied_embedding_as_its_head_only():
    case = GOLDEN["llama tp2 pp2, tied, three layers"]
    config, rank = ModelConfig.from_dict(case["config"]), EngineRank(0, 2, 1, 2)
    engine = buffers_for(config, rank)
    engine["lm_head.weight"] = engine.pop("model.embed_tokens.weight")
    assert "model.embed_tokens.weight" in {shard.name for shard in shards_of(engine, config, rank)}
    engine.pop("lm_head.weight")
    with pytest.raises(LayoutError, match=r"model.embed_tokens.weight of shape \(64, 64\) is missing"):
        shards_of(engine, config, rank)


def test_stages_need_not_hold_what_they_never_use():
    config, rank = ModelConfig.from_dict(TINY), EngineRank(pp_rank=1, pp_size=3)
    engine = buffers_for(config, rank)
    spare = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert spare <= engine.keys()
    lean = {name: buffer for name, buffer in engine.items() if name not in spare}
    assert len(shards_of(engine, config, rank)) == len(shards_of(lean, config, rank)) + 3


# Claims that are wrong.


def test_live_parameters_that_differ_are_named_with_both_shapes():
    config = ModelConfig.from_dict(TINY)
    engine = buffers_for(config, EngineRank(0, 2))
    engine["model.layers.0.mlp.experts.routed_experts.w13_weight"] = torch.zeros(5, 16, 6)
    engine["model.layers.0.self_attn.qkv_proj.weight_scale_inv"] = torch.zeros(1, 1)
    engine.pop("model.layers.3.mlp.gate.weight")
    with pytest.raises(LayoutError) as caught:
        shards_of(engine, config, EngineRank(0, 2))

    assert str(caught.value) == (
        "the engine's parameters are not those of this qwen3_moe model on rank tp 0/2, pp 0/1, dp 0/1, not expert "
        "parallel: model.layers.0.mlp.experts.routed_experts.w13_weight has shape (5, 16, 6) where (5, 8, 6) is "
        "expected; model.layers.0.self_attn.qkv_proj.weight_scale_inv of shape (1, 1) is none of the model's; "
        "model.layers.3.mlp.gate.weight of shape (5, 6) is missing"
    )


@pytest.mark.parametrize(
    "claimed",
    [
        EngineRank(),
        EngineRank(0, 2),
        EngineRank(0, 4, expert_parallel=True),
        EngineRank(0, 2, dp_size=2),
        EngineRank(0, 4, pp_size=2),
    ],
)
def test_a_wrong_claim_of_the_parallel_sizes_is_refused(claimed):
    case = GOLDEN["qwen3_moe tp4, two kv heads"]
    config = ModelConfig.from_dict(case["config"])
    with pytest.raises(LayoutError, match="the engine's parameters are not those of this qwen3_moe model"):
        shards_of(buffers_like(case["ranks"][0]), config, claimed)


@pytest.mark.parametrize(
    ("sizes", "rank", "message"),
    [
        ({}, EngineRank(tp_size=3), "tp_size=3 does not divide the padded vocabulary=64"),
        ({}, EngineRank(pp_rank=1, pp_size=3, tp_size=16), "tp_size=16 does not divide num_attention_heads=8"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            EngineRank(tp_size=4),
            "tp_size=4 does not divide num_key_value_heads=6",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            EngineRank(tp_size=4),
            "num_key_value_heads=3 does not divide tp_size=4",
        ),
        ({"moe_intermediate_size": 5}, EngineRank(tp_size=2), r"tp_size \* dp_size=2 does not divide .* an expert=5"),
        (
            {"mlp_only_layers": [0], "intermediate_size": 9},
            EngineRank(tp_size=2),
            "tp_size=2 does not divide .*gate_proj.weight=9",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes, rank, message):
    with pytest.raises(ConfigError, match=message):
        vllm.parameters(ModelConfig.from_dict({**TINY, **sizes}), rank)


def test_a_rank_outside_its_size_is_refused():
    with pytest.raises(ConfigError, match="tp_rank=2 is not in an engine of tp_size=2"):
        EngineRank(tp_rank=2, tp_size=2)


# Blocks that share a scale.


def float8_engine(rank=0):
    """Return a rank's buffers of a quantised Qwen3-MoE, with the claim's arguments."""
    case = GOLDEN["qwen3_moe float8 tp2"]
    config = ModelConfig.from_dict(case["config"])
    return buffers_like(case["ranks"][rank]), config, EngineRank(rank, 2)


def test_scales_are_cut_as_their_weights_are():
    _, config, rank = float8_engine(rank=1)
    prefix, fmt = "model.layers.0.mlp.experts.routed_experts", EngineFormat(scale_block=BLOCK)
    assert slots(config, f"{prefix}.w13_weight_scale_inv", rank, fmt)[2:4] == [
        ("mlp.experts.1.gate_proj.weight_scale_inv", (1, 0), (1, 2), (1, 0, 0)),
        ("mlp.experts.1.up_proj.weight_scale_inv", (1, 0), (1, 2), (1, 1, 0)),
    ]
    assert slots(config, f"{prefix}.w2_weight_scale_inv", rank, fmt)[3] == (
        "mlp.experts.3.down_proj.weight_scale_inv",
        (0, 1),
        (2, 1),
        (3, 0, 0),
    )


def test_a_block_cut_in_two_is_refused():
    _, config, _ = float8_engine()
    fmt = EngineFormat(scale_block=BLOCK)
    message = r"blocks of 128 x 128 are cut in two where .*w13_weight holds .*gate_proj.weight at offset \(64, 0\)"
    with pytest.raises(ConfigError, match=message):
        vllm.parameters(config, EngineRank(1, 4), fmt=fmt)


def test_quantised_weights_are_refused_unless_their_blocks_are_told():
    buffers, config, rank = float8_engine()
    with pytest.raises(LayoutError, match=r"qkv_proj.weight is quantised \(torch.float8_e4m3fn\)"):
        shards_of(buffers, config, rank)


def test_layers_left_unquantised_have_no_scales_and_those_of_the_cache_are_left_alone():
    buffers, config, rank = float8_engine()
    prefix, fmt = "model.layers.0.self_attn", EngineFormat(scale_block=BLOCK)
    count = len(shards_of(buffers, config, rank, fmt=fmt))
    buffers[f"{prefix}.attn.k_scale"] = torch.ones(())
    assert len(shards_of(buffers, config, rank, fmt=fmt)) == count
    scale = buffers.pop(f"{prefix}.o_proj.weight_scale_inv")
    with pytest.raises(LayoutError, match=rf"{prefix}.o_proj.weight_scale_inv of shape \(2, 2\) is missing"):
        shards_of(buffers, config, rank, fmt=fmt)

    assert scale.shape == (2, 2)
    buffers[f"{prefix}.o_proj.weight"] = buffers[f"{prefix}.o_proj.weight"].to(torch.bfloat16)
    assert len(shards_of(buffers, config, rank, fmt=fmt)) == count - 1


def test_weights_quantised_as_they_are_sent_fit_a_quantised_engine():
    _, config, _ = float8_engine()
    fmt = EngineFormat(scale_block=BLOCK)
    kept = [
        Shard(name, tensor, (0,) * tensor.dim(), tuple(tensor.shape))
        for name, tensor in known_checkpoint(config).items()
    ]
    sent = fp8.quantised(kept, block=BLOCK)
    stored = [
        shard
        if isinstance(shard.view, torch.Tensor)
        else Shard(shard.name, shard.view.read(shard.box), shard.offset, shard.global_shape)
        for shard in sent
    ]
    live, wanted = ([buffers_for(config, EngineRank(rank, 2), fmt) for rank in range(2)] for _ in range(2))
    for source, engine in ((sent, live), (stored, wanted)):
        held = [shards_of(own, config, EngineRank(rank, 2), fmt=fmt) for rank, own in enumerate(engine)]
        move([source], held)

    assert [hashes(own) for own in live] == [hashes(own) for own in wanted]
    scales = [buffer for name, buffer in live[1].items() if name.endswith("_scale_inv")]
    assert scales
    assert all((buffer > 0).all() for buffer in scales)
