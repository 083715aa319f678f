"""What actors on the driver's own host tell it ahead of their answers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import sys
from collections.abc import Callable, Iterator

from wavecast.runtime.transfer.messages import StepDone
from wavecast.runtime.transfer.slip import MOST_NBYTES, TOKEN_NBYTES, Slip, read_notice

__all__ = ("Notices", "Told", "listening")

#: Datagrams that are read before the event loop goes on with something else.
_AT_ONCE = 64


def _forget(found: StepDone | None) -> None:
    """Nobody wants to know."""


class Told:
    """
    What an actor will tell ahead of its answer, which may be nothing. On the event loop's thread alone.

    Who wants to know is called at once: a future would call in the next turn of the loop, and each comes after the last
    byte.
    """

    __slots__ = ("_call", "done")

    def __init__(self) -> None:
        self.done = False
        self._call: Callable[[StepDone | None], object] = _forget

    def then(self, call: Callable[[StepDone | None], object]) -> None:
        """Call ``call`` with what is told, or with ``None`` once the answer itself is there. Before either."""
        self._call = call

    def tell(self, found: StepDone | None) -> None:
        """Say what was told; what comes second is no news."""
        if not self.done:
            self.done = True
            # Whoever is called knows the answer, which knows of this: let go of him.
            call, self._call = self._call, _forget
            call(found)


class Notices:
    """
    The slips of one transfer, and what was told by them. On the event loop's thread alone.

    What arrives without the token of a call that is waited for is dropped; the rest is read as numbers.
    """

    def __init__(self, inlet: socket.socket) -> None:
        self._inlet = inlet
        self._address: bytes = inlet.getsockname()
        self._expected: dict[bytes, Told] = {}

    def issue(self) -> tuple[Slip, Told]:
        """Return a slip to send along with a call, and what is told by it, which may never come."""
        slip = Slip(self._address, secrets.token_bytes(TOKEN_NBYTES))
        told = self._expected[slip.token] = Told()
        return slip, told

    def read(self) -> None:
        """Take what has arrived."""
        for _ in range(_AT_ONCE):
            try:
                notice = self._inlet.recv(MOST_NBYTES + 1)
            except BlockingIOError:
                return

            # Before anything else is looked at: to read what strangers send costs as much as they like.
            token = notice[:TOKEN_NBYTES]
            found = read_notice(notice) if token in self._expected else None
            if found is not None:
                self._expected.pop(token).tell(found)
                if not self._expected:
                    # The last one: whoever waits for it goes on before anybody looks for more.
                    return


@contextlib.contextmanager
def listening() -> Iterator[Notices | None]:
    """Listen for as long as the block runs; nothing where actors cannot tell anything, on other systems than Linux."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        notices: Notices | None = None
        if sys.platform == "linux":
            # Without a descriptor to spare, or on a loop that watches none, answers come over Ray alone.
            with contextlib.suppress(OSError, NotImplementedError):
                inlet = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                inlet.setblocking(False)
                inlet.bind(b"\0wavecast-" + secrets.token_hex(TOKEN_NBYTES).encode())
                found = Notices(inlet)
                loop.add_reader(inlet, found.read)
                stack.callback(loop.remove_reader, inlet)
                notices = found

        yield notices
