"""Between views of any form and a bucket's bytes: every bit, and nothing beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.transfer.copying import TensorCopier, bytes_of, gather, is_held_as_sent, pack, unpack
from wavecast.runtime.transfer.memory import Memory, as_bits, dtype_of
from wavecast.runtime.transfer.program import Bucket, Cut, fill_buckets

DTYPES = (
    "bool",
    "uint8",
    "float8_e4m3fn",
    "float8_e5m2",
    "bfloat16",
    "float16",
    "uint16",
    "float32",
    "int64",
    "float64",
    "complex64",
    "complex128",
)
FORMS = ("plain", "transposed", "every other", "column slice", "reversed dims")


def view_of(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of ``shape`` whose memory lies as ``form`` says."""
    if form == "transposed" and len(shape) > 1:
        return torch.zeros(shape[1], shape[0], *shape[2:], dtype=dtype).transpose(0, 1)

    if form == "every other" and shape:
        return torch.zeros(2 * shape[0], *shape[1:], dtype=dtype)[::2]

    if form == "column slice" and shape:
        return torch.zeros(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 2 : 2 + shape[-1]]

    if form == "reversed dims" and shape:
        return torch.zeros(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))

    return torch.zeros(shape, dtype=dtype)


def put(view: torch.Tensor, index: tuple[int, ...], data: bytes) -> None:
    """Set one element to the bits in ``data``."""
    element = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(view.dtype)[0]
    as_bits(view)[index] = as_bits(element)


def get(view: torch.Tensor, index: tuple[int, ...]) -> bytes:
    """Return one element's bits."""
    return bytes(view[index].reshape(1).clone().view(torch.uint8).tolist())


def indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in shape:
        found = [(*index, place) for index in found for place in range(size)]

    return found


def go_on() -> None:
    """Let an unpacking go on."""


def one_bucket(cuts: Sequence[Cut]) -> Bucket:
    (bucket,) = fill_buckets(cuts, bucket_bytes=1 << 16)
    return bucket


a_tensor = st.tuples(
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(FORMS),
    st.sampled_from(FORMS),
)


@settings(max_examples=60)
@given(st.lists(a_tensor, min_size=1, max_size=4), st.data())
def test_every_bit_of_every_cut_goes_to_its_place_and_nowhere_else(
    tensors: list[tuple[tuple[int, ...], str, str, str]], data: st.DataObject
) -> None:
    """The oracle is a dictionary of bytes by tensor and index, and a bucket laid out by hand."""
    sources: list[Shard] = []
    targets: list[Shard] = []
    cuts: list[Cut] = []
    known: dict[tuple[str, tuple[int, ...]], bytes] = {}
    noise = random.Random(data.draw(st.integers(0, 1 << 30)))
    for number, (shape, dtype, form, other) in enumerate(tensors):
        name = f"t{number}"
        source, target = view_of(form, shape, dtype_of(dtype)), view_of(other, shape, dtype_of(dtype))
        for index in indices(shape):
            bits = bytes([noise.randrange(2)]) if dtype == "bool" else noise.randbytes(source.element_size())
            known[name, index] = bits
            put(source, index, bits)

        sources.append(Shard(name, source, (0,) * len(shape), shape))
        targets.append(Shard(name, target, (0,) * len(shape), shape))
        low = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        high = tuple(data.draw(st.integers(start + 1, size)) for start, size in zip(low, shape, strict=True))
        cuts.append(Cut(name, low, tuple(b - a for a, b in zip(low, high, strict=True)), dtype))

    bucket = one_bucket(cuts)
    wire = torch.full((bucket.nbytes,), 0xAA, dtype=torch.uint8)
    pack(bucket, Memory(sources), wire)

    expected = bytearray()
    inside: set[tuple[str, tuple[int, ...]]] = set()
    for cut in cuts:
        places = [tuple(a + b for a, b in zip(cut.offset, index, strict=True)) for index in indices(cut.extent)]
        expected += b"".join(known[cut.tensor, index] for index in places)
        expected += bytes(-len(expected) % 16)
        inside |= {(cut.tensor, index) for index in places}

    assert bytes(wire.tolist()) == bytes(expected)

    unpack(bucket, Memory(targets), wire, check=go_on)
    for shard in targets:
        assert isinstance(shard.view, torch.Tensor)
        for index in indices(shard.view.shape):
            wanted = known[shard.name, index] if (shard.name, index) in inside else bytes(shard.view.element_size())
            assert get(shard.view, index) == wanted

    found = torch.full_like(wire, 0x55)
    gather(bucket, Memory(targets), found)
    assert torch.equal(found, wire)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_bit_pattern_of_a_small_float_survives(dtype: torch.dtype, form: str) -> None:
    """All NaN payloads, both zeros and all subnormals among them."""
    width = torch.tensor([], dtype=dtype).element_size()
    rows, columns = (256, 256) if width == 2 else (16, 16)
    bits = torch.arange(rows * columns).to(torch.int16 if width == 2 else torch.uint8).view(rows, columns)
    source, target = view_of(form, (rows, columns), dtype), view_of(form, (rows, columns), dtype)
    as_bits(source).copy_(bits)
    name = str(dtype).removeprefix("torch.")
    (bucket,) = fill_buckets([Cut("w", (0, 0), (rows, columns), name)], bucket_bytes=1 << 20)
    wire = torch.empty(bucket.nbytes, dtype=torch.uint8)
    pack(bucket, Memory([Shard("w", source, (0, 0), (rows, columns))]), wire)
    memory = Memory([Shard("w", target, (0, 0), (rows, columns))])
    unpack(bucket, memory, wire, check=go_on)
    assert torch.equal(as_bits(target), bits)
    found = torch.empty_like(wire)
    gather(bucket, memory, found)
    assert torch.equal(found, wire)


