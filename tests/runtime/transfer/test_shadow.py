"""The second copy: what it takes, what it flips, and that no bit changes on the way."""

from __future__ import annotations

import pytest
import torch

from tests.runtime import host_gpus
from tests.runtime.host_gpus import placed
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.shadow import Shadow


def shard(name: str, view: torch.Tensor) -> Shard:
    return Shard(name, view, (0,) * view.dim(), tuple(view.shape))


def random_bits(shadow: Shadow) -> list[torch.Tensor]:
    """Fill every copy with random bits, NaN payloads among them."""
    generator = torch.Generator().manual_seed(7)
    held = [each.view for each in shadow.memory.shards if isinstance(each.view, torch.Tensor)]
    for view in held:
        bits = as_bits(view)
        bits.copy_(torch.randint(-128, 127, bits.shape, generator=generator).to(bits.dtype) * 257)

    return held


def test_a_flip_copies_dense_strided_and_scalar_views_bit_for_bit() -> None:
    fused = torch.zeros(6, 8, dtype=torch.bfloat16)
    shards = [
        shard("dense", torch.zeros(4, 4, dtype=torch.bfloat16)),
        shard("columns", torch.zeros(5, 3).t()),
        shard("slice", fused[:, 2:5]),
        shard("scalar", torch.zeros(())),
        shard("empty", torch.zeros(0, 4)),
        shard("bytes", torch.zeros(7, dtype=torch.uint8)),
    ]
    shadow = Shadow(shards)
    held = random_bits(shadow)
    assert all(not bool(as_bits(each.view).any()) for each in shards if isinstance(each.view, torch.Tensor))
    assert shadow.flip(shards, {each.name for each in shards}) > 0
    for live, copy in zip(shards, held, strict=True):
        assert isinstance(live.view, torch.Tensor)
        assert torch.equal(as_bits(live.view), as_bits(copy))

    # What lies beside a slice is nobody's to write.
    assert not bool(fused[:, :2].any())
    assert not bool(fused[:, 5:].any())
    assert shadow.memory.signature == Memory(shards).signature
    assert shadow.nbytes == 2 * 16 + 4 * 15 + 2 * 18 + 4 + 0 + 7


def test_only_the_tensors_named_are_flipped() -> None:
    shards = [shard("a", torch.zeros(3)), shard("b", torch.zeros(3))]
    shadow = Shadow(shards)
    random_bits(shadow)
    shadow.flip(shards, {"b"})
    assert not bool(as_bits(shards[0].view).any())  # type: ignore[arg-type]
    assert bool(as_bits(shards[1].view).any())  # type: ignore[arg-type]


def test_views_of_the_same_elements_share_a_copy_and_equal_ones_do_not() -> None:
    tied = torch.zeros(4, 2)
    shadow = Shadow([shard("embed", tied), shard("head", tied), shard("twin", torch.zeros(4, 2))])
    embed, head, twin = (each.view for each in shadow.memory.shards)
    assert embed is head
    assert embed is not twin
    assert shadow.nbytes == 2 * 4 * 8


def test_two_empty_tensors_are_not_taken_for_one() -> None:
    shards = [shard("a", torch.zeros(0, 2)), shard("b", torch.zeros(0, 2))]
    assert Shadow(shards).nbytes == 0


def test_it_fits_weights_that_moved_and_not_those_that_changed() -> None:
    tied = torch.zeros(4, 2)
    shadow = Shadow([shard("embed", tied), shard("head", tied)])
    moved = torch.zeros(4, 2)
    assert shadow.fits([shard("embed", moved), shard("head", moved)])
    assert not shadow.fits([shard("embed", moved), shard("head", moved.clone())])
    assert not shadow.fits([shard("embed", moved.t().contiguous().t()), shard("head", moved)])
    assert not shadow.fits([shard("embed", moved.half()), shard("head", moved)])
    assert not shadow.fits([shard("embed", moved)])


def test_what_is_computed_has_no_copy() -> None:
    def read(box: Box) -> torch.Tensor:
        return torch.zeros(box.extent)

    computed = Shard("c", Computed((3,), torch.float32, torch.device("cpu"), read), (0,), (3,))
    shards = [computed, shard("a", torch.zeros(2))]
    shadow = Shadow(shards)
    assert shadow.memory.shards[0] == computed
    assert shadow.nbytes == 8
    shadow.flip(shards, {"a", "c"})


def test_parameters_that_want_a_gradient_are_flipped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    shards = [shard("p", parameter)]
    shadow = Shadow(shards)
    shadow.memory.shards[0].view.fill_(2.0)  # type: ignore[union-attr]
    shadow.flip(shards, {"p"})
    assert parameter.tolist() == [2.0] * 3
    assert parameter.requires_grad


def test_a_flip_on_a_device_comes_after_what_that_had_to_do_and_is_over_when_it_returns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever reads the weights next, on whatever stream, waits for nothing."""
    machine = host_gpus.install(monkeypatch)
    gpu = machine.gpu()
    machine.make_current(gpu.index)
    dense, strided = torch.zeros(4, 4), torch.zeros(4, 8)[:, 2:5]
    shards = [shard("dense", dense), shard("strided", strided)]
    shadow = Shadow(shards)
    placed(shadow.memory, gpu)
    copies = random_bits(shadow)
    read: list[bool] = []
    gpu.default.put(lambda: read.extend(bool(as_bits(view).any()) for view in (dense, strided)))
    shadow.flip(shards, {"dense", "strided"})
    # Nothing is done here but what somebody has waited for.
    assert read == [False, False]
    for live, copy in zip((dense, strided), copies, strict=True):
        assert torch.equal(as_bits(live), as_bits(copy))
