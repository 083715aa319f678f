"""One suite for all communicators."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import pytest
import torch
from torch.distributed import Store

from tests.runtime.transfer import conformance
from tests.runtime.transfer.process_members import start_members
from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, MoveTimeout
from wavecast.runtime.transfer.comm_fake import FakeFabric
from wavecast.runtime.transfer.comm_ipc import IpcCommunicator
from wavecast.runtime.transfer.comm_ported import PortedCommunicator, connect_ported
from wavecast.runtime.transfer.comm_torch import (
    GlooCommunicator,
    NcclCommunicator,
    Rendezvous,
    host_store,
    join_store,
)
from wavecast.runtime.transfer.sealed_store import SealedStore

Groups = tuple[tuple[int, ...], ...]
Edges = tuple[tuple[int, int], ...]
#: For each member the one that owns the port of its GPU.
PORTS = (0, 1, 1)


def make_fake(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    fabric = FakeFabric(size)
    return [fabric.communicator(rank) for rank in range(size)]


def make_ported_fake(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    """The third member shares the second one's GPU."""
    owners = PORTS[:size]
    near, far = FakeFabric(size), FakeFabric(2)
    return [
        PortedCommunicator(
            rank,
            owners=owners,
            near=near.communicator(rank),
            far=far.communicator(rank) if owners[rank] == rank else None,
        )
        for rank in range(size)
    ]


def connect_gloo(rank: int, size: int, port: int, groups: Groups, edges: Edges, store: Store | None) -> Communicator:
    return GlooCommunicator(_rendezvous(rank, size, port, groups, edges, store))


def connect_nccl(rank: int, size: int, port: int, groups: Groups, edges: Edges) -> Communicator:
    rendezvous = _rendezvous(rank, size, port, groups, edges, None)
    return NcclCommunicator(rendezvous, torch.device("cuda", rank))


