"""Communicators over torch.distributed's process groups: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist

from wavecast.runtime.transfer.comm import PASSED, CommunicatorError, CudaFence, Deadline, Fence, MoveTimeout
from wavecast.runtime.transfer.sealed_store import SealedStore

__all__ = ("Rendezvous", "GlooCommunicator", "NcclCommunicator", "connecting", "host_store", "join_store")

_environment = threading.Lock()


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """
    Where and how the members of a connection meet.

    :ivar store: reached by all members, readable by them alone
    :ivar key: prefix of all keys
    :ivar host: this node's own address, for the sockets of gloo
    :ivar rank: this actor's number, out of ``size``
    :ivar groups: sorted actor sets that broadcast among themselves; every member knows all of them, in the same order
    :ivar edges: senders and receivers of one-to-one moves, in the same order on every member
    :ivar deadline: until when all must have met
    """

    store: SealedStore
    key: str
    host: str
    rank: int
    size: int
    groups: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    deadline: Deadline


def host_store(host: str, *, seconds: float) -> tuple[dist.TCPStore, int]:
    """Open a store that listens on ``host`` only, on a free port; return it with the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join_store(host: str, port: int, *, seconds: float) -> dist.TCPStore:
    """Reach the store another member hosts."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    """What is used of torch's process groups; its own stubs leave most of it out."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> _Work: ...
    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int, /) -> _Work: ...
    def broadcast(self, tensors: list[torch.Tensor], options: dist.BroadcastOptions, /) -> _Work: ...
    def abort(self) -> None: ...
    def shutdown(self) -> None: ...
    def _start_coalescing(self) -> None: ...
    def _end_coalescing(self) -> _Work: ...


class _GlooMove:
    def __init__(self, works: list[_Work], what: str, aborted: Callable[[], bool]) -> None:
        self._works = works
        self._what = what
        self._aborted = aborted

    def finish(self, deadline: Deadline) -> None:
        works, self._works = self._works, []
        for work in works:
            try:
                work.wait(timedelta(seconds=deadline.left))
            except RuntimeError as error:
                raise _translate(error, self._what, deadline, self._aborted()) from error


