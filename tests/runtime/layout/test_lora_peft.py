"""Adapters read off modules shaped as PEFT shapes them."""

from __future__ import annotations

import pytest
import torch

from tests.runtime.layout.moving import move
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout import dtensor, lora
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.layout.views import sections, unstacked


def integers(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


class Layer(torch.nn.Module):
    """As much of a PEFT LoRA layer as the adapter asks for."""

    def __init__(self, base, rank=2, *, active=("default",), embedding=False, rows=None, columns=None):
        super().__init__()
        self.base_layer = base
        rows, columns = rows or base.weight.shape[0], columns or base.weight.shape[1]
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        self.scaling, self.active_adapters, self.merged_adapters = {}, list(active), []
        self.lora_bias, self.lora_variant, self.fan_in_fan_out = {}, {}, False
        for seed, name in enumerate(("default", "other"), start=2):
            if embedding:
                self.lora_embedding_A[name] = torch.nn.Parameter(integers(seed, rank, rows))
                self.lora_embedding_B[name] = torch.nn.Parameter(integers(seed + 7, columns, rank))
            else:
                self.lora_A[name] = torch.nn.Linear(columns, rank, bias=False)
                self.lora_B[name] = torch.nn.Linear(rank, rows, bias=False)
                self.lora_A[name].weight.data = integers(seed, rank, columns)
                self.lora_B[name].weight.data = integers(seed + 7, rows, rank)

            self.scaling[name] = 0.5 * seed

    def get_base_layer(self):
        base = self.base_layer
        while hasattr(base, "base_layer"):
            base = base.base_layer

        return base

    def delta(self, name="default"):
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]


class Stack(torch.nn.Module):
    """Experts' matrices in one parameter, as recent Transformers keeps them."""

    def __init__(self, experts, rows, columns):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(integers(1, experts, rows, columns))


class StackLayer(Layer):
    """As PEFT wraps a parameter: ranks of all experts in one A and one B."""

    def __init__(self, stack, *, swapped):
        experts, rows, columns = stack.gate_up_proj.shape
        if not swapped:
            rows, columns = columns, rows

        super().__init__(stack, 2 * experts, rows=rows, columns=columns)
        self.parameter_name = "gate_up_proj"
        self._did_swap_in_out_features = swapped

    def stacked_delta(self, name="default"):
        experts = self.get_base_layer().gate_up_proj.shape[0]
        a = self.lora_A[name].weight.reshape(experts, -1, self.lora_A[name].weight.shape[-1])
        b = self.lora_B[name].weight.reshape(self.lora_B[name].weight.shape[0], -1, experts)
        out = "e o i" if self._did_swap_in_out_features else "e i o"
        return torch.einsum(f"o r e, e r i -> {out}", b, a) * self.scaling[name]


def wrapped(**modules):
    """Return a model as PEFT wraps it: two levels above its own modules."""
    inner, outer, peft = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    for name, module in modules.items():
        inner.add_module(name, module)

    outer.model, peft.base_model = inner, torch.nn.Module()
    peft.base_model.model = outer
    return peft


def linear(seed, rows, columns):
    module = torch.nn.Linear(columns, rows, bias=False)
    module.weight.data = integers(seed, rows, columns)
    return module


def arrived(shards):
    """Move all of ``shards`` into one actor that holds everything whole."""
    shapes = {shard.name: shard.global_shape for shard in shards}
    targets = {name: torch.full(shape, 99.0) for name, shape in shapes.items()}
    move([shards], [[Shard(name, view, (0,) * view.dim(), tuple(view.shape)) for name, view in targets.items()]])
    return targets


def merged(peft, **options):
    base = dtensor.shards(peft, names=lora.peft_names)
    return lora.merged(base, lora.peft_adapters(peft, base, **options))


def test_linear_layers_arrive_merged_under_the_names_of_the_plain_model():
    peft = wrapped(q_proj=Layer(linear(1, 4, 3)), o_proj=linear(5, 3, 4))
    got = arrived(merged(peft))
    layer = peft.base_model.model.model.q_proj
    assert list(got) == ["model.q_proj.weight", "model.o_proj.weight"]
    assert torch.equal(got["model.q_proj.weight"], layer.base_layer.weight + layer.delta())
    assert torch.equal(got["model.o_proj.weight"], integers(5, 3, 4))


def test_the_active_adapters_are_taken_or_those_named():
    peft = wrapped(q_proj=Layer(linear(1, 4, 3), active=("default", "other")))
    layer = peft.base_model.model.model.q_proj
    got = arrived(merged(peft))["model.q_proj.weight"]
    assert torch.equal(got, layer.base_layer.weight + layer.delta() + layer.delta("other"))
    got = arrived(merged(peft, adapters=["other"]))["model.q_proj.weight"]
    assert torch.equal(got, layer.base_layer.weight + layer.delta("other"))


def test_an_embeddings_adapter_is_transposed():
    embedding = torch.nn.Embedding(5, 3)
    embedding.weight.data = integers(1, 5, 3)
    peft = wrapped(embed_tokens=Layer(embedding, embedding=True))
    layer = peft.base_model.model.model.embed_tokens
    delta = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).t() * layer.scaling["default"]
    assert torch.equal(arrived(merged(peft))["model.embed_tokens.weight"], integers(1, 5, 3) + delta)