def test_nan_payloads_of_float32_survive() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC12345, -0x3FEDCC, -0x7FFFFF], dtype=torch.int32)
    source, target = bits.view(torch.float32), torch.zeros(4)
    bucket = one_bucket([Cut("w", (0,), (4,), "float32")])
    wire = torch.empty(16, dtype=torch.uint8)
    pack(bucket, Memory([Shard("w", source, (0,), (4,))]), wire)
    unpack(bucket, Memory([Shard("w", target, (0,), (4,))]), wire, check=go_on)
    assert torch.equal(target.view(torch.int32), bits)


@pytest.mark.parametrize(("source", "wire"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_a_cast_is_torchs_own(source: str, wire: str) -> None:
    """Halves round to even, what is too large becomes infinite, NaN stays NaN, signs of zeros stay."""
    values = torch.tensor(
        [0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 0.1, -3.4e38, 3.4e38, float("nan"), float("-inf"), 1e-40, 65520.0]
    ).to(dtype_of(source))
    bucket = one_bucket([Cut("w", (0,), (11,), wire)])
    data = torch.full((bucket.nbytes,), 0xAA, dtype=torch.uint8)
    pack(bucket, Memory([Shard("w", values, (0,), (11,))]), data)
    found = data[: 11 * dtype_of(wire).itemsize].view(dtype_of(wire))
    assert torch.equal(as_bits(found), as_bits(values.to(dtype_of(wire))))
    assert not data[11 * dtype_of(wire).itemsize :].any()


def test_a_cast_reads_a_strided_view() -> None:
    whole = torch.arange(24.0).view(4, 6)
    bucket = one_bucket([Cut("w", (1, 0), (2, 4), "bfloat16")])
    data = torch.empty(16, dtype=torch.uint8)
    pack(bucket, Memory([Shard("w", whole.t(), (0, 0), (6, 4))]), data)
    assert data.view(torch.bfloat16).tolist() == [1, 7, 13, 19, 2, 8, 14, 20]


def test_a_computed_source_is_asked_for_the_cut_alone() -> None:
    asked: list[Box] = []

    def read(box: Box) -> torch.Tensor:
        asked.append(box)
        return torch.full(box.extent, 7, dtype=torch.int32)

    shard = Shard("w", Computed((4, 4), torch.int32, torch.device("cpu"), read), (8, 0), (16, 4))
    bucket = one_bucket([Cut("w", (9, 2), (3, 1), "int32")])
    data = torch.empty(16, dtype=torch.uint8)
    pack(bucket, Memory([shard]), data)
    assert asked == [Box((1, 2), (3, 1))]
    assert data.view(torch.int32).tolist() == [7, 7, 7, 0]


def test_a_tied_weight_is_written_wherever_it_is_held_and_read_back_from_all() -> None:
    """What is summed up afterwards must have passed through every view that was written."""
    first, second = torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    memory = Memory([Shard("w", first, (2,), (8,)), Shard("w", second, (0,), (8,))])
    bucket = one_bucket([Cut("w", (3,), (2,), "int32")])
    data = torch.tensor([5, 6, 0, 0], dtype=torch.int32).view(torch.uint8)
    unpack(bucket, memory, data, check=go_on)
    assert first.tolist() == [0, 5, 6, 0]
    assert second.tolist() == [0, 0, 0, 5, 6, 0, 0, 0]


def test_nothing_that_a_bucket_held_before_is_left_in_what_is_read_back() -> None:
    bucket = one_bucket([Cut("a", (0,), (3,), "uint8"), Cut("b", (0,), (1,), "uint8")])
    memory = Memory(
        [Shard(name, torch.full((size,), 9, dtype=torch.uint8), (0,), (size,)) for name, size in (("a", 3), ("b", 1))]
    )
    data = torch.full((bucket.nbytes,), 0xFF, dtype=torch.uint8)
    gather(bucket, memory, data)
    assert data.tolist() == [9, 9, 9, *[0] * 13, 9, *[0] * 15]


def test_a_bucket_is_packed_into_a_slot_that_is_larger() -> None:
    bucket = one_bucket([Cut("a", (0,), (3,), "uint8")])
    slot = torch.full((64,), 0xFF, dtype=torch.uint8)
    pack(bucket, Memory([Shard("a", torch.tensor([1, 2, 3], dtype=torch.uint8), (0,), (3,))]), slot[: bucket.nbytes])
    assert slot.tolist() == [1, 2, 3, *[0] * 13, *[255] * 48]


def test_sizes_of_all_dtypes_are_those_of_torch() -> None:
    for name in DTYPES:
        assert Cut("w", (0,), (3,), name).nbytes == 3 * dtype_of(name).itemsize == prod((3, dtype_of(name).itemsize))


def test_an_unpacking_that_is_given_up_writes_no_further_cut() -> None:
    class GivenUp(Exception):
        pass

    left = [None, None]

    def check() -> None:
        if not left:
            raise GivenUp

        left.pop()

    cuts = [Cut("w", (place,), (1,), "int32") for place in range(4)]
    target = torch.zeros(4, dtype=torch.int32)
    bucket = one_bucket(cuts)
    data = torch.full((bucket.nbytes,), 1, dtype=torch.uint8)
    with pytest.raises(GivenUp):
        unpack(bucket, Memory([Shard("w", target, (0,), (4,))]), data, check=check)

    assert target.tolist() == [0x01010101, 0x01010101, 0, 0]


# Sent in place.


def alone(rows: int = 4, *, dtype: str = "float32", first: int = 0) -> Bucket:
    """A bucket that holds rows of 8 elements of one tensor."""
    (bucket,) = fill_buckets([Cut("w", (first, 0), (rows, 8), dtype)], bucket_bytes=1024)
    return bucket


def holding(view: torch.Tensor) -> Memory:
    return Memory([Shard("w", view, (0, 0), (8, 8))])


def test_an_only_cut_that_lies_as_it_travels_is_sent_from_where_it_is() -> None:
    view = torch.arange(64, dtype=torch.float32).view(8, 8)
    copier, window = TensorCopier(holding(view), checksum=True), torch.full((1024,), 7, dtype=torch.uint8)
    bucket = alone(first=2)
    sent = copier.pack(0, bucket, window[: bucket.nbytes])
    assert sent.data_ptr() == view[2:].data_ptr()
    assert bytes(sent.tolist()) == bytes_of(view)[64:192].numpy().tobytes()
    assert window.eq(7).all()
    # It is summed up as it would have been packed.
    copier.packed(0, bucket, sent)
    other = TensorCopier(holding(view.t().contiguous().t()), checksum=True)
    copied = other.pack(0, bucket, window[: bucket.nbytes])
    other.packed(0, bucket, copied)
    assert copied.data_ptr() == window.data_ptr()
    assert copier.sums(1) == other.sums(1) != [0]


@pytest.mark.parametrize(
    ("why", "view", "bucket"),
    [
        ("another dtype", torch.zeros(8, 8, dtype=torch.float64), alone()),
        ("strided", torch.zeros(8, 16)[:, :8], alone()),
        (
            "some of each row",
            torch.zeros(8, 8),
            fill_buckets([Cut("w", (0, 0), (4, 4), "float32")], bucket_bytes=64)[0],
        ),
        ("padded", torch.zeros(8, 8), fill_buckets([Cut("w", (0, 0), (1, 7), "float32")], bucket_bytes=64)[0]),
        ("off a multiple of 16 bytes", torch.zeros(65)[1:].view(8, 8), alone()),
        (
            "computed",
            Computed((8, 8), torch.float32, torch.device("cpu"), lambda box: torch.zeros(box.extent)),
            alone(),
        ),
        ("of two cuts", torch.zeros(8, 8), one_bucket([Cut("w", (row, 0), (1, 8), "float32") for row in range(2)])),
    ],
)
def test_what_is_not_as_it_travels_is_packed(why: str, view: torch.Tensor | Computed, bucket: Bucket) -> None:
    memory = Memory([Shard("w", view, (0, 0), (8, 8))])
    assert not is_held_as_sent(bucket, memory, torch.device("cpu"))
    window = torch.empty(1024, dtype=torch.uint8)[: bucket.nbytes]
    assert TensorCopier(memory, checksum=True).pack(0, bucket, window) is window


def test_what_is_sent_from_elsewhere_is_packed() -> None:
    assert is_held_as_sent(alone(), holding(torch.zeros(8, 8)), torch.device("cpu"))
    assert not is_held_as_sent(alone(), holding(torch.zeros(8, 8)), torch.device("meta"))
