"""Real PEFT models: merged as sent, they are what PEFT's own merge makes of them."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import dtensor, lora
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import sections, unstacked

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# What the frameworks warn of at import and use is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def adapted(model, **options):
    """Return ``model`` with adapters that do something."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    return wrapped


def arrived(shards):
    targets = {shard.name: torch.zeros(shard.global_shape, dtype=shard.view.dtype) for shard in shards}
    move([shards], [[Shard(name, view, (0,) * view.dim(), tuple(view.shape)) for name, view in targets.items()]])
    return targets


def check(wrapped, take=lambda shards: shards):
    base = take(dtensor.shards(wrapped, names=lora.peft_names))
    got = arrived(lora.merged(base, lora.peft_adapters(wrapped, base)))
    wanted = {shard.name: shard.view for shard in take(dtensor.shards(wrapped.merge_and_unload()))}
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_and_trained_copies(tied):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    saved = {} if tied else {"modules_to_save": ["lm_head"]}
    wrapped = adapted(model, target_modules=["q_proj", "down_proj"], use_rslora=True, **saved)
    check(wrapped)


def test_embeddings():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    check(adapted(model, target_modules=["embed_tokens", "o_proj"]))


def test_adapters_alone_have_the_names_and_values_of_a_peft_checkpoint():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    wrapped = adapted(model, target_modules=["q_proj", "up_proj"])
    base = dtensor.shards(wrapped, names=lora.peft_names)
    got = arrived(lora.adapter_only(lora.peft_adapters(wrapped, base)))
    wanted = peft.get_peft_model_state_dict(wrapped)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_stacked_experts_taken_apart():
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=4
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    if not any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        pytest.skip("this version of Transformers keeps experts apart")

    def take(shards):
        found = []
        for shard in shards:
            stem, _, last = shard.name.rpartition(".")
            if last == "gate_up_proj":
                for expert in unstacked(shard, lambda index, stem=stem: f"{stem}.{index}"):
                    parts = [(f"{expert.name}.{part}.weight", 16) for part in ("gate_proj", "up_proj")]
                    found.extend(sections(expert, parts))
            elif last == "down_proj":
                found.extend(unstacked(shard, lambda index, stem=stem: f"{stem}.{index}.down_proj.weight"))
            else:
                found.append(shard)

        return found

    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    check(adapted(model, target_modules=["q_proj"], target_parameters=stacks), take)


OTHERS = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=4),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_tuners_are_refused_and_not_left_out(kind):
    config = OTHERS[kind]()
    wrapped = peft.get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), config)
    base = dtensor.shards(wrapped, names=lora.peft_names)
    with pytest.raises(LayoutError) as caught:
        lora.peft_adapters(wrapped, base)

    where = {"IA3": "model.layers.0.self_attn.k_proj", "tokens": "model.embed_tokens"}
    assert caught.value.tensor == where.get(kind, "model.layers.0.self_attn.q_proj")
    assert ("trainable_token_indices" in str(caught.value)) == (kind == "tokens")


def test_disabled_adapters_are_refused_unless_named():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    wrapped = adapted(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = dtensor.shards(wrapped, names=lora.peft_names)
    with wrapped.disable_adapter():
        with pytest.raises(LayoutError, match=r"the adapters on 'model\.layers\.0\.self_attn\.q_proj' are disabled"):
            lora.peft_adapters(wrapped, base)

        assert len(lora.peft_adapters(wrapped, base, adapters=["default"])) == 2

    assert len(lora.peft_adapters(wrapped, base)) == 2
