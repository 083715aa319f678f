"""Packing by tables: the same bytes as tensor by tensor, sums that both ends and an oracle agree on."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.runtime.transfer import host_device
from tests.runtime.transfer.host_device import Device, signed, weighed_sum
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.transfer import tables
from wavecast.runtime.transfer.copying import gather, pack
from wavecast.runtime.transfer.fused import FusedCopier, Tables, Tally
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.program import Bucket, Cut, fill_buckets
from wavecast.runtime.transfer.tables import Table

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return host_device.install(monkeypatch)


def go_on() -> None:
    pass


def tensor_of(shard: Shard) -> torch.Tensor:
    assert isinstance(shard.view, torch.Tensor)
    return shard.view


def whole_of(view: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix that ``view`` is a part of."""
    return torch.empty(0, dtype=view.dtype).set_(view.untyped_storage(), 0, (rows, columns), (columns, 1))


def noise(view: torch.Tensor, seed: int) -> torch.Tensor:
    """Fill ``view`` with random bits, NaN among them."""
    bits = as_bits(view)
    data = torch.frombuffer(
        bytearray(random.Random(seed).randbytes(bits.numel() * bits.element_size())), dtype=torch.uint8
    )
    bits.copy_(data.view(bits.dtype).view(bits.shape))
    return view


def source_shards() -> list[Shard]:
    """Contiguous, in column order, every other column, one element, nothing, a cast and a computed one."""
    worked = noise(torch.zeros(6, 5, dtype=torch.bfloat16), 5)

    def read(box: Box) -> torch.Tensor:
        (a, b), (n, m) = box.offset, box.extent
        return worked[a : a + n, b : b + m].clone()

    return [
        Shard("plain", noise(torch.zeros(9, 16, dtype=torch.bfloat16), 0), (0, 0), (9, 16)),
        Shard("columns", noise(torch.zeros(7, 6), 1).t(), (0, 0), (6, 7)),
        Shard("every", noise(torch.zeros(5, 8, dtype=torch.uint8), 2)[:, ::2], (0, 0), (5, 4)),
        Shard("one", noise(torch.zeros((), dtype=torch.float64), 3), (), ()),
        Shard("cast", torch.linspace(-3, 3, 33), (0,), (33,)),
        Shard("worked", Computed((6, 5), torch.bfloat16, CPU, read), (0, 0), (6, 5)),
    ]


def target_shards() -> list[Shard]:
    """The same with other strides, "plain" and "one" twice: tied weights."""
    return [
        Shard("plain", torch.zeros(16, 9, dtype=torch.bfloat16).t(), (0, 0), (9, 16)),
        Shard("plain", torch.zeros(9, 20, dtype=torch.bfloat16)[:, 2:18], (0, 0), (9, 16)),
        Shard("columns", torch.zeros(6, 7), (0, 0), (6, 7)),
        Shard("every", torch.zeros(5, 5, dtype=torch.uint8)[:, :4], (0, 0), (5, 4)),
        Shard("one", torch.zeros((), dtype=torch.float64), (), ()),
        Shard("one", torch.zeros((), dtype=torch.float64), (), ()),
        Shard("cast", torch.zeros(66, dtype=torch.bfloat16)[::2], (0,), (33,)),
        Shard("worked", torch.zeros(5, 6, dtype=torch.bfloat16).t(), (0, 0), (6, 5)),
    ]


CUTS = [
    Cut("plain", (0, 0), (9, 16), "bfloat16"),
    Cut("columns", (1, 2), (4, 5), "float32"),
    Cut("every", (0, 0), (5, 4), "uint8"),
    Cut("one", (), (), "float64"),
    Cut("cast", (3,), (29,), "bfloat16"),
    Cut("worked", (1, 0), (5, 4), "bfloat16"),
]


def wire_of(memory: Memory, buckets: Sequence[Bucket]) -> list[bytes]:
    """What each bucket packs to, tensor by tensor."""
    windows = [torch.full((bucket.nbytes,), 0xAA, dtype=torch.uint8) for bucket in buckets]
    for bucket, window in zip(buckets, windows, strict=True):
        pack(bucket, memory, window)

    return [bytes(window.tolist()) for window in windows]


