"""Pulled steps: what receivers copy out of their senders' memory, and what both ends sum up."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import pytest
import torch

from tests.runtime.transfer import host_device
from tests.runtime.transfer.host_device import Device, signed, weighed_sum
from tests.runtime.transfer.test_fused import noise, tensor_of, whole_of
from wavecast.runtime.errors import SyncAborted, SyncError, TransportUnavailable
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer import arrivals, board, lending, parts, pull, tables
from wavecast.runtime.transfer.board import BEGUN, Board
from wavecast.runtime.transfer.comm import Deadline, MoveTimeout
from wavecast.runtime.transfer.copying import pack
from wavecast.runtime.transfer.fused import Tally
from wavecast.runtime.transfer.lending import export_addresses
from wavecast.runtime.transfer.memory import Memory, as_bits
from wavecast.runtime.transfer.messages import Addresses
from wavecast.runtime.transfer.program import Cut, Program, Step, fill_buckets
from wavecast.runtime.transfer.pull import Puller, Turn

CPU = torch.device("cpu")


@pytest.fixture(params=["forwards", "backwards"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Streams that run into each other do it in either order."""
    return host_device.install(monkeypatch, backwards=request.param == "backwards")


def go_on() -> None:
    pass


def program(actor: int, *steps: Step) -> Program:
    return Program("digest", actor, 1 << 20, True, True, steps)


def packed(memory: Memory, cuts: Sequence[Cut]) -> bytes:
    """The step's bytes as if they were packed."""
    (bucket,) = fill_buckets(cuts, bucket_bytes=1 << 24)
    window = torch.empty(bucket.nbytes, dtype=torch.uint8)
    pack(bucket, memory, window)
    return bytes(window.tolist())


def turn(serial: int) -> Turn:
    return Turn(serial, Deadline(5), go_on, lambda: False, lambda seconds: None)


class Pair:
    """Actor 0 sends what actor 1 pulls."""

    def __init__(self, sources: Sequence[Shard], targets: Sequence[Shard], steps: Sequence[Sequence[Cut]]) -> None:
        self.memories = Memory(sources), Memory(targets)
        self.steps = [Step(10 + number, 0, (1,), tuple(cuts), pull=True) for number, cuts in enumerate(steps)]
        self.pullers = Puller(CPU), Puller(CPU)
        self.board = Board(len(self.steps), CPU)
        self.serial = 0

    def attach(self) -> Addresses:
        addresses = export_addresses(program(0, *self.steps), self.memories[0], self.board)
        self.pullers[1].attach({0: addresses})
        return addresses

    def run(self, device: Device, *, prepare: bool = True) -> tuple[list[int], list[int]]:
        """Pull all steps; return both ends' sums."""
        self.serial += 1
        tallies = [Tally(len(self.steps), CPU) for _ in self.pullers]
        for actor, (puller, memory) in enumerate(zip(self.pullers, self.memories, strict=True)):
            puller.begin(memory, None)
            if prepare:
                puller.prepare_sends(program(actor, *self.steps))
                puller.prepare_receives(program(actor, *self.steps))

        self.board.begin(self.serial, None)
        sender, receiver = self.pullers
        sender.vouch(program(0, *self.steps), self.board, turn(self.serial))
        copied = []
        for index, step in enumerate(self.steps):
            sender.send(step, tallies[0].total(index, sender.sums))
            copied.extend(
                receiver.receive(step, lambda index=index: tallies[1].total(index, receiver.sums), turn(self.serial))
            )

        ends = [puller.finished() for puller in self.pullers]
        assert not any(event.query() for event in ends)
        device.drain()
        assert all(event.query() for event in ends)
        for fence in copied:
            fence.wait(Deadline(0))

        return tallies[0].values(len(self.steps)), tallies[1].values(len(self.steps))

    def expected(self) -> list[int]:
        return [signed(weighed_sum(packed(self.memories[0], step.cuts))) for step in self.steps]


