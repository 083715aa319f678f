"""How receivers end a run among themselves: who says what on its board, and what becomes of it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.runtime.transfer import host_device
from wavecast.runtime.errors import SyncAborted
from wavecast.runtime.transfer import board
from wavecast.runtime.transfer.agreement import Ending, agree
from wavecast.runtime.transfer.board import AGREED, BEGUN, SUMMED, Board, Boards
from wavecast.runtime.transfer.comm import Deadline, MoveTimeout
from wavecast.runtime.transfer.program import Program, Step

CPU = torch.device("cpu")
SERIAL = 70
#: Two senders serve two receivers each.
STEPS = [
    Step(10 + number, sender, (receiver,), (), pull=True)
    for number, (sender, receiver) in enumerate([(0, 2), (0, 3), (1, 2), (1, 3)])
]
#: By task id: what a sender reads and a receiver finds.
TOTALS = {10: 5, 11: -6, 12: 1 << 62, 13: 0}
PEERS = {0: (), 1: (), 2: (3,), 3: (2,)}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    host_device.install(monkeypatch)


class Round:
    """Four actors with a board each; all may read all."""

    def __init__(self, *, checksum: bool = True) -> None:
        self.checksum = checksum
        self.programs = [
            Program(
                "digest",
                actor,
                1 << 20,
                checksum,
                True,
                tuple(step for step in STEPS if actor in (step.sender, *step.receivers)),
            )
            for actor in range(4)
        ]
        self.boards = [Board(2, CPU) for _ in range(4)]
        self.readers = [Boards(CPU) for _ in range(4)]
        self.said: list[list[tuple[int, int]]] = [[], [], [], []]
        for reader in self.readers:
            for actor, own in enumerate(self.boards):
                places = {step.task: place for place, step in enumerate(self.programs[actor].steps)}
                reader.attach(actor, own.page.data_ptr(), own.steps, places)

    def end(self, actor: int, *, differs: bool = False, seconds: float = 20.0, given_up: bool = False) -> bool:
        """What the actor does at the end of its last step."""
        totals = [TOTALS[step.task] for step in self.programs[actor].steps]
        totals[-1] += differs
        self.boards[actor].sums.copy_(torch.tensor(totals))

        def check() -> None:
            if given_up:
                raise SyncAborted("the test gave it up")

        def say(word: int, serial: int) -> None:
            check()
            self.said[actor].append((word, serial))
            self.boards[actor].post(word, serial)

        ending = Ending(SERIAL, actor, PEERS[actor], Deadline(seconds), check, say)
        return agree(ending, self.programs[actor], totals if self.checksum else (), self.readers[actor])

    def refuse(self, actor: int) -> bool:
        self.boards[actor].post(SUMMED, -SERIAL)
        self.boards[actor].post(AGREED, -SERIAL)
        return False


def test_a_sender_says_that_its_sums_are_there_and_waits_for_nobody() -> None:
    found = Round()
    assert found.end(0, seconds=0)
    assert found.said == [[(SUMMED, SERIAL)], [], [], []]


def test_a_receiver_compares_says_so_and_waits_for_its_peers() -> None:
    found = Round()
    assert found.end(0)
    assert found.end(1)
    found.boards[3].post(AGREED, SERIAL)
    assert found.end(2)
    assert found.said[2] == [(SUMMED, SERIAL), (AGREED, SERIAL)]


def test_a_receiver_that_finds_a_difference_says_so_and_does_not_wait() -> None:
    found = Round()
    assert found.end(0)
    assert found.end(1)
    assert not found.end(2, differs=True, seconds=0)
    assert found.said[2] == [(SUMMED, SERIAL), (AGREED, -SERIAL)]
    # The other one is whole, and told.
    assert not found.end(3, seconds=0)
    assert found.said[3] == [(SUMMED, SERIAL), (AGREED, SERIAL)]


def test_a_sender_that_refuses_is_not_asked_for_sums() -> None:
    found = Round()
    assert found.end(0)
    assert not found.refuse(1)
    found.boards[1].sums.copy_(torch.tensor([TOTALS[12], TOTALS[13]]))
    assert not found.end(2, seconds=0)
    assert found.said[2] == [(SUMMED, SERIAL), (AGREED, -SERIAL)]


def test_what_was_said_of_another_run_counts_for_nothing() -> None:
    found = Round()
    for actor in (0, 1):
        found.end(actor)
        found.boards[actor].post(SUMMED, SERIAL - 1)

    with pytest.raises(MoveTimeout, match="actor 0 had not summed up what it sent by the deadline"):
        found.end(2, seconds=0)

    for actor in (0, 1):
        found.boards[actor].post(SUMMED, SERIAL)

    found.boards[3].post(AGREED, SERIAL + 1)
    with pytest.raises(MoveTimeout, match="actor 3 had not found its weights in place by the deadline"):
        found.end(2, seconds=0)


def test_a_run_that_was_given_up_says_nothing() -> None:
    found = Round()
    for actor in (0, 2):
        with pytest.raises(SyncAborted):
            found.end(actor, given_up=True)

    assert found.said == [[], [], [], []]
    assert [own.page[:3].tolist() for own in found.boards] == [[0, 0, 0]] * 4


def test_without_sums_a_sender_still_says_when_it_is_through() -> None:
    found = Round(checksum=False)
    found.boards[3].post(AGREED, SERIAL)
    with pytest.raises(MoveTimeout):
        found.end(2, differs=True, seconds=0)

    assert found.end(0)
    assert found.end(1)
    assert found.end(2, differs=True, seconds=0)


@pytest.mark.parametrize("senders", [*itertools.product(["ends", "refuses"], repeat=2)], ids="-".join)
@pytest.mark.parametrize("receivers", [*itertools.product(["ends", "differs", "refuses"], repeat=2)], ids="-".join)
def test_all_end_the_run_or_no_receiver_does_and_nobody_waits_for_ever(
    senders: Sequence[str], receivers: Sequence[str]
) -> None:
    """Whoever comes first, and whatever each finds: all of it at once, on a thread an actor."""
    found = Round()
    ways = [*senders, *receivers]

    def go(actor: int) -> bool:
        if ways[actor] == "refuses":
            return found.refuse(actor)

        return found.end(actor, differs=ways[actor] == "differs")

    with ThreadPoolExecutor(4) as pool:
        ended = list(pool.map(go, reversed(range(4))))[::-1]

    assert ended[:2] == [way == "ends" for way in senders]
    assert ended[2:] == [set(ways) == {"ends"}] * 2


# Boards.


def test_a_board_has_words_then_what_is_vouched_for_and_then_sums() -> None:
    own = Board(3, CPU)
    own.post(BEGUN, 1)
    own.post(SUMMED, 2)
    own.post(AGREED, -3)
    own.vouch(1, 40)
    own.sums.fill_(9)
    assert own.page.tolist() == [1, 2, -3, 0, 40, 0, 9, 9, 9]
    own.begin(4, None)
    assert own.page.tolist() == [4, 2, -3, 0, 0, 0, 0, 0, 0]


def test_what_was_said_of_a_run_is_taken_back_and_a_later_run_says_it_again() -> None:
    own = Board(0, CPU)
    for word in (BEGUN, SUMMED, AGREED):
        own.post(word, SERIAL)

    own.take_back(SERIAL, agreed=False)
    assert own.page.tolist() == [0, -SERIAL, SERIAL]
    own.take_back(SERIAL, agreed=True)
    assert own.page.tolist() == [0, -SERIAL, -SERIAL]
    own.post(BEGUN, SERIAL + 1)
    assert own.page.tolist() == [SERIAL + 1, -SERIAL, -SERIAL]


def test_sums_are_read_at_once_and_only_where_some_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    own, boards = Board(5, CPU), Boards(CPU)
    own.sums.copy_(torch.tensor([10, 11, 12, 13, 14]))
    boards.attach(4, own.page.data_ptr(), own.steps, {7: 3, 8: 1, 9: 0})
    reads: list[tuple[int, int]] = []

    def read(target: int, source: int, nbytes: int, stream: int) -> None:
        reads.append((source - own.page.data_ptr(), nbytes))
        host_device.read_async(target, source, nbytes, stream)

    monkeypatch.setattr(board, "read_async", read)
    assert boards.sums(4, (7, 8), SERIAL) == {7: 13, 8: 11}
    assert boards.sums(4, (), SERIAL) == {}
    assert reads == [((3 + 5) * 8, 5 * 8)]


def test_sums_that_were_heard_early_are_those_of_their_run_alone() -> None:
    own, boards = Board(2, CPU), Boards(CPU)
    boards.attach(4, own.page.data_ptr(), own.steps, {7: 1, 8: 0})
    own.sums.copy_(torch.tensor([10, 11]))
    boards.listen(4, (7, 8), SERIAL)
    # Not all was summed up yet: what is there by then counts.
    own.sums.copy_(torch.tensor([12, 13]))
    own.post(SUMMED, SERIAL)
    assert boards.sums(4, (7, 8), SERIAL) == {7: 13, 8: 12}
    boards.listen(4, (7, 8), SERIAL)
    # The next run's sums are on their way, and no business of this one.
    own.sums.copy_(torch.tensor([14, 15]))
    assert boards.sums(4, (7, 8), SERIAL) == {7: 13, 8: 12}
    assert boards.sums(4, (7,), SERIAL + 1) == {7: 15}
    boards.attach(4, own.page.data_ptr(), own.steps, {7: 0, 8: 1})
    assert boards.sums(4, (7, 8), SERIAL) == {7: 14, 8: 15}


@pytest.mark.parametrize("steps", [5, 6])
def test_what_lies_beyond_the_begin_is_read_again_once_that_is_seen(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    own, boards = Board(steps, CPU), Boards(CPU)
    boards.attach(4, own.page.data_ptr(), own.steps, {7: steps - 1})
    own.begin(SERIAL, None)
    reads: list[int] = []

    def read(target: int, source: int, nbytes: int, stream: int) -> None:
        host_device.read_async(target, source, nbytes, stream)
        reads.append(nbytes)
        if len(reads) == 1 and steps == 6:
            # The last word was read before the begin took back what it said of an earlier run.
            ctypes.c_int64.from_address(target + nbytes - 8).value = 1 << 40
        elif len(reads) == 3:
            own.vouch(steps - 1, 64)

    monkeypatch.setattr(board, "read_async", read)
    boards.wait_vouched(4, 7, SERIAL, 64, Deadline(20), lambda: None)
    # With up to five steps a board is read at once; else twice at the begin, and as often as it takes from there.
    assert reads == [8 * (3 + steps)] * 4


def test_what_was_detached_is_not_read_and_whoever_waits_for_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    own, boards = Board(1, CPU), Boards(CPU)
    boards.attach(4, own.page.data_ptr(), own.steps, {7: 0})
    looks: list[int] = []

    def read(target: int, source: int, nbytes: int, stream: int) -> None:
        looks.append(source)
        host_device.read_async(target, source, nbytes, stream)

    def detach() -> None:
        # Between two looks.
        if len(looks) == 2:
            boards.detach([4])

    monkeypatch.setattr(board, "read_async", read)
    with pytest.raises(SyncAborted, match="the connection with actor 4 was given up"):
        boards.wait(4, AGREED, SERIAL, Deadline(20), detach)

    assert len(looks) == 2
    with pytest.raises(SyncAborted):
        boards.wait(5, AGREED, SERIAL, Deadline(20), lambda: None)