def connect_ipc(rank: int, size: int, port: int, groups: Groups, edges: Edges) -> Communicator:
    rendezvous = _rendezvous(rank, size, port, groups, edges, None)
    # Two members at most share a GPU: that is where nothing else can serve.
    device = torch.device("cuda", rank // 2 % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return IpcCommunicator(rendezvous, device)


def connect_over_ports(rank: int, size: int, port: int, groups: Groups, edges: Edges) -> Communicator:
    rendezvous = _rendezvous(rank, size, port, groups, edges, None)
    device = torch.device("cuda", PORTS[rank])
    torch.cuda.set_device(device)
    return connect_ported(rendezvous, device, owners=PORTS[:size], secret=bytes(32))


def _rendezvous(rank: int, size: int, port: int, groups: Groups, edges: Edges, store: Store | None) -> Rendezvous:
    return Rendezvous(
        SealedStore(store or join_store("127.0.0.1", port, seconds=20), secret=bytes(32)),
        key="test",
        host="127.0.0.1",
        rank=rank,
        size=size,
        groups=groups,
        edges=edges,
        deadline=Deadline(30),
    )


def make_gloo(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    """Connect ``size`` members on threads of this process, over a store on the loopback address."""
    store, port = host_store("127.0.0.1", seconds=20)
    members: dict[int, Communicator] = {}
    failures: list[BaseException] = []

    def join(rank: int) -> None:
        try:
            members[rank] = connect_gloo(rank, size, port, groups, edges, store if rank == 0 else None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()

    for thread in threads:
        thread.join(30)

    if failures:
        raise failures[0]

    return [members[rank] for rank in range(size)]


#: Keeps the stores of NCCL's members alive: they live in this process.
_stores: list[Store] = []


def make_nccl(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    """Connect ``size`` members, each in a process of its own with a GPU of its own."""
    store, port = host_store("127.0.0.1", seconds=20)
    _stores.append(store)
    recipe = functools.partial(connect_nccl, size=size, port=port, groups=groups, edges=edges)
    return start_members(recipe, size)


def make_ipc(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    """Connect ``size`` members, each in a process of its own, the first two on one GPU."""
    store, port = host_store("127.0.0.1", seconds=20)
    _stores.append(store)
    recipe = functools.partial(connect_ipc, size=size, port=port, groups=groups, edges=edges)
    return start_members(recipe, size)


def make_ported(size: int, groups: Groups, edges: Edges) -> Sequence[Communicator]:
    """Connect ``size`` members, each in a process of its own, the third on the second one's GPU."""
    store, port = host_store("127.0.0.1", seconds=20)
    _stores.append(store)
    recipe = functools.partial(connect_over_ports, size=size, port=port, groups=groups, edges=edges)
    return start_members(recipe, size)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_three_gpus = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")

makers = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_fake, id="fake"),
        pytest.param(make_gloo, id="gloo"),
        pytest.param(make_nccl, id="nccl", marks=[pytest.mark.gpu, needs_gpus]),
        pytest.param(make_ipc, id="ipc", marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param(make_ported_fake, id="ported-fake"),
        pytest.param(make_ported, id="ported", marks=[pytest.mark.gpu, needs_gpus]),
    ],
)
makers_of_three = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_fake, id="fake"),
        pytest.param(make_gloo, id="gloo"),
        pytest.param(make_nccl, id="nccl", marks=[pytest.mark.gpu, needs_three_gpus]),
        pytest.param(make_ipc, id="ipc", marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param(make_ported_fake, id="ported-fake"),
        pytest.param(make_ported, id="ported", marks=[pytest.mark.gpu, needs_gpus]),
    ],
)


@makers
def test_moves_between_two_members(make: conformance.Make) -> None:
    conformance.check_communicator(make)


@makers_of_three
def test_moves_among_three_members(make: conformance.Make) -> None:
    conformance.check_three_members(make)


@makers
def test_failures_are_typed_and_end(make: conformance.Make) -> None:
    conformance.check_failures(make)


def test_fake_abort_wakes_a_blocked_receive() -> None:
    members = make_fake(2, (), ())
    started = threading.Event()

    def receive(member: Communicator) -> None:
        move = member.start(torch.zeros(8, dtype=torch.uint8), sender=0, receivers=(1,), deadline=Deadline(20))
        started.set()
        move.finish(Deadline(20))

    (future,) = conformance.in_threads([members[1]], receive)
    assert started.wait(5)
    members[1].abort()
    with pytest.raises(CommunicatorError, match="abort"):
        future.result(5)


@pytest.mark.gpu
@needs_gpus
def test_nccl_abort_frees_a_blocked_receive_at_once() -> None:
    members = make_nccl(2, (), ((0, 1),))
    started = threading.Event()

    def receive(member: Communicator) -> None:
        deadline = Deadline(60)
        move = member.start(torch.zeros(1 << 16, dtype=torch.uint8), sender=0, receivers=(1,), deadline=deadline)
        started.set()
        move.finish(deadline)

    (future,) = conformance.in_threads([members[1]], receive)
    assert started.wait(20)
    members[1].abort()
    with pytest.raises(CommunicatorError, match="abort"):
        future.result(10)

    members[0].abort()


def test_the_fake_notices_a_message_of_another_size() -> None:
    members = make_fake(2, (), ())

    def part(member: Communicator) -> None:
        size = 8 if member.rank == 0 else 9
        move = member.start(torch.zeros(size, dtype=torch.uint8), sender=0, receivers=(1,), deadline=Deadline(5))
        move.finish(Deadline(5))

    sender, receiver = conformance.in_threads(members, part)
    # Each of the two knows that the other got nothing.
    with pytest.raises(CommunicatorError, match="was aborted"):
        sender.result(5)

    with pytest.raises(CommunicatorError, match="expected 9 bytes from actor 0, which sent 8"):
        receiver.result(5)


def test_the_fake_reads_what_is_sent_as_it_is_taken() -> None:
    sender, receiver = make_fake(2, (), ())
    deadline = Deadline(5)
    sent, got = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    sending = sender.start(sent, sender=0, receivers=(1,), deadline=deadline)
    taking = receiver.start(got, sender=0, receivers=(1,), deadline=deadline)
    with pytest.raises(MoveTimeout, match=r"actors \[1\] had not taken what actor 0 sent"):
        sending.finish(Deadline(0.01))

    # Too early: the move was not finished.
    sent.fill_(7)
    taking.finish(deadline)
    sending.finish(deadline)
    assert got.tolist() == [7] * 8


def test_a_stranger_to_a_move_is_refused() -> None:
    members = make_fake(3, (), ())
    with pytest.raises(CommunicatorError, match="actor 2 takes no part"):
        members[2].start(torch.zeros(8, dtype=torch.uint8), sender=0, receivers=(1,), deadline=Deadline(1))


def test_a_store_is_reachable_on_its_own_address_only() -> None:
    store, port = host_store("127.0.0.1", seconds=5)
    assert store.host == "127.0.0.1"
    hexadecimal = f"{port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as table:
        listening = [
            line.split()[1] for line in table if line.split()[3] == "0A" and line.split()[1].endswith(hexadecimal)
        ]

    assert listening == [f"0100007F:{hexadecimal}"]


def test_gloo_members_that_never_come_are_given_up_at_the_deadline() -> None:
    store, _ = host_store("127.0.0.1", seconds=1)
    sealed = SealedStore(store, secret=bytes(32))
    rendezvous = Rendezvous(
        sealed, key="test", host="127.0.0.1", rank=0, size=2, groups=(), edges=(), deadline=Deadline(0.5)
    )
    with pytest.raises(MoveTimeout, match="connecting gloo"):
        GlooCommunicator(rendezvous)