def odd_pair() -> Pair:
    """Views of all kinds at both ends; "plain" is held twice by the receiver."""
    sources = [
        Shard("plain", noise(torch.zeros(9, 16, dtype=torch.bfloat16), 0), (0, 0), (9, 16)),
        Shard("columns", noise(torch.zeros(7, 6), 1).t(), (0, 0), (6, 7)),
        Shard("every", noise(torch.zeros(5, 8, dtype=torch.uint8), 2)[:, ::2], (0, 0), (5, 4)),
        Shard("one", noise(torch.zeros((), dtype=torch.float64), 3), (), ()),
        Shard("long", noise(torch.zeros(700, dtype=torch.int32), 4), (0,), (700,)),
    ]
    targets = [
        Shard("plain", torch.zeros(16, 9, dtype=torch.bfloat16).t(), (0, 0), (9, 16)),
        Shard("plain", torch.zeros(9, 24, dtype=torch.bfloat16)[:, 8:], (0, 0), (9, 16)),
        Shard("columns", torch.zeros(6, 9)[:, 1:8], (0, 0), (6, 7)),
        Shard("every", torch.zeros(4, 5, dtype=torch.uint8).t(), (0, 0), (5, 4)),
        Shard("one", torch.zeros((), dtype=torch.float64), (), ()),
        Shard("long", torch.zeros(500, dtype=torch.int32), (100,), (700,)),
    ]
    steps = [
        [
            Cut("plain", (0, 0), (9, 16), "bfloat16"),
            Cut("one", (), (), "float64"),
            Cut("long", (100,), (301,), "int32"),
        ],
        [Cut("every", (0, 0), (5, 4), "uint8"), Cut("columns", (1, 0), (4, 7), "float32")],
        [Cut("long", (401,), (199,), "int32")],
    ]
    return Pair(sources, targets, steps)


def arrived(pair: Pair) -> bool:
    return all(
        torch.equal(as_bits(view), as_bits(pair.memories[0].source(cut)))
        for step in pair.steps
        for cut in step.cuts
        for view in pair.memories[1].targets(cut)
    )


@pytest.mark.parametrize("engine_nbytes", [8 << 20, 400, 16])
@pytest.mark.parametrize("least_part", [128 << 20, 256])
def test_what_is_pulled_is_bit_for_bit_the_senders_and_sums_up_to_what_the_oracle_says(
    device: Device, monkeypatch: pytest.MonkeyPatch, engine_nbytes: int, least_part: int
) -> None:
    monkeypatch.setattr(arrivals, "_ENGINE_NBYTES", engine_nbytes)
    monkeypatch.setattr(parts, "_LEAST_PART_NBYTES", least_part)
    pair = odd_pair()
    pair.attach()
    sent, found = pair.run(device)
    assert arrived(pair)
    assert sent == found == pair.expected()
    assert all(nbytes >= engine_nbytes for nbytes in host_device.CopyBatch.started)
    # A part is no longer than 256 bytes where the least is that, so no row of 400 is left to a copy engine.
    engines = engine_nbytes == 16 or (engine_nbytes == 400 and least_part > 256)
    assert bool(host_device.CopyBatch.started) == engines
    # Nothing beside the cuts.
    whole = whole_of(tensor_of(pair.memories[1].shards[2]), 6, 9)
    assert whole[1:5, 1:8].any(dim=1).all()
    assert not whole[0].any()
    assert not whole[5].any()
    assert not whole[:, 0].any()
    assert not whole[:, 8].any()


def test_a_warm_run_pulls_what_the_weights_are_by_then(device: Device) -> None:
    pair = odd_pair()
    pair.attach()
    pair.run(device)
    for seed, shard in enumerate(pair.memories[0].shards):
        noise(tensor_of(shard), 100 + seed)

    assert not arrived(pair)
    sent, found = pair.run(device, prepare=False)
    assert arrived(pair)
    assert sent == found == pair.expected()


