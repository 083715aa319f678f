"""Live modules of Transformers' make, by the names and shapes that its versions give them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.runtime.layout.known_bits import known_checkpoint, known_tensor
from tests.runtime.layout.moving import move
from wavecast.runtime.errors import ConfigError, LayoutError
from wavecast.runtime.layout import hf_live
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Computed, Shard

SIZES = {
    "vocab_size": 10,
    "hidden_size": 6,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_local_experts": 3,
    "moe_intermediate_size": 4,
    "head_dim": 3,
}
MIXTRAL = {**SIZES, "model_type": "mixtral"}
QWEN3_MOE = {**SIZES, "model_type": "qwen3_moe"}

NAMES = {"mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2")}


def stacked(mapping):
    """Return a state dict as Transformers 5 has it, worked out from the checkpoint by hand."""
    config = ModelConfig.from_dict(mapping)
    state = dict(known_checkpoint(config))
    prefix = "model.layers.0."
    experts, gate, up, down = NAMES.get(config.family, ("mlp.experts", "gate_proj", "up_proj", "down_proj"))

    def pop(expert, projection):
        return state.pop(f"{prefix}{experts}.{expert}.{projection}.weight")

    gates, ups, downs = ([pop(expert, name) for expert in range(3)] for name in (gate, up, down))
    both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    state[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack(both)
    state[f"{prefix}mlp.experts.down_proj"] = torch.stack(downs)
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("mapping", [MIXTRAL, QWEN3_MOE])
def test_stacked_experts_are_the_checkpoints_own(mapping):
    config = ModelConfig.from_dict(mapping)
    known = known_checkpoint(config)
    shards = hf_live.shards(stacked(mapping), config)
    assert sorted(shard.name for shard in shards) == sorted(known)
    assert all(torch.equal(shard.view, known[shard.name]) for shard in shards)
    assert all(shard.offset == (0,) * len(shard.global_shape) for shard in shards)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("mapping", [MIXTRAL, QWEN3_MOE])
def test_stacked_experts_cut_along_any_dim_are_parted_too(mapping, parts, dim):
    config = ModelConfig.from_dict(mapping)
    actors = [[] for _ in range(parts)]
    for name, tensor in stacked(mapping).items():
        axis = min(dim, tensor.dim() - 1)
        start = 0
        for actor, view in enumerate(torch.tensor_split(tensor, parts, dim=axis)):
            offset = tuple(start if d == axis else 0 for d in range(tensor.dim()))
            actors[actor].append(Shard(name, view, offset, tuple(tensor.shape)))
            start += view.shape[axis]

    known = known_checkpoint(config)
    copy = {name: torch.zeros_like(tensor) for name, tensor in known.items()}
    move([hf_live.checkpoint_shards(shards, config) for shards in actors], [hf_live.shards(copy, config)])
    assert all(torch.equal(copy[name], known[name]) for name in known)


def test_computed_experts_are_parted_without_being_computed():
    config = ModelConfig.from_dict(QWEN3_MOE)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensor, asked = stacked(QWEN3_MOE)[name], []

    def read(box):
        asked.append(box)
        return tensor[tuple(slice(a, a + n) for a, n in zip(box.offset, box.extent, strict=True))]

    view = Computed(tuple(tensor.shape), tensor.dtype, tensor.device, read)
    parts = hf_live.checkpoint_shards([Shard(name, view, (0, 0, 0), tuple(tensor.shape))], config)
    assert not asked
    assert [part.name.split("experts.")[1] for part in parts] == [
        f"{expert}.{projection}_proj.weight" for expert in range(3) for projection in ("gate", "up")
    ]
    up = parts[3]
    assert torch.equal(up.view.read(Box((1, 2), (3, 4))), known_checkpoint(config)[up.name][1:4, 2:6])
    assert asked == [Box((1, 5, 2), (1, 3, 4))]


def test_names_put_in_by_torchs_wrappers_are_taken_out():
    config = ModelConfig.from_dict({**QWEN3_MOE, "mlp_only_layers": [0]})
    known = known_checkpoint(config)
    wrapped = {
        f"_orig_mod.{name.replace('mlp.', '_checkpoint_wrapped_module.mlp.')}": tensor for name, tensor in known.items()
    }
    assert [shard.name for shard in hf_live.shards(wrapped, config)] == list(known)


def test_tensors_unknown_to_the_configuration_stay_as_they_are():
    config = ModelConfig.from_dict(QWEN3_MOE)
    state = {**stacked(QWEN3_MOE), "score.weight": known_tensor("score", (2, 6), torch.bfloat16)}
    assert hf_live.shards(state, config)[-1].name == "score.weight"


def test_without_a_configuration_memory_is_given_once_under_its_first_name():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

    assert [shard.name for shard in hf_live.shards(Tied())] == ["steps", "embedding.weight"]
    assert [shard.name for shard in hf_live.shards(Tied(), buffers=False)] == ["embedding.weight"]


class Module(torch.nn.Module):
    """A module with a configuration, as Transformers' have."""

    def __init__(self, **mapping):
        super().__init__()
        self.lm_head = torch.nn.Linear(6, 10, bias=False)
        self.config = SimpleNamespace(to_dict=lambda: mapping)


