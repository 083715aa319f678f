"""What an actor tells a driver on its own host ahead of the answer: a few bytes of fixed format over a local socket."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from wavecast.runtime.transfer.messages import Finished, StepDone

__all__ = ("MOST_NBYTES", "TOKEN_NBYTES", "Slip", "read_notice")

TOKEN_NBYTES = 16
#: A datagram with the sums of more steps than have room for is left to the answer itself.
MOST_NBYTES = 32 << 10
_HEAD = struct.Struct(f"<{TOKEN_NBYTES}s??qdi")
#: Sums are of 64 bits, with a sign or without.
_SUM_NBYTES = 16


class Slip(NamedTuple):
    """
    Lets an actor tell a driver on its host that a step is done, with what it will answer.

    An answer of Ray's to a process that has waited for tens of milliseconds takes more than one to arrive; a datagram
    does not. It is a hint: whoever gets none, or sends in vain, waits for the answer.

    :ivar address: of the driver's socket, in Linux's abstract namespace, which has no files and ends with the socket
    :ivar token: random and for one call; it came with the request, so who knows it was asked
    """

    address: bytes
    token: bytes

    def send(self, reply: StepDone) -> None:
        """Tell the driver, without blocking, if it can be reached and ``reply`` fits."""
        notice = _write(self.token, reply)
        if len(notice) > MOST_NBYTES:
            return

        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.setblocking(False)
                out.sendto(notice, self.address)
        except OSError:
            # On another host, gone, or busy: the answer comes over Ray all the same.
            return


def _write(token: bytes, reply: StepDone) -> bytes:
    finished = reply.finished
    if finished is None:
        return _HEAD.pack(token, reply.closed, False, 0, 0.0, 0)

    sums = finished.checksums
    head = _HEAD.pack(token, reply.closed, True, finished.staging_bytes, finished.host_seconds, len(sums))
    return head + b"".join(value.to_bytes(_SUM_NBYTES, "little", signed=True) for value in sums)


def read_notice(notice: bytes) -> StepDone | None:
    """Return what was told, behind the token, or nothing where the bytes are no notice."""
    if len(notice) < _HEAD.size:
        return None

    _, closed, has_finished, staging_nbytes, seconds, count = _HEAD.unpack_from(notice)
    if count < 0 or len(notice) != _HEAD.size + count * _SUM_NBYTES:
        return None

    places = range(_HEAD.size, len(notice), _SUM_NBYTES)
    sums = tuple(int.from_bytes(notice[place : place + _SUM_NBYTES], "little", signed=True) for place in places)
    return StepDone(Finished(sums, staging_nbytes, seconds) if has_finished else None, closed)
