"""Two buckets taking turns: what is packed, sent, received and unpacked, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Computed, Shard
from wavecast.runtime.transfer.checksum import combine, fold
from wavecast.runtime.transfer.comm import CommunicatorError, Deadline, Fence, Move, MoveTimeout
from wavecast.runtime.transfer.copying import Copier, TensorCopier
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.program import Bucket, Cut, fill_buckets
from wavecast.runtime.transfer.staging import Leg, Staging

CPU = torch.device("cpu")


class Script:
    """
    A communicator that writes down what happens to it.

    The wire is the list ``sent``: what is received comes out of ``coming``, when the move is finished and no earlier.
    """

    def __init__(self, log: list[str], coming: list[int] | None = None) -> None:
        self.rank = 0
        self.device = CPU
        self.device_bytes = 0
        self.exports = False
        self.log = log
        self.sent: list[list[int]] = []
        self.coming = coming or []
        self.failure: CommunicatorError | None = None
        self.finished = -1
        self._moves = 0

    def start(
        self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline
    ) -> ScriptedMove:
        number = self._moves
        self._moves += 1
        self.log.append(f"start {number}")
        return ScriptedMove(self, number, buffer, sends=sender == self.rank)

    def fence(self) -> Fence:
        self.log.append(f"fence {self.finished}")
        return ScriptedFence(self.log, self.finished)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class ScriptedMove:
    def __init__(self, script: Script, number: int, buffer: torch.Tensor, *, sends: bool) -> None:
        self._script = script
        self._number = number
        self._buffer = buffer
        self._sends = sends

    def finish(self, deadline: Deadline) -> None:
        self._script.log.append(f"finish {self._number}")
        self._script.finished = self._number
        if self._script.failure is not None:
            raise self._script.failure

        # Read and written as late as can be: a slot used again too early shows.
        values = self._buffer.view(torch.int32)
        if self._sends:
            self._script.sent.append(values.tolist())
        else:
            values.fill_(self._script.coming.pop(0))


class ScriptedFence:
    """Bears the number of the move that was finished last before it was put."""

    def __init__(self, log: list[str], number: int) -> None:
        self._log = log
        self._number = number

    def wait(self, deadline: Deadline) -> None:
        self._log.append(f"wait {self._number}")


def wait(fences: Sequence[Fence]) -> None:
    for fence in fences:
        fence.wait(Deadline(5))


class Source:
    """Eight elements a tensor; each reading is written down."""

    def __init__(self, log: list[str], names: str) -> None:
        self.values = {name: number for number, name in enumerate(names)}
        self._log = log
        memory = Memory(
            [Shard(name, Computed((8,), torch.int32, CPU, self._reader(name)), (0,), (8,)) for name in names]
        )
        self.copier = TensorCopier(memory, checksum=True)

    def _reader(self, name: str) -> Callable[[Box], torch.Tensor]:
        def read(box: Box) -> torch.Tensor:
            self._log.append(f"pack {name}")
            return torch.full(box.extent, self.values[name], dtype=torch.int32)

        return read


def buckets_of(names: str) -> tuple[Bucket, ...]:
    """One bucket a tensor."""
    return fill_buckets([Cut(name, (0,), (8,), "int32") for name in names], bucket_bytes=32)


def leg(
    copier: Copier,
    buckets: tuple[Bucket, ...],
    *,
    step: int = 0,
    sender: int = 0,
    ahead: Bucket | None = None,
    check: Callable[[], None] = lambda: None,
) -> Leg:
    return Leg(
        step=step,
        sender=sender,
        receivers=(1,) if sender == 0 else (0,),
        buckets=buckets,
        ahead=ahead,
        forwards=False,
        copier=copier,
        deadline=Deadline(5),
        meet=lambda: None,
        check=check,
    )


def test_the_next_bucket_is_packed_while_one_travels() -> None:
    log: list[str] = []
    script, source = Script(log), Source(log, "abcd")
    staging = Staging(32, script)
    staging.begin(None)
    fences = staging.send(leg(source.copier, buckets_of("abcd")))
    assert log == [
        "pack a", "start 0",
        "pack b", "start 1",
        "finish 0", "fence 0", "pack c", "start 2",
        "finish 1", "fence 1", "pack d", "start 3",
        "finish 2", "fence 2", "finish 3", "fence 3",
    ]  # fmt: skip
    # It waits for nothing; whoever wants to know whether all has left does.
    del log[:]
    wait(fences)
    assert log == ["wait 2", "wait 3"]
    assert script.sent == [[0] * 8, [1] * 8, [2] * 8, [3] * 8]


def test_the_first_bucket_of_the_next_step_is_packed_while_the_last_of_this_one_travels() -> None:
    log: list[str] = []
    script, source = Script(log), Source(log, "abcde")
    staging = Staging(32, script)
    first, second = buckets_of("abc"), buckets_of("de")
    staging.begin(None)
    wait(staging.send(leg(source.copier, first, ahead=second[0])))
    assert log[-7:] == ["start 2", "finish 1", "fence 1", "pack d", "finish 2", "fence 2", "wait 2"]
    del log[:]
    wait(staging.send(leg(source.copier, second, step=1)))
    assert log[:3] == ["start 3", "pack e", "start 4"]
    assert log[-2:] == ["wait 3", "wait 4"]
    assert script.sent == [[number] * 8 for number in range(5)]


def test_what_was_packed_ahead_is_forgotten_when_a_run_begins() -> None:
    """The run before it was given up between two steps; the weights have changed since."""
    log: list[str] = []
    script, source = Script(log), Source(log, "ab")
    staging = Staging(32, script)
    first, second = buckets_of("a"), buckets_of("b")
    staging.begin(None)
    staging.send(leg(source.copier, first, ahead=second[0]))
    source.values = {"a": 10, "b": 11}
    staging.begin(None)
    staging.send(leg(source.copier, first, ahead=second[0]))
    staging.send(leg(source.copier, second, step=1))
    assert script.sent == [[0] * 8, [10] * 8, [11] * 8]


def test_an_empty_step_still_packs_ahead() -> None:
    log: list[str] = []
    script, source = Script(log), Source(log, "a")
    staging = Staging(32, script)
    (bucket,) = buckets_of("a")
    staging.begin(None)
    assert staging.send(leg(source.copier, (), ahead=bucket)) == []
    wait(staging.send(leg(source.copier, (bucket,), step=1)))
    assert log == ["pack a", "start 0", "finish 0", "fence 0", "wait 0"]


def test_a_bucket_that_was_packed_ahead_counts_for_the_step_that_sends_it_and_not_before() -> None:
    log: list[str] = []
    source = Source(log, "ab")
    staging = Staging(32, Script(log))
    first, second = buckets_of("a"), buckets_of("b")
    staging.begin(None)
    staging.send(leg(source.copier, first, ahead=second[0]))
    assert source.copier.sums(2) == [sum_of(0), 0]
    staging.send(leg(source.copier, second, step=1))
    assert source.copier.sums(2) == [sum_of(0), sum_of(1)]


def sum_of(*values: int) -> int:
    """The sum of a step of buckets that are filled with one number each."""
    return combine([int(fold(torch.full((8,), value, dtype=torch.int32).view(torch.uint8))) for value in values])


def targets(names: str) -> tuple[list[torch.Tensor], TensorCopier]:
    views = [torch.zeros(8, dtype=torch.int32) for _ in names]
    memory = Memory([Shard(name, view, (0,), (8,)) for name, view in zip(names, views, strict=True)])
    return views, TensorCopier(memory, checksum=True)


def test_a_bucket_is_unpacked_while_the_next_one_travels() -> None:
    log: list[str] = []
    views, copier = targets("abc")
    script = Script(log, coming=[7, 8, 9])
    staging = Staging(32, script)
    staging.begin(None)
    fences = staging.receive(leg(copier, buckets_of("abc"), sender=1, check=lambda: log.append("write")))
    # A fence stands between arrival and unpacking: the sender is not kept waiting for the latter.
    assert log == [
        "start 0",
        "start 1",
        "finish 0", "fence 0", "write", "start 2",
        "finish 1", "fence 1", "write",
        "finish 2", "fence 2", "write",
    ]  # fmt: skip
    del log[:]
    wait(fences)
    assert log == ["wait 1", "wait 2"]
    assert [view.tolist() for view in views] == [[7] * 8, [8] * 8, [9] * 8]
    # The order of the sums is that of the buckets, though two are settled at the end.
    assert copier.sums(1) == [sum_of(7, 8, 9)] != [sum_of(8, 7, 9)]


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcd"])
def test_both_ends_sum_up_alike_whatever_turn_a_step_starts_with(names: str) -> None:
    log: list[str] = []
    source = Source(log, names)
    views, copier = targets(names)
    sender, receiver = Staging(32, Script(log)), Staging(32, Script(log, coming=[*range(len(names))] * 2))
    for staging in (sender, receiver):
        staging.begin(None)

    for step in range(2):
        wait(sender.send(leg(source.copier, buckets_of(names), step=step)))
        wait(receiver.receive(leg(copier, buckets_of(names), step=step, sender=1)))

    assert source.copier.sums(2) == copier.sums(2) == [sum_of(*range(len(names)))] * 2
    assert [int(view[0]) for view in views] == [*range(len(names))]


class GivenUp(Exception):
    pass


def give_up() -> None:
    raise GivenUp


def test_nothing_is_written_once_the_run_was_given_up() -> None:
    views, copier = targets("ab")
    script = Script([], coming=[7, 8])
    staging = Staging(32, script)
    staging.begin(None)
    with pytest.raises(GivenUp):
        staging.receive(leg(copier, buckets_of("ab"), sender=1, check=give_up))

    assert not any(view.any() for view in views)


def test_nothing_is_read_or_sent_once_the_run_was_given_up() -> None:
    log: list[str] = []
    staging, source = Staging(32, Script(log)), Source(log, "a")
    staging.begin(None)
    with pytest.raises(GivenUp):
        staging.send(leg(source.copier, buckets_of("a"), check=give_up))

    assert log == []


def test_a_move_that_fails_is_not_unpacked() -> None:
    views, copier = targets("a")
    script = Script([], coming=[7])
    script.failure = MoveTimeout("too slow")
    staging = Staging(32, script)
    staging.begin(None)
    with pytest.raises(MoveTimeout, match="too slow"):
        staging.receive(leg(copier, buckets_of("a"), sender=1))

    assert not views[0].any()


def test_a_run_after_a_failed_one_starts_afresh() -> None:
    log: list[str] = []
    views, copier = targets("ab")
    script = Script(log, coming=[7, 8])
    script.failure = MoveTimeout("too slow")
    staging = Staging(32, script)
    staging.begin(None)
    with pytest.raises(MoveTimeout):
        staging.receive(leg(copier, buckets_of("ab"), sender=1))

    script.failure = None
    staging.begin(None)
    staging.receive(leg(copier, buckets_of("ab"), sender=1))
    assert [view.tolist() for view in views] == [[7] * 8, [8] * 8]


def allocated(staging: Staging) -> int:
    """The bytes that really lie behind the slots."""
    storages = (slot.buffer.untyped_storage() for slot in staging._slots)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("bucket_bytes", [0, 48, 1 << 20])
def test_it_holds_two_buckets_and_says_so(bucket_bytes: int) -> None:
    staging = Staging(bucket_bytes, Script([]))
    assert staging.nbytes == allocated(staging) == 2 * bucket_bytes


def test_nothing_is_summed_up_where_no_sums_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(data: torch.Tensor) -> torch.Tensor:
        raise AssertionError("summed up")

    monkeypatch.setattr("wavecast.runtime.transfer.copying.fold", never)
    source, target = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    sending, receiving = (
        TensorCopier(Memory([Shard("a", view, (0,), (8,))]), checksum=False) for view in (source, target)
    )
    script = Script([], coming=[1])
    Staging(32, script).send(leg(sending, buckets_of("a")))
    Staging(32, script).receive(leg(receiving, buckets_of("a"), sender=1))
    assert script.sent == [[*range(8)]]
    assert target.tolist() == [1] * 8
    assert sending.sums(2) == receiving.sums(2) == [0, 0]


def test_the_end_of_a_run_waits_for_both_slots() -> None:
    log: list[str] = []
    Staging(32, Script(log)).finish(Deadline(1))
    assert log == ["fence -1", "wait -1"] * 2


def test_memory_that_was_sent_in_place_is_not_held_on_to() -> None:
    log: list[str] = []
    script = Script(log)
    views = {name: torch.full((8,), number, dtype=torch.int32) for number, name in enumerate("abc")}
    memory = Memory([Shard(name, view, (0,), (8,)) for name, view in views.items()])
    staging = Staging(32, script)
    staging.begin(None)
    wait(staging.send(leg(TensorCopier(memory, checksum=True), buckets_of("abc"))))
    assert script.sent == [[number] * 8 for number in range(3)]
    held = {slot.window.data_ptr() for slot in staging._slots}
    assert held == {slot.buffer.data_ptr() for slot in staging._slots}
    assert held.isdisjoint(view.data_ptr() for view in views.values())


def test_where_others_map_what_is_sent_it_is_packed() -> None:
    log: list[str] = []
    script = Script(log)
    script.exports = True
    views = {name: torch.full((8,), number, dtype=torch.int32) for number, name in enumerate("ab")}
    memory = Memory([Shard(name, view, (0,), (8,)) for name, view in views.items()])
    started: list[int] = []
    start = script.start

    def noting(buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
        started.append(buffer.data_ptr())
        return start(buffer, sender=sender, receivers=receivers, deadline=deadline)

    script.start = noting  # type: ignore[method-assign]
    staging = Staging(32, script)
    staging.begin(None)
    wait(staging.send(leg(TensorCopier(memory, checksum=True), buckets_of("ab"))))
    assert script.sent == [[number] * 8 for number in range(2)]
    assert started == [slot.buffer.data_ptr() for slot in staging._slots]