class GlooCommunicator:
    """
    Moves host memory over gloo.

    A move to one receiver is a send; a move to several is a broadcast in their own small group.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rank = rendezvous.rank
        self.device = torch.device("cpu")
        self.exports = False
        self.device_bytes = 0
        self._aborted = False
        self._tags: dict[tuple[int, int], int] = {}
        self._store = rendezvous.store
        with connecting("gloo", rendezvous, lambda: self._aborted):
            self._world: _Group | None = _gloo_group(rendezvous, "world", tuple(range(rendezvous.size)))
            self._groups = {
                group: _gloo_group(rendezvous, "-".join(map(str, group)), group)
                for group in rendezvous.groups
                if self.rank in group
            }

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> _GlooMove:
        what = f"moving {buffer.numel()} bytes from actor {sender} to {receivers}"
        with _translated(what, deadline, lambda: self._aborted):
            if self._aborted:
                raise CommunicatorError("the communicator was aborted")

            if len(receivers) == 1:
                return _GlooMove([self._pair(buffer, sender, receivers[0])], what, lambda: self._aborted)

            members = tuple(sorted((sender, *receivers)))
            options = dist.BroadcastOptions()
            options.rootRank = members.index(sender)
            options.timeout = timedelta(seconds=deadline.left)
            return _GlooMove([self._groups[members].broadcast([buffer], options)], what, lambda: self._aborted)

    def fence(self) -> Fence:
        return PASSED

    def abort(self) -> None:
        # gloo cannot wake a blocked receive: what is under way ends by its own time-out, what comes later fails here.
        self._aborted = True

    def close(self) -> None:
        self._aborted = True
        self._groups = {}
        self._world = None

    def _pair(self, buffer: torch.Tensor, sender: int, receiver: int) -> _Work:
        # Several buffers may be under way on one edge: a tag each keeps them apart.
        tag = self._tags.get((sender, receiver), 0)
        self._tags[sender, receiver] = (tag + 1) % (1 << 30)
        if self._world is None:
            raise CommunicatorError("the communicator was closed")

        if self.rank == sender:
            return self._world.send([buffer], receiver, tag)

        return self._world.recv([buffer], sender, tag)


class _NcclMove:
    def __init__(self, work: _Work, what: str) -> None:
        self._work = work
        self._what = what

    def finish(self, deadline: Deadline) -> None:
        # Without blocking wait this only makes the current stream wait for NCCL's own.
        self._work.wait()


class NcclCommunicator:
    """
    Moves device memory over NCCL, on private groups; the default process group is never touched.

    One communicator of all members carries every one-to-one move; a broadcast has a communicator of its members.
    """

    def __init__(self, rendezvous: Rendezvous, device: torch.device) -> None:
        self.rank = rendezvous.rank
        self.device = device
        self.exports = False
        self._aborted = False
        self._deadline = rendezvous.deadline
        self._store = rendezvous.store
        torch.cuda.set_device(device)
        free_before = torch.cuda.mem_get_info(device)[0]
        reserved_before = torch.cuda.memory_reserved(device)
        with connecting("NCCL", rendezvous, lambda: self._aborted):
            self._world = _nccl_group(rendezvous, "world", tuple(range(rendezvous.size)), device)
            self._groups = {
                group: _nccl_group(rendezvous, "-".join(map(str, group)), group, device)
                for group in rendezvous.groups
                if self.rank in group
            }
            self._warm_up(rendezvous)
        grown = torch.cuda.memory_reserved(device) - reserved_before
        self.device_bytes = max(free_before - torch.cuda.mem_get_info(device)[0] - grown, 0)

    def start(self, buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> _NcclMove:
        what = f"moving {buffer.numel()} bytes from actor {sender} to {receivers}"
        if self._aborted:
            raise CommunicatorError("the communicator was aborted")

        with _translated(what, deadline, lambda: self._aborted):
            if len(receivers) > 1:
                members = tuple(sorted((sender, *receivers)))
                options = dist.BroadcastOptions()
                options.rootRank = members.index(sender)
                options.asyncOp = True
                return _NcclMove(self._groups[members].broadcast([buffer], options), what)

            # A grouped call uses the communicator of all members; a bare send would create one for each pair.
            self._world._start_coalescing()
            if self.rank == sender:
                self._world.send([buffer], receivers[0], 0)
            else:
                self._world.recv([buffer], sender, 0)

            return _NcclMove(self._world._end_coalescing(), what)

    def fence(self) -> Fence:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return CudaFence(event, lambda: self._aborted)

    def abort(self) -> None:
        if self._aborted:
            return

        self._aborted = True
        for group in (*self._groups.values(), self._world):
            group.abort()

    def close(self) -> None:
        if self._aborted:
            return

        self._aborted = True
        for group in (*self._groups.values(), self._world):
            group.shutdown()

    def _warm_up(self, rendezvous: Rendezvous) -> None:
        """Open every channel now: NCCL sets up an edge, and a collective, at its first use."""
        token = torch.zeros(1024, dtype=torch.uint8, device=self.device)
        for sender, receiver in rendezvous.edges:
            if self.rank in (sender, receiver):
                self.start(token, sender=sender, receivers=(receiver,), deadline=self._deadline).finish(self._deadline)

        for group in rendezvous.groups:
            if self.rank in group:
                self.start(token, sender=group[0], receivers=group[1:], deadline=self._deadline).finish(self._deadline)

        self.fence().wait(self._deadline)


def _gloo_group(rendezvous: Rendezvous, name: str, members: tuple[int, ...]) -> _Group:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=rendezvous.deadline.left)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=rendezvous.host)]
    options._threads = 2
    store = dist.PrefixStore(f"{rendezvous.key}/gloo/{name}", rendezvous.store)
    return cast("_Group", dist.ProcessGroupGloo(store, members.index(rendezvous.rank), len(members), options))


def _nccl_group(rendezvous: Rendezvous, name: str, members: tuple[int, ...], device: torch.device) -> _Group:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)
    store = dist.PrefixStore(f"{rendezvous.key}/nccl/{name}", rendezvous.store)
    with _unwatched():
        group = dist.ProcessGroupNCCL(store, members.index(rendezvous.rank), len(members), options)

    group.eager_connect_single_device(device)
    return cast("_Group", group)


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """
    Keep torch's watchdog from ending the process.

    Its answer to an aborted or late collective is to kill the process; deadlines and aborts are ours, and the user's
    own groups keep their setting, which is read when a group is made.
    """
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "TORCH_NCCL_BLOCKING_WAIT")
    # One thread at a time: another would take the settings of this one for the user's own.
    with _environment:
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(names, "0"))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def connecting(transport: str, rendezvous: Rendezvous, aborted: Callable[[], bool]) -> Iterator[None]:
    """Give what fails while members meet the class that fits, and of several reasons the one behind."""
    try:
        with _translated(f"connecting {transport}", rendezvous.deadline, aborted):
            yield
    except CommunicatorError as error:
        # Torch's NCCL wraps whatever its store raises into an error of its own.
        if rendezvous.store.tampered is not None and rendezvous.store.tampered is not error:
            raise rendezvous.store.tampered from error

        raise


@contextlib.contextmanager
def _translated(what: str, deadline: Deadline, aborted: Callable[[], bool]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _translate(error, what, deadline, aborted()) from error


def _translate(error: Exception, what: str, deadline: Deadline, aborted: bool) -> CommunicatorError:
    first_line = str(error).partition("\n")[0]
    if aborted:
        return CommunicatorError(f"{what}: aborted")

    if deadline.passed or "imed out" in first_line or "imeout" in first_line:
        return MoveTimeout(f"{what}: {first_line}")

    return CommunicatorError(f"{what}: {first_line}")