def aligned(nbytes: int) -> torch.Tensor:
    """A window that starts at a multiple of 16 bytes, as a device's memory does, full of what was there before."""
    room = torch.full((nbytes + 16,), 0x77, dtype=torch.uint8)
    start = -room.data_ptr() % 16
    return room[start : start + nbytes]


def padding_cleared(bucket: Bucket, window: torch.Tensor) -> bytes:
    """What travels between cuts is of no interest to anyone: made zero here."""
    data = bytearray(window.tolist())
    for item in bucket.items:
        stop = item.start + item.cut.nbytes
        data[stop : stop + -stop % 16] = bytes(-stop % 16)

    return bytes(data)


@pytest.mark.parametrize("bucket_bytes", [64, 1024])
def test_a_step_packs_and_unpacks_bit_for_bit_and_sums_up_to_what_the_oracle_says(
    device: Device, bucket_bytes: int
) -> None:
    sources, targets = Memory(source_shards()), Memory(target_shards())
    buckets = fill_buckets(CUTS, bucket_bytes=bucket_bytes)
    assert len(buckets) == (1 if bucket_bytes == 1024 else 10)
    wire = wire_of(sources, buckets)
    tallies = Tally(3, CPU), Tally(3, CPU)
    sender, receiver = FusedCopier(Tables(sources), tallies[0]), FusedCopier(Tables(targets), tallies[1])
    for bucket, data in zip(buckets, wire, strict=True):
        window = aligned(bucket.nbytes)
        sent = sender.pack(1, bucket, window)
        sender.packed(1, bucket, sent)
        device.drain()
        assert padding_cleared(bucket, sent) == data
        receiver.unpack(1, bucket, sent, go_on)
        device.drain()

    # All views of a tied weight, and nothing beside a cut.
    again = torch.zeros(1024, dtype=torch.uint8)
    for bucket, data in zip(buckets, wire, strict=True):
        gather(bucket, targets, again[: bucket.nbytes])
        assert bytes(again[: bucket.nbytes].tolist()) == data
        for item in bucket.items:
            first, *more = targets.targets(item.cut)
            assert all(torch.equal(as_bits(first), as_bits(view)) for view in more)

    columns, tied = (tensor_of(targets.shards[place]) for place in (2, 1))
    assert columns.any()
    assert not columns[0].any()
    assert not columns[:, :2].any()
    assert not whole_of(tied, 9, 20)[:, :2].any()
    assert not whole_of(tied, 9, 20)[:, 18:].any()
    expected = signed(weighed_sum(b"".join(wire)))
    assert sender.sums(3) == receiver.sums(3) == [0, expected, 0]
    assert expected


@pytest.mark.parametrize("bucket_bytes", [32, 96, 4096])
def test_sums_do_not_depend_on_buckets_or_on_how_views_lie(device: Device, bucket_bytes: int) -> None:
    """A word's weight follows from its place on the wire: that of a row of 32 bytes is the same in all buckets."""
    plain = noise(torch.zeros(9, 16, dtype=torch.bfloat16), 0)
    other = torch.zeros(16, 9, dtype=torch.bfloat16).t()
    as_bits(other).copy_(as_bits(plain))
    expected = signed(weighed_sum(bytes(plain.view(torch.uint8).flatten().tolist())))
    for view in (plain, other):
        copier = FusedCopier(Tables(Memory([Shard("w", view, (0, 0), (9, 16))])), Tally(1, CPU))
        window = aligned(bucket_bytes)
        for bucket in fill_buckets([Cut("w", (0, 0), (9, 16), "bfloat16")], bucket_bytes=bucket_bytes):
            copier.packed(0, bucket, copier.pack(0, bucket, window[: bucket.nbytes]))
            device.drain()

        assert copier.sums(1) == [expected]


