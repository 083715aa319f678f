"""The whole check must find every byte that differs, and say where."""

from __future__ import annotations

import pytest
import torch

from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer.compare import compare_step, read_step
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.program import Cut, fill_buckets

CUTS = (
    Cut("a", (1, 0), (2, 3), "bfloat16"),
    Cut("scale", (), (), "float32"),
    Cut("b", (0,), (40,), "uint8"),
)
#: So small that "b" is cut, and that the step takes several buckets.
BUCKETS = fill_buckets(CUTS, bucket_bytes=32)


def memory() -> Memory:
    return Memory(
        [
            Shard("a", torch.arange(12, dtype=torch.bfloat16).view(3, 4).t(), (0, 0), (4, 3)),
            Shard("scale", torch.tensor(2.5), (), ()),
            Shard("b", torch.arange(40, dtype=torch.uint8), (0,), (40,)),
        ]
    )


def view(held: Memory, shard: int) -> torch.Tensor:
    found = held.shards[shard].view
    assert isinstance(found, torch.Tensor)
    return found


def test_the_bytes_read_are_those_of_the_buckets_in_order() -> None:
    a = torch.tensor([[1, 5, 9], [2, 6, 10]], dtype=torch.bfloat16).view(torch.uint8).flatten().tolist()
    scale = torch.tensor([2.5]).view(torch.uint8).tolist()
    assert list(read_step(BUCKETS, memory())) == [
        *a, 0, 0, 0, 0, *scale, *[0] * 12, *range(32), *range(32, 40), *[0] * 8,
    ]  # fmt: skip


def test_equal_memories_do_not_differ() -> None:
    assert compare_step(BUCKETS, memory(), read_step(BUCKETS, memory())) == ()


def test_each_differing_cut_is_named_with_its_bytes() -> None:
    held = memory()
    view(held, 0)[2, 1] = -1
    view(held, 2)[33:36] = 255
    assert compare_step(BUCKETS, held, read_step(BUCKETS, memory())) == (
        "2 bytes of 'a' at offset (1, 0) with extent (2, 3)",
        "3 bytes of 'b' at offset (32,) with extent (8,)",
    )


def test_elements_outside_the_step_are_not_compared() -> None:
    held = memory()
    view(held, 0)[0] = 99
    view(held, 0)[3] = 99
    assert compare_step(BUCKETS, held, read_step(BUCKETS, memory())) == ()


def test_zeros_of_other_sign_and_nan_of_other_payload_differ() -> None:
    source = Memory([Shard("w", torch.tensor([0.0, float("nan"), float("nan")]), (0,), (3,))])
    target = Memory([Shard("w", torch.tensor([-0.0, float("nan"), float("nan")]), (0,), (3,))])
    as_bits(view(target, 0))[2] += 1
    buckets = fill_buckets([Cut("w", (0,), (3,), "float32")], bucket_bytes=64)
    assert compare_step(buckets, target, read_step(buckets, source)) == (
        "2 bytes of 'w' at offset (0,) with extent (3,)",
    )
    assert compare_step(buckets, source, read_step(buckets, source)) == ()


def test_every_view_of_a_tied_weight_is_compared() -> None:
    good, bad = torch.ones(4, dtype=torch.uint8), torch.tensor([1, 1, 7, 7], dtype=torch.uint8)
    source = Memory([Shard("w", good, (0,), (4,))])
    buckets = fill_buckets([Cut("w", (0,), (4,), "uint8")], bucket_bytes=64)
    for views in ((good, bad), (bad, good)):
        tied = Memory([Shard("w", each, (0,), (4,)) for each in views])
        assert compare_step(buckets, tied, read_step(buckets, source)) == (
            "2 bytes of 'w' at offset (0,) with extent (4,)",
        )


def test_a_source_is_compared_in_the_dtype_in_which_it_travels() -> None:
    source = Memory([Shard("w", torch.tensor([1.0 + 2**-8, 0.1]), (0,), (2,))])
    target = Memory([Shard("w", torch.tensor([1.0, 0.10009765625], dtype=torch.bfloat16), (0,), (2,))])
    buckets = fill_buckets([Cut("w", (0,), (2,), "bfloat16")], bucket_bytes=64)
    assert compare_step(buckets, target, read_step(buckets, source)) == ()


def test_an_excerpt_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="the step has 80 bytes, the sender's excerpt 79"):
        compare_step(BUCKETS, memory(), read_step(BUCKETS, memory())[:-1])
