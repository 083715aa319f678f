"""What actors on one node tell each other through device memory, where a call of the driver's would take too long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from wavecast.runtime.errors import SyncAborted
from wavecast.runtime.transfer.comm import Deadline, MoveTimeout
from wavecast.runtime.transfer.cuda_memory import make_current, read_async

__all__ = ("AGREED", "BEGUN", "SUMMED", "Board", "Boards")

#: Words of a board, each the serial of a run: the latest whose weights are at rest, whose sums are all there, and in
#: which the actor has found everything in its place. The serial's negative says of the last two that it will not be.
BEGUN, SUMMED, AGREED = 0, 1, 2
#: Sums, one a step of the actor's program, follow the words.
_SUMS = 3
_WORD_NBYTES = 8


class Board:
    """
    An actor's own page of device memory, which its peers read and it alone writes.

    :param steps: the most steps whose sums it has room for
    :ivar page: int64
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.page = torch.zeros(_SUMS + steps, dtype=torch.int64, device=device)
        self._device = device
        # Comes after each post and before the next: what is taken back stays so, and harms no later run.
        self._aside = torch.cuda.Stream(device)

    @property
    def sums(self) -> torch.Tensor:
        """Where the steps' sums are."""
        return self.page[_SUMS:]

    def has_room(self, steps: int) -> bool:
        """Tell whether the sums of so many steps can be on it."""
        return len(self.page) >= _SUMS + steps

    def post(self, word: int, serial: int) -> None:
        """Write ``serial`` to a word, once all that the current stream holds is done."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_stream(self._aside)
        self.page[word : word + 1].fill_(serial)
        self._aside.wait_stream(stream)

    def take_back(self, serial: int, *, agreed: bool) -> None:
        """
        Let nobody who comes late take what was said of a run for valid: it has not begun, and will not be.

        :param agreed: what was said of its end as well
        """
        with torch.cuda.stream(self._aside):
            self.post(BEGUN, 0)
            self.post(SUMMED, -serial)
            if agreed:
                self.post(AGREED, -serial)


@dataclass(frozen=True, slots=True)
class _Peer:
    """:ivar places: by task id: the step's position in the peer's program"""

    address: int
    places: Mapping[int, int]


class Boards:
    """
    The boards of an actor's peers. May be used by several threads.

    :param device: the actor's GPU
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index if device.index is not None else torch.cuda.current_device()
        self._stream = torch.cuda.Stream(device)
        self._found = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._peers: dict[int, _Peer] = {}
        self._heard: dict[tuple[int, int], int] = {}
        # No board may be unmapped while it is read.
        self._lock = threading.Lock()

    def attach(self, peer: int, address: int, places: Mapping[int, int]) -> None:
        """Read the board of ``peer`` at ``address`` from now on."""
        with self._lock:
            self._peers[peer] = _Peer(address, places)
            self._heard = {heard: serial for heard, serial in self._heard.items() if heard[0] != peer}

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
        heard = self._heard.get((peer, word), 0)
        while abs(heard) != serial:
            heard = self._heard[peer, word] = self._read(peer, word, 1)[0]
            check()
            if abs(heard) != serial and deadline.passed:
                raise MoveTimeout(f"actor {peer} had not {_SAID[word]} by the deadline")

        return heard == serial

    def sums(self, peer: int, tasks: Collection[int]) -> dict[int, int]:
        """Return what ``peer`` has summed up for ``tasks``; only once it has posted that all is summed up."""
        if not tasks:
            return {}

        places = self._peers[peer].places
        first = min(places[task] for task in tasks)
        last = max(places[task] for task in tasks)
        found = self._read(peer, _SUMS + first, last - first + 1)
        return {task: found[places[task] - first] for task in tasks}

    def _read(self, peer: int, word: int, count: int) -> list[int]:
        with self._lock:
            known = self._peers.get(peer)
            if known is None:
                raise SyncAborted(f"the connection with actor {peer} was given up")

            if len(self._found) < count:
                self._found = torch.zeros(count, dtype=torch.int64, pin_memory=True)

            make_current(self._index)
            read_async(
                self._found.data_ptr(),
                known.address + word * _WORD_NBYTES,
                count * _WORD_NBYTES,
                self._stream.cuda_stream,
            )
            self._stream.synchronize()
            return [int(value) for value in self._found[:count].tolist()]


_SAID = {BEGUN: "begun the run", SUMMED: "summed up what it sent", AGREED: "found its weights in place"}
