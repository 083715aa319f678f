"""A communicator over CUDA IPC: the receiver copies out of the sender's buffer, which may be on the same GPU."""

from __future__ import annotations

import time

import torch

from wavecast.runtime.errors import TransportUnavailable
from wavecast.runtime.transfer.comm import CommunicatorError, CudaFence, Deadline, Fence, MoveTimeout
from wavecast.runtime.transfer.comm_torch import Rendezvous
from wavecast.runtime.transfer.cuda_memory import CopyBatch, Exporter, close_memory, make_current, open_memory

__all__ = ("IpcCommunicator",)

_POLL_SECONDS = 50e-6
_REFUSED = b"refused"


class IpcCommunicator:
    """
    Moves device memory between processes of one node; a GPU may have several of them.

    Sender and receivers meet at the rendezvous' store: the sender says where its buffer lies once it is filled, each
    receiver answers once it has copied it. For what cannot be pulled straight from weights; a move costs two messages.
    """

    def __init__(self, rendezvous: Rendezvous, device: torch.device) -> None:
        self.rank = rendezvous.rank
        self.device = device
        self.exports = True
        self.device_bytes = 0
        self._store = rendezvous.store
        self._prefix = f"{rendezvous.key}/ipc"
        self._aborted = False
        self._opened: dict[bytes, int] = {}
        self._counts: dict[tuple[int, tuple[int, ...]], int] = {}
        make_current(device.index or 0)

    def start(
        self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline
    ) -> _Offered | _Wanted:
        if self._aborted:
            raise CommunicatorError("the communicator was aborted")

        if self.rank != sender and self.rank not in receivers:
            raise CommunicatorError(f"actor {self.rank} takes no part in a move from {sender} to {receivers}")

        make_current(self.device.index or 0)
        count = self._counts.get((sender, receivers), 0)
        self._counts[sender, receivers] = count + 1
        key = f"{sender}-{'-'.join(map(str, receivers))}/{count}"
        if self.rank != sender:
            return _Wanted(self, buffer, key)

        # Another process cannot wait for this stream: what fills the buffer must be over.
        self.fence().wait(deadline)
        try:
            self.tell(key, self._offer(buffer))
        except TransportUnavailable as error:
            self.tell(key, _REFUSED)
            raise CommunicatorError(str(error)) from error

        return _Offered(self, key, [f"{key}/{receiver}" for receiver in receivers])

    def fence(self) -> Fence:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return CudaFence(event, lambda: self._aborted)

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self._aborted = True
        opened, self._opened = self._opened, {}
        # Whoever closes may never have used this device.
        make_current(self.device.index or 0)
        for handle in opened:
            close_memory(handle)

    def _offer(self, buffer: torch.Tensor) -> bytes:
        """Return the handle of the buffer's allocation, its offset there and its size."""
        if not buffer.numel():
            return bytes(16)

        # Asked for anew each time: staging memory is made anew with each program, maybe where it was.
        exporter = Exporter()
        number, offset = exporter.locate(buffer.data_ptr())
        handle = exporter.handles[number]
        return handle + offset.to_bytes(8, "little") + buffer.numel().to_bytes(8, "little")

    def tell(self, key: str, value: bytes) -> None:
        """Leave a message."""
        try:
            self._store.set(f"{self._prefix}/{key}", value)
        except RuntimeError as error:
            raise CommunicatorError(f"the rendezvous is gone: {str(error).partition(chr(10))[0]}") from error

    def hear(self, key: str, deadline: Deadline) -> bytes:
        """Wait for a message, which stays where it is: others may wait for it as well."""
        name = f"{self._prefix}/{key}"
        try:
            while not self._store.check([name]):
                if self._aborted:
                    raise CommunicatorError("the communicator was aborted")

                if deadline.passed:
                    raise MoveTimeout(f"no answer came under {key} before the deadline")

                time.sleep(_POLL_SECONDS)

            return self._store.get(name)
        except RuntimeError as error:
            raise CommunicatorError(f"the rendezvous is gone: {str(error).partition(chr(10))[0]}") from error

    def clear(self, keys: list[str]) -> None:
        """Take away messages that all have heard who were to hear them."""
        try:
            for key in keys:
                self._store.delete_key(f"{self._prefix}/{key}")
        except RuntimeError as error:
            raise CommunicatorError(f"the rendezvous is gone: {str(error).partition(chr(10))[0]}") from error

    def mapped(self, handle: bytes) -> int:
        """Return where a peer's allocation is mapped here."""
        if handle not in self._opened:
            try:
                self._opened[handle] = open_memory(handle)
            except TransportUnavailable as error:
                raise CommunicatorError(str(error)) from error

        return self._opened[handle]


class _Offered:
    def __init__(self, communicator: IpcCommunicator, key: str, answers: list[str]) -> None:
        self._communicator = communicator
        self._key = key
        self._answers = answers

    def finish(self, deadline: Deadline) -> None:
        answers, self._answers = self._answers, []
        if not answers:
            return

        for key in answers:
            if self._communicator.hear(key, deadline) == _REFUSED:
                raise CommunicatorError(f"the receiver could not take what was offered under {key}")

        self._communicator.clear([self._key, *answers])


class _Wanted:
    def __init__(self, communicator: IpcCommunicator, buffer: torch.Tensor, key: str) -> None:
        self._communicator = communicator
        self._buffer: torch.Tensor | None = buffer
        self._key = key

    def finish(self, deadline: Deadline) -> None:
        communicator, buffer, self._buffer = self._communicator, self._buffer, None
        if buffer is None:
            return

        answer = f"{self._key}/{communicator.rank}"
        try:
            self._copy(buffer, deadline)
        except CommunicatorError:
            communicator.tell(answer, _REFUSED)
            raise

        communicator.tell(answer, b"taken")

    def _copy(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        communicator = self._communicator
        offer = communicator.hear(self._key, deadline)
        if offer == _REFUSED:
            raise CommunicatorError("the sender's memory cannot be shared")

        handle, offset, nbytes = (
            offer[:-16],
            int.from_bytes(offer[-16:-8], "little"),
            int.from_bytes(offer[-8:], "little"),
        )
        if nbytes != buffer.numel():
            raise CommunicatorError(f"{nbytes} bytes were offered where {buffer.numel()} were expected")

        if nbytes:
            source = communicator.mapped(handle) + offset
            stream = torch.cuda.current_stream(buffer.device).cuda_stream
            try:
                CopyBatch([(buffer.data_ptr(), source, nbytes)]).start(stream)
            except TransportUnavailable as error:
                raise CommunicatorError(str(error)) from error

        # The sender may fill its buffer anew once it is told, so the copy must be over.
        communicator.fence().wait(deadline)