def test_a_layer_stored_the_other_way_round_is_transposed():
    peft = wrapped(c_attn=Layer(linear(1, 4, 3), rows=3, columns=4))
    layer = peft.base_model.model.model.c_attn
    layer.fan_in_fan_out = True
    assert torch.equal(arrived(merged(peft))["model.c_attn.weight"], integers(1, 4, 3) + layer.delta().t())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("rows", [4, 6])
def test_stacked_experts_arrive_merged_one_by_one(swapped, rows):
    peft = wrapped(experts=StackLayer(Stack(3, rows, 4), swapped=swapped))
    layer = peft.base_model.model.model.experts
    (stack,) = dtensor.shards(peft, names=lora.peft_names)
    assert stack.name == "model.experts.gate_up_proj"
    base = [
        part
        for expert in unstacked(stack, "model.experts.{}".format)
        for part in sections(
            expert, [(f"{expert.name}.gate_proj.weight", rows // 2), (f"{expert.name}.up_proj.weight", rows // 2)]
        )
    ]
    got = arrived(lora.merged(base, lora.peft_adapters(peft, base)))
    want = layer.get_base_layer().gate_up_proj + layer.stacked_delta()
    for expert in range(3):
        assert torch.equal(got[f"model.experts.{expert}.gate_proj.weight"], want[expert, : rows // 2])
        assert torch.equal(got[f"model.experts.{expert}.up_proj.weight"], want[expert, rows // 2 :])


def test_names_lose_what_peft_put_into_them():
    assert lora.peft_names("base_model.model.model.q_proj.base_layer.weight") == "model.q_proj.weight"
    assert lora.peft_names("base_model.model.experts.base_layer.base_layer.down_proj") == "experts.down_proj"
    assert lora.peft_names("base_model.model.model.q_proj.lora_A.default.weight") is None
    assert lora.peft_names("base_model.model.model.embed_tokens.lora_embedding_A.default") is None
    assert lora.peft_names("base_model.model.lm_head.original_module.weight") is None
    assert lora.peft_names("base_model.model.lm_head.modules_to_save.default.weight") == "lm_head.weight"
    assert lora.peft_names("base_model.model.lm_head.modules_to_save.other.weight") is None


def test_adapters_can_be_sent_alone_under_their_peft_names():
    peft = wrapped(q_proj=Layer(linear(1, 4, 3)))
    layer = peft.base_model.model.model.q_proj
    base = dtensor.shards(peft, names=lora.peft_names)
    got = arrived(lora.adapter_only(lora.peft_adapters(peft, base)))
    assert list(got) == [
        "base_model.model.model.q_proj.lora_A.weight",
        "base_model.model.model.q_proj.lora_B.weight",
    ]
    assert torch.equal(got["base_model.model.model.q_proj.lora_B.weight"], layer.lora_B["default"].weight)


def spoil_merged(layer):
    layer.merged_adapters.append("default")


def spoil_variant(layer):
    layer.lora_variant["default"] = object()


def spoil_bias(layer):
    layer.lora_bias["default"] = True


def spoil_kind(layer):
    layer.lora_A["default"] = torch.nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_merged, "adapter 'default' is merged into 'model.q_proj' already"),
        (spoil_variant, "adapter 'default' on 'model.q_proj' has a variant"),
        (spoil_bias, "adapter 'default' on 'model.q_proj' has a bias"),
        (spoil_kind, "the adapter on 'model.q_proj' is a Conv2d, not a matrix"),
    ],
)
def test_what_is_not_a_plain_product_is_refused(spoil, message):
    peft = wrapped(q_proj=Layer(linear(1, 4, 3)))
    spoil(peft.base_model.model.model.q_proj)
    with pytest.raises(LayoutError, match=message):
        merged(peft)


class OtherLayer(torch.nn.Module):
    """As much of a PEFT layer of another tuner as tells it apart."""

    adapter_layer_names = ("ia3_l",)

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.ia3_l = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.ones(3, 1))})

    def get_base_layer(self):
        return self.base_layer


class TokensLayer(OtherLayer):
    adapter_layer_names = ("trainable_tokens_delta",)
    trainable_tokens_delta = None


@pytest.mark.parametrize(
    ("layer", "why"), [(OtherLayer, r"OtherLayer with ia3_l: it is no LoRA"), (TokensLayer, "trainable_token_indices")]
)
def test_an_adapter_of_another_tuner_is_refused(layer, why):
    module = torch.nn.Module()
    module.proj = layer(torch.nn.Linear(2, 3, bias=False))
    base = dtensor.shards(module, names=lora.peft_names)
    with pytest.raises(LayoutError, match=why) as caught:
        lora.peft_adapters(module, base)

    assert caught.value.tensor == "proj"


def test_adapters_that_are_disabled_are_refused_unless_named():
    module = torch.nn.Module()
    module.proj = Layer(torch.nn.Linear(2, 3, bias=False))
    base = dtensor.shards(module, names=lora.peft_names)
    module.proj.disable_adapters = True
    with pytest.raises(LayoutError, match="the adapters on 'proj' are disabled"):
        lora.peft_adapters(module, base)

    assert [each.name for each in lora.peft_adapters(module, base, adapters=["default"])] == ["proj.weight"]