def changed(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def test_a_changed_bit_or_exchanged_words_change_the_sum() -> None:
    data = bytes(random.Random(1).randbytes(256))
    for place in range(8, 256):
        for bit in range(8):
            assert weighed_sum(changed(data, place, bit)) != weighed_sum(data)

    words = [data[i : i + 4] for i in range(0, 256, 4)]
    for first in range(0, 63):
        exchanged = [*words]
        exchanged[first], exchanged[first + 1] = exchanged[first + 1], exchanged[first]
        assert weighed_sum(b"".join(exchanged)) != weighed_sum(data)


@pytest.mark.parametrize("place", range(8))
def test_a_changed_bit_in_the_first_bytes_of_a_step_changes_the_sum(place: int) -> None:
    """The oracle's weights are those of the kernels: test_kernels.py compares them."""
    data = bytes(random.Random(1).randbytes(64))
    assert weighed_sum(changed(data, place, 0)) != weighed_sum(data)


def flip_a_bit(table: Table, source_base: int, target_base: int, total: torch.Tensor) -> None:
    """Write all of it, and a bit changes then."""
    host_device.walk(table, source_base, target_base, total, "COPY")
    address = target_base + table.rows.tolist()[-1][1]
    (byte,) = ctypes.string_at(address, 1)
    ctypes.memmove(address, bytes([byte ^ 1]), 1)


def write_nothing(table: Table, source_base: int, target_base: int, total: torch.Tensor) -> None:
    pass


def write_beside(table: Table, source_base: int, target_base: int, total: torch.Tensor) -> None:
    """Write all of it 16 bytes further on than it belongs."""
    host_device.walk(table, source_base, target_base + 16, total, "COPY")


@pytest.mark.parametrize("write", [flip_a_bit, write_nothing, write_beside])
def test_what_was_corrupted_in_the_receivers_memory_shows_in_its_sum(
    device: Device, monkeypatch: pytest.MonkeyPatch, write: Callable[[Table, int, int, torch.Tensor], None]
) -> None:
    """Its sum is of what lies in its weights after writing, not of what came in."""
    rooms = [torch.zeros(70, dtype=torch.int32) for _ in range(3)]
    sources = Memory([Shard(f"w{n}", noise(torch.zeros(64, dtype=torch.int32), n), (0,), (64,)) for n in range(3)])
    targets = Memory([Shard(f"w{n}", room[:64], (0,), (64,)) for n, room in enumerate(rooms)])
    # A bucket of one cut would be sent out of the tensor itself.
    (bucket,) = fill_buckets([Cut(f"w{n}", (0,), (64,), "int32") for n in range(3)], bucket_bytes=768)
    kept = Tables(sources), Tables(targets)
    walk = host_device.walk

    def transfer() -> tuple[list[int], list[int]]:
        """Return both ends' sums."""
        sender, receiver = (FusedCopier(each, Tally(1, CPU)) for each in kept)
        window = aligned(bucket.nbytes)
        sent = sender.pack(0, bucket, window)
        assert sent is window
        sender.packed(0, bucket, sent)
        device.drain()
        receiver.unpack(0, bucket, sent, go_on)
        device.drain()
        return sender.sums(1), receiver.sums(1)

    def arrived() -> bool:
        return all(torch.equal(tensor_of(a), tensor_of(b)) for a, b in zip(sources.shards, targets.shards, strict=True))

    def spoilt(table: Table, source_base: int, target_base: int, total: torch.Tensor, mode: str) -> None:
        if mode == "COPY":
            monkeypatch.setattr(host_device, "walk", walk)
            write(table, source_base, target_base, total)
        else:
            walk(table, source_base, target_base, total, mode)

    (wire,) = wire_of(sources, [bucket])
    expected = [signed(weighed_sum(wire))]
    assert expected != [0]
    assert transfer() == (expected, expected)
    assert arrived()
    for room in rooms:
        room.zero_()

    monkeypatch.setattr(host_device, "walk", spoilt)
    sent, found = transfer()
    assert not arrived()
    assert sent == expected
    assert found != expected
    # Whatever was there, the next run starts with none of it.
    assert transfer() == (expected, expected)
    assert arrived()


@pytest.mark.parametrize("names", ["a", "ab"], ids=["sent in place", "packed"])
def test_a_tensor_that_has_moved_is_not_packed(device: Device, names: str) -> None:
    """Where tensors lie is kept from run to run: what is there now is no longer its owner's."""
    views = {name: noise(torch.zeros(16, dtype=torch.int32), number) for number, name in enumerate(names)}
    kept = Tables(Memory([Shard(name, view, (0,), (16,)) for name, view in views.items()]))
    (bucket,) = fill_buckets([Cut(name, (0,), (16,), "int32") for name in names], bucket_bytes=1024)

    def pack_again() -> torch.Tensor:
        window = aligned(bucket.nbytes)
        sent = FusedCopier(kept, Tally(1, CPU)).pack(0, bucket, window)
        device.drain()
        assert (sent is window) == (len(names) > 1)
        return sent

    for _ in range(2):
        assert bytes(pack_again().tolist()) == b"".join(bytes(view.view(torch.uint8)) for view in views.values())

    moved = views[names[-1]]
    old = moved.data
    moved.data = old.clone()
    assert device.default is not None
    copier, window = FusedCopier(kept, Tally(1, CPU)), aligned(bucket.nbytes)
    device.drain()
    with pytest.raises(LayoutError, match=f"'{names[-1]}' was changed during the sync") as caught:
        copier.pack(0, bucket, window)

    assert caught.value.tensor == names[-1]
    assert not device.default.work
    moved.data = old
    pack_again()


def test_tables_are_made_once_for_all_runs(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    build = tables.build_tables

    def counted(*arguments: object) -> object:
        made.append(arguments)
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("wavecast.runtime.transfer.fused.build_tables", counted)
    kept = Tables(Memory(source_shards()))
    buckets = fill_buckets(CUTS, bucket_bytes=64)
    for _ in range(3):
        copier = FusedCopier(kept, Tally(1, CPU))
        window = aligned(64)
        for bucket in buckets:
            copier.pack(0, bucket, window[: bucket.nbytes])
            device.drain()

    assert len(made) == 2 * len(buckets)


def test_without_a_tally_bytes_move_and_nothing_is_summed_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    launch = host_device.launch

    def noted(*arguments: object) -> None:
        modes.append(str(arguments[4]))
        launch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "_launch", noted)
    sources, targets = Memory(source_shards()), Memory(target_shards())
    (bucket,) = fill_buckets(CUTS, bucket_bytes=1024)
    sender, receiver = FusedCopier(Tables(sources), None), FusedCopier(Tables(targets), None)
    window = aligned(bucket.nbytes)
    sender.pack(0, bucket, window)
    device.drain()
    receiver.unpack(0, bucket, window, go_on)
    device.drain()
    assert set(modes) == {"COPY"}
    assert sender.sums(1) == receiver.sums(1) == []
    (wire,) = wire_of(sources, [bucket])
    assert padding_cleared(bucket, window) == wire


def test_a_run_that_was_given_up_writes_nothing(device: Device) -> None:
    class GivenUp(Exception):
        pass

    def check() -> None:
        raise GivenUp

    target = torch.zeros(4)
    copier = FusedCopier(Tables(Memory([Shard("w", target, (0,), (4,))])), Tally(1, CPU))
    (bucket,) = fill_buckets([Cut("w", (0,), (4,), "float32")], bucket_bytes=64)
    with pytest.raises(GivenUp):
        copier.unpack(0, bucket, torch.ones(16, dtype=torch.uint8), check)

    device.drain()
    assert not target.any()


def test_the_number_of_launches_does_not_grow_with_the_tensors(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[object] = []
    monkeypatch.setattr(tables, "_launch", lambda *arguments: launched.append(arguments))
    counts = []
    for tensors in (2, 200):
        shards = [Shard(f"w{n}", torch.zeros(8), (0,), (8,)) for n in range(tensors)]
        (bucket,) = fill_buckets([Cut(f"w{n}", (0,), (8,), "float32") for n in range(tensors)], bucket_bytes=1 << 16)
        copier = FusedCopier(Tables(Memory(shards)), Tally(1, CPU))
        window = aligned(bucket.nbytes)
        copier.pack(0, bucket, window)
        packing = len(launched)
        copier.unpack(0, bucket, window, go_on)
        counts.append((packing, len(launched) - packing))
        launched.clear()

    assert counts == [(1, 2), (1, 2)]