def test_a_bit_that_flips_in_the_receivers_memory_shows_in_its_sum_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last view of a tied weight or in one written once; the kernels' copies are spoilt after the fact."""
    pair = odd_pair()
    pair.attach()
    target = tensor_of(pair.memories[1].shards[4])
    walk = host_device.walk

    def spoilt(table: object, source_base: int, target_base: int, total: torch.Tensor, mode: str) -> None:
        walk(table, source_base, target_base, total, mode)  # type: ignore[arg-type]
        if mode == "COPY":
            as_bits(target).fill_(1)

    monkeypatch.setattr(host_device, "walk", spoilt)
    sent, found = pair.run(device)
    assert sent == pair.expected()
    assert [a == b for a, b in zip(sent, found, strict=True)] == [False, True, True]


def test_without_sums_nothing_is_summed_up(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    launch = host_device.launch

    def noted(*arguments: object) -> None:
        modes.append(str(arguments[4]))
        launch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tables, "_launch", noted)
    pair = odd_pair()
    pair.attach()
    for puller, memory in zip(pair.pullers, pair.memories, strict=True):
        puller.begin(memory, None)

    pair.board.begin(1, None)
    pair.pullers[0].vouch(program(0, *pair.steps), pair.board, turn(1))
    for step in pair.steps:
        pair.pullers[0].send(step, None)
        list(pair.pullers[1].receive(step, lambda: None, turn(1)))

    device.drain()
    assert arrived(pair)
    assert set(modes) == {"COPY"}


def test_a_receiver_pulls_from_two_senders(device: Device) -> None:
    """Each has handles and a board of its own; both start at number 0."""
    views = [noise(torch.zeros(40, dtype=torch.int16), seed) for seed in range(2)]
    sources = [Memory([Shard("w", view, (40 * part,), (80,))]) for part, view in enumerate(views)]
    target = torch.zeros(80, dtype=torch.int16)
    steps = [Step(part, part, (2,), (Cut("w", (40 * part,), (40,), "int16"),), pull=True) for part in range(2)]
    boards = [Board(1, CPU) for _ in range(2)]
    puller = Puller(CPU)
    puller.attach(
        {part: export_addresses(program(part, steps[part]), sources[part], boards[part]) for part in range(2)}
    )
    puller.begin(Memory([Shard("w", target, (0,), (80,))]), None)
    for part, step in enumerate(steps):
        boards[part].begin(7 + part, None)
        boards[part].vouch(0, 80)
        list(puller.receive(step, lambda: None, turn(7 + part)))

    device.drain()
    assert torch.equal(target, torch.cat(views))


def test_addresses_are_of_what_this_actor_sends_to_be_pulled_and_of_nothing_else(device: Device) -> None:
    view = noise(torch.zeros(6, 4), 0)
    memory = Memory([Shard("w", view.t(), (0, 0), (4, 6))])
    cut = Cut("w", (1, 2), (2, 3), "float32")
    steps = (
        Step(5, 0, (1,), (cut,), pull=True),
        Step(6, 0, (1,), (cut,), pull=False),
        Step(7, 1, (0,), (cut,), pull=True),
    )
    own = Board(3, CPU)
    addresses = export_addresses(program(0, *steps), memory, own)
    assert list(addresses.steps) == [5]
    number, offset, *strides = torch.frombuffer(bytearray(addresses.steps[5]), dtype=torch.int64).tolist()
    assert host_device.open_memory(addresses.handles[number]) + offset == view[2, 1].data_ptr()
    assert strides == [4, 16]
    number, offset, room = addresses.board
    assert room == 3
    assert host_device.open_memory(addresses.handles[number]) + offset == own.page.data_ptr()
    assert addresses.places == {5: 0, 6: 1, 7: 2}


# Mappings.


