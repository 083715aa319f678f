"""Reading checkpoints, held against the safetensors library as writer, as reader and as judge of broken files."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from wavecast.runtime.checkpoint import Checkpoint
from wavecast.runtime.errors import CheckpointError, ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.hf import layouts, logical_tensors
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.presets import PRESETS, preset
from wavecast.runtime.safetensors import read_header

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float16",
    "bfloat16",
    "float32",
    "float64",
]

# Every example writes a file of its own name, so that a folder shared by a test's examples does no harm.
shared_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def tensor_of(dtype, shape, seed=0):
    """Return a tensor of random bits, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    high = 2 if dtype == "bool" else 256
    bits = torch.randint(0, high, (*shape, kind.itemsize), dtype=torch.uint8, generator=generator)
    return bits.view(kind).squeeze(-1)


def bits(tensor):
    """Return a tensor's bytes and shape, so that NaNs compare equal."""
    return tuple(tensor.shape), tensor.dtype, bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def write_config(folder, name="tiny-qwen2"):
    (folder / "config.json").write_text(json.dumps(dict(PRESETS[name])))


def open_single(folder, content):
    write_config(folder)
    (folder / "model.safetensors").write_bytes(content)
    return Checkpoint.open(folder)


def raw(header, data=b""):
    """Return a file of ``data`` under any header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@st.composite
def tensors_and_boxes(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    runs = [sorted(draw(st.tuples(st.integers(0, side), st.integers(0, side)))) for side in shape]
    box = Box(tuple(start for start, _ in runs), tuple(stop - start for start, stop in runs))
    return tensor_of(dtype, shape, draw(st.integers(0, 100))), box


@shared_folder
@given(case=tensors_and_boxes())
def test_a_slice_is_bit_for_bit_what_the_library_wrote(tmp_path, case):
    tensor, box = case
    before = torch.zeros(3, dtype=torch.uint8)
    checkpoint = open_single(tmp_path, save({"before": before, "w": tensor}))
    assert checkpoint.shape("w") == tuple(tensor.shape)
    assert f"torch.{checkpoint.dtype('w')}" == str(tensor.dtype)
    expected = tensor[tuple(slice(start, start + size) for start, size in zip(box.offset, box.extent, strict=True))]
    got = checkpoint.read("w", box)
    assert bits(got) == bits(expected)
    assert got.is_contiguous()
    assert bits(checkpoint.read("w")) == bits(tensor)
    checkpoint.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_that_the_file_does_not_align_is_read_all_the_same(tmp_path, dtype):
    tensor = tensor_of(dtype, (3, 5))
    code = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "bool": "BOOL", "bfloat16": "BF16"}.get(dtype)
    code = code or dtype[0].upper() + "".join(c for c in dtype if c.isdigit())
    header = {"pad": entry(shape=(1,), offsets=(0, 1)), "w": entry(code, (3, 5), (1, 1 + 15 * tensor.itemsize))}
    data = b"\x00" + bits(tensor)[2]
    checkpoint = open_single(tmp_path, raw(header, data))
    assert bits(checkpoint.read("w", Box((1, 2), (2, 3)))) == bits(tensor[1:3, 2:5])


def test_what_is_read_is_fresh_memory(tmp_path):
    checkpoint = open_single(tmp_path, save({"w": torch.arange(6.0)}))
    first = checkpoint.read("w")
    first.zero_()
    assert torch.equal(checkpoint.read("w"), torch.arange(6.0))
    checkpoint.close()
    assert torch.equal(first, torch.zeros(6))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.arange(6.0))


def test_a_checkpoint_reads_again_after_it_was_closed(tmp_path):
    with open_single(tmp_path, save({"w": torch.arange(6.0)})) as checkpoint:
        checkpoint.read("w")

    assert torch.equal(checkpoint.read("w", Box((2,), (3,))), torch.tensor([2.0, 3.0, 4.0]))


def write_sharded(folder, files):
    """Write files of tensors and their index."""
    write_config(folder)
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})

    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


SHARDED = {
    "model-00001-of-00002.safetensors": {"a": torch.arange(6), "b": torch.ones(2, 2)},
    "model-00002-of-00002.safetensors": {"c": torch.full((3,), 7.0)},
}


def test_a_sharded_checkpoint_is_one(tmp_path):
    write_sharded(tmp_path, SHARDED)
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.config == preset("tiny-qwen2")
    assert "c" in checkpoint
    assert "lm_head.weight" not in checkpoint
    assert torch.equal(checkpoint.read("c", Box((1,), (2,))), torch.tensor([7.0, 7.0]))
    assert repr(checkpoint).endswith("[3 tensors in 2 files]>")


def test_ranks_read_exactly_their_pieces_of_a_real_model(tmp_path):
    config = preset("tiny-qwen2").with_layers(2)
    (tmp_path / "config.json").write_text(json.dumps({**PRESETS["tiny-qwen2"], "num_hidden_layers": 2}))
    whole = {t.name: tensor_of("bfloat16", t.shape, seed) for seed, t in enumerate(logical_tensors(config))}
    save_file(whole, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(logical_tensors(checkpoint.config))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for layout in layouts(checkpoint.config, MeshSpec.parse("tp=3,pp=2")):
            for piece in layout.pieces:
                runs = zip(piece.box.offset, piece.box.extent, strict=True)
                expected = file.get_slice(piece.tensor)[tuple(slice(start, start + size) for start, size in runs)]
                got = checkpoint.read(piece.tensor, piece.box)
                assert torch.equal(got.view(torch.int16), expected.contiguous().view(torch.int16))


def test_a_checkpoint_that_is_not_what_its_config_says_is_found_out(tmp_path):
    tensors = logical_tensors(preset("tiny-qwen2"))
    checkpoint = open_single(tmp_path, save({"model.embed_tokens.weight": torch.zeros(4, 4)}))
    with pytest.raises(
        CheckpointError, match=r"'model.embed_tokens.weight' has shape \(4, 4\), .* asks for \(16384, 384\)"
    ):
        checkpoint.check(tensors)

    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        checkpoint.check(tensors[1:])


@pytest.mark.parametrize(
    "box",
    [
        Box((0,), (4,)),
        Box((0, 0), (4, 6)),
        Box((3, 0), (2, 5)),
        Box((-1, 0), (2, 5)),
        Box((2, 0), (-1, 5)),
        Box((0, 0, 0), (1, 1, 1)),
    ],
)
def test_a_box_outside_the_tensor_is_refused(tmp_path, box):
    checkpoint = open_single(tmp_path, save({"w": torch.zeros(4, 5)}))
    with pytest.raises(CheckpointError, match=r"tensor 'w' of shape \(4, 5\) has no elements at offset"):
        checkpoint.read("w", box)


@pytest.mark.parametrize("method", ["read", "shape", "dtype"])
def test_a_missing_tensor_is_named(tmp_path, method):
    checkpoint = open_single(tmp_path, save({"w": torch.zeros(4)}))
    with pytest.raises(CheckpointError, match="has no tensor 'v'"):
        getattr(checkpoint, method)("v")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"directory '.*/nowhere' does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_missing_config_is_named(tmp_path):
    save_file({"w": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: not valid JSON"),
        ("[]", r"config\.json: holds a JSON list, not an object"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("[" * 100_000, r"config\.json: not valid JSON"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_an_unknown_model_is_refused_with_the_file_that_asks_for_it(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"config\.json: unknown model architecture 'bert'"):
        Checkpoint.open(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    write_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "model-00009.safetensors"}, r"model-00009\.safetensors: cannot be read: No such file"),
        ({"d": "model-00002-of-00002.safetensors"}, "tensor 'd' is said to be in '.*', which lacks it"),
        ({"a": "../elsewhere.safetensors"}, "tensor 'a' is said to be in '../elsewhere.safetensors', not the name"),
        ({"a": 3}, "tensor 'a' is said to be in 3, not the name of a file"),
    ],
)
def test_an_index_that_misleads_is_refused(tmp_path, change, message):
    index = write_sharded(tmp_path, SHARDED)
    index["weight_map"] |= change
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_an_index_with_an_impossible_name_is_refused(tmp_path, name):
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="is no name of a file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_and_a_directory_are_refused_and_nothing_is_waited_for_or_left_open(tmp_path, name):
    open_single(tmp_path, HONEST).close()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        Checkpoint.open(tmp_path)

    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
        Checkpoint.open(tmp_path)

    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(tmp_path, text):
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map is .*, not an object"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x01" * 7, "7 bytes are too few"),
        (struct.pack("<Q", 100) + b"{}", "a header of 100 bytes does not fit in a file of 10 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808 bytes does not fit"),
        (raw(b""), "not valid JSON"),
        (raw(b"\xff\xfe"), "not valid JSON"),
        (raw([]), "holds a JSON list"),
        (raw(b'{"w": 1, "w": 2}'), "key 'w' is given twice"),
        (raw({"w": 3}), "tensor 'w' is described by 3, not by an object"),
        (raw({"w": entry("F4")}, b"0000"), "tensor 'w' has the unknown dtype 'F4'; known: BOOL, "),
        (raw({"w": entry(None)}, b"0000"), "tensor 'w' has the unknown dtype None"),
        (raw({"w": {**entry(), "shape": 4}}, b"0000"), "tensor 'w' has shape 4, not a list of sizes"),
        (raw({"w": entry(shape=(-4,))}, b"0000"), r"tensor 'w' has shape \[-4\], not a list of sizes"),
        (raw({"w": entry(shape=(4.0,))}, b"0000"), r"tensor 'w' has shape \[4.0\], not a list of sizes"),
        (raw({"w": entry(shape=(True, 4))}, b"0000"), r"tensor 'w' has shape \[True, 4\], not a list"),
        (raw({"w": {"dtype": "U8", "shape": [4]}}, b"0000"), "tensor 'w' has data_offsets None"),
        (raw({"w": entry(shape=(10**4000, 10**4000))}), "tensor 'w' has a shape of 2 numbers of up to 13288 bits"),
        (raw({"w": entry(shape=(0, 2**63), offsets=(0, 0))}), "a shape of 2 numbers of up to 64 bits, more than"),
        (raw({"w": entry(shape=(1,) * 65, offsets=(0, 1))}, b"0"), "a shape of 65 numbers of up to 1 bits, more than"),
        (raw({"w": entry(offsets=(0, 10**30))}), "tensor 'w' has a data_offsets of 2 numbers of up to 100 bits"),
        (raw({"w": entry(shape=(0, 2**62, 8), offsets=(0, 0))}), r"\(0, 4611\d+, 8\), larger than any tensor"),
        (
            raw({"w": entry(offsets=(0, 2, 4))}, b"0000"),
            r"tensor 'w' has data_offsets \(0, 2, 4\), not a start and a stop",
        ),
        (raw({"w": entry(offsets=(4, 0))}, b"0000"), r"tensor 'w' has data_offsets \(4, 0\), not a start"),
        (
            raw({"w": entry("F32", (4,), (0, 4))}, b"0000"),
            r"tensor 'w' of shape \(4,\) and dtype F32 takes 16 bytes, but data_offsets \(0, 4\) give it 4",
        ),
        (raw({"w": entry()}, b"000"), r"tensor 'w' ends at byte \d+ of a file of \d+ bytes: it is truncated"),
        (raw({"w": entry()}, b"00000"), r"the header describes \d+ bytes of a file of \d+ bytes"),
        (
            raw({"w": entry(), "v": entry(offsets=(2, 6))}, b"000000"),
            r"tensor 'v' starts at byte \d+ and overlaps 'w', which ends at byte \d+",
        ),
        (raw({"w": entry(offsets=(2, 6))}, b"000000"), r"'w' starts at byte \d+ and leaves a gap after the header"),
    ],
)
def test_a_broken_file_is_refused_by_file_tensor_and_values(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_single(tmp_path, content)

    assert "model.safetensors: " in str(caught.value)


HONEST = save(
    {"a": torch.arange(5, dtype=torch.int16), "b": torch.ones(2, 3), "c": torch.tensor(1.0)}, {"format": "pt"}
)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = tmp_path / "cut.safetensors"
    for length in range(len(HONEST)):
        file.write_bytes(HONEST[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: "):
            read_header(file)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.integers(0, len(HONEST) - 1), st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_the_library_reads_the_same(tmp_path, where, value):
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(HONEST[:where] + bytes([value]) + HONEST[where + 1 :])
    try:
        stored = {tensor.name: tensor for tensor in read_header(file)}
    except CheckpointError:
        return

    try:
        with safe_open(file, "pt") as reference:
            assert set(reference.keys()) == set(stored)
            for name, tensor in stored.items():
                assert tuple(reference.get_slice(name).get_shape()) == tensor.shape
    except SafetensorError as exc:
        pytest.fail(f"the library refuses what was taken for a checkpoint: {exc}")
