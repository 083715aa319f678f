"""A demonstration's memory: tensors apart, flat ranges, an engine's fused parameters, all with known elements."""

from __future__ import annotations

import torch

from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.demo_memory import EngineMemory, FlatMemory, SeparateMemory
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.shard import Layout, Piece, Shard, describe
from wavecast.runtime.layout.vllm import EngineRank
from wavecast.runtime.presets import preset

TENSORS = (("a", (4, 3)), ("b", (5,)))


def config() -> ModelConfig:
    return preset("tiny-qwen2").with_layers(1)


def storages(shards: list[Shard]) -> int:
    return len({shard.view.untyped_storage().data_ptr() for shard in shards if isinstance(shard.view, torch.Tensor)})


def test_separate_memory_has_a_tensor_for_each_piece() -> None:
    whole = Box((0, 0), (4, 3))
    layout = Layout((Piece("a", whole, (4, 3), "bfloat16"), Piece("b", whole, (4, 3), "float32")))
    memory = SeparateMemory(layout)
    shards = memory.allocate("cpu")
    assert describe(shards) == layout
    assert storages(shards) == 2
    assert memory.nbytes == 12 * 2 + 12 * 4


def test_flat_ranges_cut_tensors_where_they_end() -> None:
    memory = FlatMemory(TENSORS, ((0, 8), (8, 17)), "bfloat16")
    shards = memory.allocate("cpu")
    assert [(shard.name, shard.offset, tuple(shard.view.shape)) for shard in shards] == [
        ("a", (0, 0), (2, 3)),
        ("a", (2, 0), (1, 2)),
        ("a", (2, 2), (1, 1)),
        ("a", (3, 0), (1, 3)),
        ("b", (0,), (5,)),
    ]
    assert storages(shards) == 2
    assert memory.nbytes == 34


def test_an_engine_keeps_query_key_and_value_in_one_tensor() -> None:
    memory = EngineMemory(config(), EngineRank(tp_rank=1, tp_size=2), "bfloat16")
    shards = {shard.name: shard for shard in memory.allocate("cpu")}
    heads = [shards[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert storages(heads) == 1
    assert [tuple(shard.view.shape) for shard in heads] == [(192, 384), (32, 384), (32, 384)]
    assert storages([shards[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]) == 1


def test_nbytes_are_those_of_what_is_allocated() -> None:
    for memory in (EngineMemory(config(), EngineRank(), "bfloat16"), FlatMemory(TENSORS, ((3, 9),), "float32")):
        held: dict[int, int] = {}
        for shard in memory.allocate("cpu"):
            assert isinstance(shard.view, torch.Tensor)
            storage = shard.view.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()

        assert sum(held.values()) == memory.nbytes


def test_meta_tensors_describe_the_same_layout() -> None:
    memory = EngineMemory(config(), EngineRank(), "bfloat16")
    assert describe(memory.allocate("meta")) == describe(memory.allocate("cpu"))


def test_an_actor_fills_and_compares_views_of_whatever_memory() -> None:
    actor = DemoActor(EngineMemory(config(), EngineRank(tp_size=2), "bfloat16"), Weights(1), "cpu")
    actor.spoil()
    assert len(actor.differing(0)) == len({shard.name for shard in actor.transfer_shards()})
    actor.fill(0)
    assert actor.differing(0) == {}


def test_an_actor_gives_the_same_list_while_its_tensors_are_the_same() -> None:
    actor = DemoActor(FlatMemory(TENSORS, ((0, 17),), "bfloat16"), Weights(1), "cpu")
    first = actor.transfer_shards()
    actor.fill(3)
    assert actor.transfer_shards() is first
    actor._held = [(piece, view.clone()) for piece, view in actor._held]
    moved = actor.transfer_shards()
    assert moved is not first
    assert moved[0].view is actor._held[0][1]


def test_a_cpu_has_no_device_memory_in_use() -> None:
    assert DemoActor(Layout(()), Weights(1), "cpu").device_bytes() == 0