def opened() -> dict[bytes, int]:
    return {handle: count for handle, count in host_device.OPENED.items() if count}


def test_what_was_mapped_of_a_sender_is_given_back_when_it_has_moved_and_at_the_end(device: Device) -> None:
    pair = odd_pair()
    first = pair.attach()
    assert opened() == dict.fromkeys(first.handles, 1)
    pair.run(device)
    # The sender's shards are new objects now.
    fresh = odd_pair()
    pair.memories = fresh.memories[0], pair.memories[1]
    for seed, shard in enumerate(pair.memories[0].shards):
        noise(tensor_of(shard), 50 + seed)

    second = pair.attach()
    assert opened() == dict.fromkeys(second.handles, 1)
    sent, found = pair.run(device)
    assert arrived(pair)
    assert sent == found == pair.expected()
    pair.pullers[1].close()
    assert opened() == {}


def test_a_mapping_that_fails_half_way_leaks_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = odd_pair()
    real = pair.attach()

    def never(handle: bytes) -> int:
        if handle == b"bad":
            raise TransportUnavailable("cannot be mapped")

        return host_device.open_memory(handle)

    monkeypatch.setattr(pull, "open_memory", never)
    with pytest.raises(TransportUnavailable, match="cannot be mapped"):
        pair.pullers[1].attach({0: Addresses((b"new page", b"bad", b"never"), real.steps, (0, 0, 0), {})})

    assert opened() == {b"new page": 1}
    pair.pullers[1].close()
    assert opened() == {}


def test_memory_that_cannot_be_shared_says_why(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(host_device.Exporter):
        def locate(self, address: int) -> tuple[int, int]:
            raise TransportUnavailable("cuIpcGetMemHandle failed with CUDA_ERROR_INVALID_VALUE (1)")

    memory = Memory([Shard("w", torch.zeros(3), (0,), (3,))])
    assert lending.why_not_shared(memory) == ""
    monkeypatch.setattr(lending, "Exporter", Refusing)
    assert lending.why_not_shared(memory) == "cuIpcGetMemHandle failed with CUDA_ERROR_INVALID_VALUE (1)"


# Segments of several tensors.


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("second", range(7))
def test_tensors_that_follow_each_other_are_one_copy_within_an_allocation_and_never_across_two(
    device: Device, monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    """Six tensors in a row; the sender's next allocation begins after ``first`` of them, the receiver's ``second``."""
    monkeypatch.setattr(arrivals, "_ENGINE_NBYTES", 64)
    elements, nbytes = 1 << 10, 1 << 12

    def row(border: int) -> list[Shard]:
        held = torch.zeros(1 << 16, dtype=torch.int32)
        start = (-held.data_ptr() % (1 << 16)) // 4 + (1 << 14) - border * elements
        views = [held[start + number * elements :][:elements] for number in range(6)]
        assert all(view.data_ptr() >> 16 == (view.data_ptr() + nbytes - 1) >> 16 for view in views)
        return [Shard(f"t{number}", view, (0,), (elements,)) for number, view in enumerate(views)]

    sources = row(first)
    for number, shard in enumerate(sources):
        noise(tensor_of(shard), number)

    pair = Pair(sources, row(second), [[Cut(f"t{number}", (0,), (elements,), "int32") for number in range(6)]])
    pair.attach()
    sent, found = pair.run(device)
    assert arrived(pair)
    assert sent == found == pair.expected()
    borders = sorted({0, first, second, 6})
    assert host_device.CopyBatch.started == [(b - a) * nbytes for a, b in itertools.pairwise(borders)]


# The board.


def test_a_receiver_waits_until_the_sender_has_begun_this_very_run(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = odd_pair()
    pair.attach()
    readings = [0, 3, 4, 9]

    def read(target: int, source: int, nbytes: int, stream: int) -> None:
        assert (source, nbytes) == (pair.board.page.data_ptr(), 8 * (3 + 3))
        assert stream == pair.pullers[1].boards._stream.cuda_stream
        pair.board.post(BEGUN, readings.pop(0))
        ctypes.memmove(target, source, nbytes)

    monkeypatch.setattr(board, "read_async", read)
    pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(5), go_on)
    assert readings == [9]
    # It has heard it for this run.
    pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(5), go_on)
    assert readings == [9]


def test_a_board_that_was_attached_anew_has_not_been_heard(device: Device) -> None:
    """The sender moved in the very run in which its old board said so."""
    pair = odd_pair()
    pair.attach()
    pair.board.post(BEGUN, 4)
    pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(5), go_on)
    pair.board = Board(3, CPU)
    pair.attach()
    with pytest.raises(MoveTimeout):
        pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(-1), go_on)