def test_a_modules_own_configuration_is_read():
    tied = {**QWEN3_MOE, "tie_word_embeddings": True, "architectures": ["Qwen3MoeForTokenClassification"]}
    assert [shard.name for shard in hf_live.shards(Module(**tied))] == ["model.embed_tokens.weight"]
    renamed = {key: value for key, value in tied.items() if key != "num_experts"}
    assert [shard.name for shard in hf_live.shards(Module(**renamed))] == ["model.embed_tokens.weight"]
    assert [shard.name for shard in hf_live.shards(Module(model_type="bert"))] == ["lm_head.weight"]
    with pytest.raises(ConfigError, match="lacks 'vocab_size'"):
        hf_live.shards(Module(model_type="qwen3_moe", num_attention_heads=2, hidden_size=6, num_local_experts=3))


def test_shapes_that_the_configuration_does_not_lead_to_are_refused():
    config = ModelConfig.from_dict(QWEN3_MOE)
    state = stacked(QWEN3_MOE)
    state["model.norm.weight"] = torch.zeros(7)
    with pytest.raises(LayoutError, match=r"model.norm.weight has shape \(7,\) where .* leads to \(6,\)"):
        hf_live.shards(state, config)

    state = stacked(QWEN3_MOE)
    state["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(3, 6, 8)
    with pytest.raises(LayoutError, match=r"gate_up_proj has shape \(3, 6, 8\) where .* leads to \(3, 8, 6\)"):
        hf_live.shards(state, config)


def test_a_distributed_tensor_is_sent_to_its_own_adapter():
    class Spread(torch.Tensor):
        device_mesh = "a mesh"

    state = {"model.norm.weight": torch.zeros(6).as_subclass(Spread)}
    with pytest.raises(LayoutError, match=r"model\.norm\.weight is distributed over a device mesh"):
        hf_live.shards(state, ModelConfig.from_dict(QWEN3_MOE))


def test_parameters_are_trainable_by_their_gradients_and_buffers_never():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    trained = {shard.name for shard in hf_live.shards(model) if shard.trainable}
    assert trained == {"0.bias", "1.weight", "1.bias"}
    # A state dict has plain tensors of whatever is trained; only parameters can deny it.
    assert all(shard.trainable for shard in hf_live.shards(model.state_dict()))
    assert {shard.name for shard in hf_live.shards(dict(model.named_parameters())) if shard.trainable} == trained


@pytest.mark.parametrize("trainable", [True, False])
def test_stacked_experts_are_as_trainable_as_the_stack(trainable):
    state = {name: torch.nn.Parameter(tensor, trainable) for name, tensor in stacked(QWEN3_MOE).items()}
    assert {shard.trainable for shard in hf_live.shards(state, ModelConfig.from_dict(QWEN3_MOE))} == {trainable}
