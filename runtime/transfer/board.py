"""What actors on one node tell each other through device memory, where a call of the driver's would take too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from wavecast.runtime.errors import LayoutError, SyncAborted
from wavecast.runtime.transfer.comm import Deadline, MoveTimeout
from wavecast.runtime.transfer.cuda_memory import clear_words, make_current, read_async, write_word

__all__ = ("AGREED", "BEGUN", "SUMMED", "Board", "Boards", "index_of")

#: Words of a board, each the serial of a run: the latest whose weights are at rest, whose sums are all there, and in
#: which the actor has found everything in its place. The serial's negative says that it is not so and will not be.
BEGUN, SUMMED, AGREED = 0, 1, 2
_STEPS = 3
_WORD_NBYTES = 8
#: A board starts at a multiple of so many words, which memory is read by.
_WORDS_AT_ONCE = 8
#: What is not there after so many looks, some 20 us each, is not looked for all the time.
_EAGER_LOOKS = 5000
_NAP_SECONDS = 100e-6


class Board:
    """
    An actor's own page of device memory, which its peers read and it alone writes.

    Behind the words come, for each step of the actor's program, the bytes that it vouches for in the run that has
    begun, and then, again for each step, its sum. All but the sums is written on one stream, in order.

    :param steps: the most steps it has room for
    :ivar page: int64
    :ivar cleared: once it has passed, the sums may be added to
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.page = torch.zeros(_STEPS + 2 * steps, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # What is queued when the board is dropped must not reach whoever is given its memory next.
        self.page.record_stream(self._stream)
        self._index = index_of(device)
        self.cleared = torch.cuda.Event()
        self.cleared.record(self._stream)

    @property
    def sums(self) -> torch.Tensor:
        """Where the steps' sums are."""
        return self.page[_STEPS + self.steps :]

    def begin(self, serial: int, ready: torch.cuda.Event | None) -> None:
        """Say that a run has begun, nothing is vouched for yet and nothing summed up, once ``ready`` has passed."""
        if ready is not None:
            self._stream.wait_event(ready)

        if self.steps:
            make_current(self._index)
            clear_words(self._address(_STEPS), 2 * self.steps, self._stream.cuda_stream)

        self.post(BEGUN, serial)
        self.cleared = torch.cuda.Event()
        self.cleared.record(self._stream)

    def vouch(self, place: int, nbytes: int) -> None:
        """Say that so many bytes of a step, in wire order, are where the peers believe them to be."""
        self.post(_STEPS + place, nbytes)

    def post(self, word: int, value: int) -> None:
        """Write a word."""
        make_current(self._index)
        write_word(self._address(word), value, self._stream.cuda_stream)

    def take_back(self, serial: int, *, agreed: bool) -> None:
        """
        Let nobody who comes late take what was said of a run for valid: it has not begun, and will not end.

        :param agreed: what was said of its end as well
        """
        self.post(BEGUN, 0)
        self.post(SUMMED, -serial)
        if agreed:
            self.post(AGREED, -serial)

    def _address(self, word: int) -> int:
        return self.page.data_ptr() + word * _WORD_NBYTES


@dataclass(frozen=True, slots=True)
class _Peer:
    """:ivar places: by task id: the step's position in the peer's program"""

    address: int
    steps: int
    places: Mapping[int, int]


class Boards:
    """
    The boards of an actor's peers. May be used by several threads.

    :param device: the actor's GPU
    :ivar waited_seconds: the processor's time that threads spent waiting for what they were to say
    """

    def __init__(self, device: torch.device) -> None:
        self._index = index_of(device)
        self._stream = torch.cuda.Stream(device)
        self._found = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._peers: dict[int, _Peer] = {}
        self._heard: dict[int, list[int]] = {}
        self._sums: dict[int, tuple[int, dict[int, int]]] = {}
        # No board may be unmapped while it is read.
        self._lock = threading.Lock()
        self.waited_seconds = 0.0

    def attach(self, peer: int, address: int, steps: int, places: Mapping[int, int]) -> None:
        """Read the board of ``peer``, which has room for so many steps, at ``address`` from now on."""
        with self._lock:
            self._peers[peer] = _Peer(address, steps, places)
            self._heard.pop(peer, None)
            self._sums.pop(peer, None)

    def detach(self, peers: Iterable[int]) -> None:
        """Read nothing of ``peers`` once this has returned: whoever waits for one of them is told."""
        with self._lock:
            for peer in peers:
                self._peers.pop(peer, None)

    def wait(self, peer: int, word: int, serial: int, deadline: Deadline, check: Callable[[], None]) -> bool:
        """
        Block until ``peer`` has posted ``serial`` there, or its negative; return whether it was the serial itself.

        :param check: raises once the run was given up
        :raises MoveTimeout: when the deadline passed first
        """
        heard = self._wait(peer, lambda words: abs(words[word]) == serial, _SAID[word], deadline, check)
        return heard[word] == serial

    def reads(self, peer: int) -> bool:
        """Tell whether this actor reads the board of ``peer``."""
        return peer in self._peers

    def wait_begun(self, peer: int, serial: int, deadline: Deadline, check: Callable[[], None]) -> None:
        """
        Block until ``peer`` has begun the run; as :meth:`wait`.

        :raises LayoutError: when it holds another layout than the run was planned for
        """
        heard = self._wait(peer, lambda words: abs(words[BEGUN]) == serial, _SAID[BEGUN], deadline, check)
        _require_begun(peer, serial, heard)

    def wait_vouched(
        self, peer: int, task: int, serial: int, nbytes: int, deadline: Deadline, check: Callable[[], None]
    ) -> None:
        """Block until ``peer`` has begun the run and vouches for ``nbytes`` of ``task``; as :meth:`wait_begun`."""
        word = _STEPS + self._peer(peer).places[task]

        def is_told(words: list[int]) -> bool:
            return words[BEGUN] == -serial or (words[BEGUN] == serial and words[word] >= nbytes)

        _require_begun(peer, serial, self._wait(peer, is_told, _SAID[BEGUN], deadline, check))

    def listen(self, peer: int, tasks: Collection[int], serial: int) -> None:
        """Keep what :meth:`sums` will be asked for, if ``peer`` has posted that all is summed up. Does not wait."""
        heard = self._heard[peer] = self._look(peer, self._heard.get(peer))
        if heard[SUMMED] == serial:
            self._sums[peer] = (serial, self.sums(peer, tasks, serial))

    def sums(self, peer: int, tasks: Collection[int], serial: int) -> dict[int, int]:
        """
        Return what ``peer`` has summed up for ``tasks``; only once it has posted that all is summed up.

        :param serial: of the run
        """
        if not tasks:
            return {}

        kept = self._sums.get(peer)
        if kept is not None and kept[0] == serial:
            return {task: kept[1][task] for task in tasks}

        known = self._peer(peer)
        found = self._read(peer, _STEPS + known.steps, known.steps)
        return {task: found[known.places[task]] for task in tasks}

    def _wait(
        self,
        peer: int,
        enough: Callable[[list[int]], bool],
        said: str,
        deadline: Deadline,
        check: Callable[[], None],
    ) -> list[int]:
        started = time.thread_time()
        heard = self._heard.get(peer)
        looks = 0
        while heard is None or not enough(heard):
            looks += 1
            if looks > _EAGER_LOOKS:
                time.sleep(_NAP_SECONDS)

            heard = self._heard[peer] = self._look(peer, heard)
            check()
            if not enough(heard) and deadline.passed:
                raise MoveTimeout(f"actor {peer} had not {said} by the deadline")

        self.waited_seconds += time.thread_time() - started
        return heard

    def _look(self, peer: int, before: list[int] | None) -> list[int]:
        """Read what ``peer`` says now; nothing that it vouches for is older than the begin that is read with it."""
        count = _STEPS + self._peer(peer).steps
        found = self._read(peer, 0, count)
        if count > _WORDS_AT_ONCE and (before is None or found[BEGUN] != before[BEGUN]):
            # What lies behind may have been read first, before it was taken back at the begin.
            found = self._read(peer, 0, count)

        return found

    def _peer(self, peer: int) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            raise SyncAborted(f"the connection with actor {peer} was given up")

        return known

    def _read(self, peer: int, word: int, count: int) -> list[int]:
        with self._lock:
            known = self._peer(peer)
            if len(self._found) < count:
                self._found = torch.zeros(count, dtype=torch.int64, pin_memory=True)

            make_current(self._index)
            first = known.address + word * _WORD_NBYTES
            read_async(self._found.data_ptr(), first, count * _WORD_NBYTES, self._stream.cuda_stream)
            self._stream.synchronize()
            return [int(value) for value in self._found[:count].tolist()]


def _require_begun(peer: int, serial: int, heard: list[int]) -> None:
    if heard[BEGUN] == -serial:
        raise LayoutError(f"actor {peer} holds another layout than the one the run was planned for", actors=(peer,))


def index_of(device: torch.device) -> int:
    """Return the number of a GPU among the visible ones."""
    return device.index if device.index is not None else torch.cuda.current_device()


_SAID = {BEGUN: "begun the run", SUMMED: "summed up what it sent", AGREED: "found its weights in place"}