def test_a_board_that_never_says_so_is_a_timeout_and_an_abort_ends_the_wait(device: Device) -> None:
    pair = odd_pair()
    pair.attach()
    with pytest.raises(MoveTimeout, match="actor 0 had not begun the run by the deadline"):
        pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(-1), go_on)

    def give_up() -> None:
        raise SyncAborted("the test gave it up")

    with pytest.raises(SyncAborted):
        pair.pullers[1].boards.wait(0, BEGUN, 4, Deadline(5), give_up)


@pytest.mark.parametrize("how", ["closed", "attached anew in vain"])
def test_a_board_that_is_no_longer_mapped_is_read_no_more_by_whoever_waits_for_it(
    device: Device, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    pair = odd_pair()
    addresses = pair.attach()
    waiting = pair.pullers[1]
    looks: list[int] = []

    def read(target: int, source: int, nbytes: int, stream: int) -> None:
        looks.append(source)
        assert opened()
        host_device.read_async(target, source, nbytes, stream)

    def unmap() -> None:
        """Between two looks, as another thread may."""
        if how == "closed":
            waiting.close()
        else:
            with pytest.raises(TransportUnavailable):
                waiting.attach({0: Addresses((b"bad",), addresses.steps, (0, 0), {})})

    def never(handle: bytes) -> int:
        raise TransportUnavailable("cannot be mapped")

    monkeypatch.setattr(board, "read_async", read)
    monkeypatch.setattr(pull, "open_memory", never)
    with pytest.raises(SyncAborted, match="the connection with actor 0 was given up"):
        waiting.boards.wait(0, BEGUN, 4, Deadline(5), unmap)

    assert len(looks) == 1
    assert opened() == {}


def test_a_step_before_any_run_is_refused(device: Device) -> None:
    pair = odd_pair()
    pair.attach()
    with pytest.raises(SyncError, match="before the run began"):
        list(pair.pullers[1].receive(pair.steps[0], lambda: None, turn(1)))


def test_what_joins_a_puller_comes_after_its_work_and_before_what_follows(device: Device) -> None:
    """A relay's staging sends on what was pulled, and later pulls come after that."""
    pair = odd_pair()
    pair.attach()
    for puller, memory in zip(pair.pullers, pair.memories, strict=True):
        puller.begin(memory, None)

    stream = host_device.Stream()
    seen: list[bool] = []
    target = pair.memories[1].targets(pair.steps[2].cuts[0])[0]
    pair.board.begin(1, None)
    pair.pullers[0].vouch(program(0, *pair.steps), pair.board, turn(1))
    list(pair.pullers[1].receive(pair.steps[0], lambda: None, turn(1)))
    pair.pullers[1].join(stream)  # type: ignore[arg-type]
    stream.put(lambda: seen.append(bool(pair.memories[1].targets(pair.steps[0].cuts[2])[0].any())))
    stream.put(lambda: seen.append(bool(target.any())))
    pair.pullers[1].join(stream)  # type: ignore[arg-type]
    list(pair.pullers[1].receive(pair.steps[2], lambda: None, turn(1)))
    device.drain()
    assert seen == [True, False]
    assert target.any()
