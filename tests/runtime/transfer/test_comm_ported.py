"""Moves between GPUs that several actors share: who takes part in which leg, and that the bytes arrive."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.transfer.conformance import SECONDS, in_threads, pattern, results
from wavecast.runtime.transfer.comm import PASSED, Communicator, CommunicatorError, Deadline, MoveTimeout
from wavecast.runtime.transfer.comm_fake import FakeFabric
from wavecast.runtime.transfer.comm_ported import Legs, PortedCommunicator, far_members, plan_legs

CPU = torch.device("cpu")
#: Two trainers, and an engine beside each.
PAIRS = (0, 1, 0, 1)


def connected(owners: Sequence[int]) -> tuple[list[PortedCommunicator], FakeFabric, FakeFabric]:
    """Return a communicator an actor, and what connects neighbours and owners."""
    ports = sorted(set(owners))
    near, far = FakeFabric(len(owners)), FakeFabric(len(ports))
    members = [
        PortedCommunicator(
            rank,
            owners=owners,
            near=near.communicator(rank),
            far=far.communicator(ports.index(rank)) if rank in ports else None,
        )
        for rank in range(len(owners))
    ]
    return members, near, far


def parties(owners: Sequence[int], sender: int, receivers: Sequence[int]) -> list[int]:
    """The ends of a move, and the owners it goes through: an oracle of its own."""
    ends = {sender, *receivers}
    crosses = any(owners[receiver] != owners[sender] for receiver in receivers)
    homes = {owners[each] for each in receivers if owners[each] != owners[sender]}
    return sorted(ends | homes | ({owners[sender]} if crosses else set()))


def move_all(owners: Sequence[int], moves: Sequence[tuple[int, tuple[int, ...]]], nbytes: int = 64) -> None:
    """Make ``moves`` in order, every member those it takes part in, two at a time as staging does; check each end."""
    members, _, _ = connected(owners)
    involved = [parties(owners, sender, receivers) for sender, receivers in moves]

    def part(member: Communicator) -> dict[int, torch.Tensor]:
        deadline = Deadline(SECONDS)
        found: dict[int, torch.Tensor] = {}
        under_way = []
        for number, (sender, receivers) in enumerate(moves):
            if member.rank not in involved[number]:
                continue

            while len(under_way) > 1:
                under_way.pop(0).finish(deadline)

            sends = member.rank == sender
            buffer = pattern(nbytes, number, CPU) if sends else torch.zeros(nbytes, dtype=torch.uint8)
            under_way.append(member.start(buffer, sender=sender, receivers=receivers, deadline=deadline))
            if member.rank in receivers:
                found[number] = buffer

        for started in under_way:
            started.finish(deadline)

        return found

    got = results(members, part)
    for number, (_, receivers) in enumerate(moves):
        for receiver in receivers:
            arrived = got[receiver]
            assert isinstance(arrived, dict)
            assert torch.equal(arrived[number], pattern(nbytes, number, CPU))


@pytest.mark.parametrize(
    ("owners", "sender", "receivers", "legs"),
    [
        ((0, 1), 0, (1,), Legs((), 0, (1,), {1: ()})),
        (PAIRS, 0, (2,), Legs((2,), 0, (), {})),
        (PAIRS, 0, (3,), Legs((), 0, (1,), {1: (3,)})),
        (PAIRS, 2, (3,), Legs((0,), 0, (1,), {1: (3,)})),
        (PAIRS, 2, (0, 1), Legs((0,), 0, (1,), {1: ()})),
        (PAIRS, 0, (1, 2, 3), Legs((2,), 0, (1,), {1: (3,)})),
        ((0, 1, 1, 1, 4), 0, (2, 3, 4), Legs((), 0, (1, 4), {1: (2, 3), 4: ()})),
    ],
)
def test_legs_of_a_move(owners: tuple[int, ...], sender: int, receivers: tuple[int, ...], legs: Legs) -> None:
    assert plan_legs(owners, sender, receivers) == legs


def test_what_owners_are_among_themselves() -> None:
    owners = (0, 1, 2, 0, 1, 2)
    groups = ((0, 3, 4), (0, 4, 5), (0, 3), (1, 2, 4, 5))
    ports, wide, edges = far_members(owners, groups, ((0, 3), (0, 4), (5, 0), (1, 2)))
    assert ports == (0, 1, 2)
    # All on one GPU is no matter of theirs, and two are an edge, whichever sends.
    assert wide == ((0, 1, 2),)
    assert edges == ((0, 1), (2, 0), (1, 2), (1, 0), (2, 1))
    # Ports are numbered by place: an owner's number may be any.
    assert far_members((4, 1, 4, 1, 4), (), ((0, 1),)) == ((1, 4), (), ((1, 0),))


def test_what_stays_on_a_gpu_takes_no_port() -> None:
    members, near, far = connected(PAIRS)
    deadline = Deadline(SECONDS)
    sent, got = pattern(16, 1, CPU), torch.zeros(16, dtype=torch.uint8)
    sending = members[0].start(sent, sender=0, receivers=(2,), deadline=deadline)
    members[2].start(got, sender=0, receivers=(2,), deadline=deadline).finish(deadline)
    sending.finish(deadline)
    assert torch.equal(sent, got)
    assert near.log == [(0, 2, 16)]
    assert far.log == []


def test_two_engines_of_one_gpu_are_sent_to_once() -> None:
    owners = (0, 1, 1, 1)
    members, near, far = connected(owners)

    def part(member: Communicator) -> None:
        deadline = Deadline(SECONDS)
        buffer = pattern(32, 5 if member.rank == 0 else 6, CPU)
        member.start(buffer, sender=0, receivers=(2, 3), deadline=deadline).finish(deadline)
        assert torch.equal(buffer, pattern(32, 5, CPU))

    results(members, part)
    assert far.log == [(0, 1, 32)]
    assert Counter(near.log) == {(1, 2, 32): 1, (1, 3, 32): 1}


@pytest.mark.parametrize("owners", [PAIRS, (0, 0, 2, 2), (0, 1, 2, 1, 0, 2), (3, 2, 2, 3)])
def test_every_one_to_one_move(owners: tuple[int, ...]) -> None:
    ranks = range(len(owners))
    move_all(owners, [(sender, (receiver,)) for sender in ranks for receiver in ranks if sender != receiver])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_moves_in_one_order_arrive(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 6))
    ranks = list(range(size))
    device = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    owner_of = {each: data.draw(st.sampled_from([r for r in ranks if device[r] == each])) for each in set(device)}
    owners = tuple(owner_of[each] for each in device)
    moves = []
    for _ in range(data.draw(st.integers(1, 8))):
        sender = data.draw(st.sampled_from(ranks))
        others = [rank for rank in ranks if rank != sender]
        moves.append((sender, tuple(data.draw(st.lists(st.sampled_from(others), min_size=1, unique=True)))))

    move_all(owners, moves)


@pytest.mark.parametrize(
    ("owners", "moves"),
    [
        # Actor 0 sends nothing through actor 3 before it has what came before, which that has yet to pass on.
        ((3, 1, 3, 3), [(3, (1, 0)), (3, (1, 0)), (1, (3, 0, 2)), (2, (0,)), (0, (1,))]),
        # Or before actor 3 has taken what it was sent itself.
        ((3, 3, 2, 3), [(0, (3,)), (0, (1,)), (0, (1,)), (0, (1, 2, 3))]),
    ],
)
def test_who_waits_for_what_is_to_go_through_has_done_its_part_before(
    owners: tuple[int, ...], moves: list[tuple[int, tuple[int, ...]]]
) -> None:
    move_all(owners, moves)


def test_an_actor_that_neither_ends_nor_owns_is_refused() -> None:
    members, _, _ = connected((0, 1, 2, 0, 1))
    for stranger in (2, 3):
        with pytest.raises(CommunicatorError, match=f"actor {stranger} takes no part in a move from 0 to \\(4,\\)"):
            members[stranger].start(pattern(8, 0, CPU), sender=0, receivers=(4,), deadline=Deadline(1))


def test_an_owner_that_does_not_come_is_not_waited_for_beyond_the_deadline() -> None:
    members, _, _ = connected(PAIRS)
    deadline = Deadline(0.2)
    started = members[3].start(pattern(8, 0, CPU), sender=0, receivers=(3,), deadline=deadline)
    with pytest.raises(MoveTimeout):
        started.finish(deadline)


def test_abort_wakes_whoever_waits_near_or_far() -> None:
    members, _, _ = connected(PAIRS)
    waiting = threading.Barrier(3)

    def receive(member: Communicator) -> None:
        deadline = Deadline(SECONDS)
        started = member.start(pattern(8, 0, CPU), sender=0, receivers=(3,), deadline=deadline)
        waiting.wait(SECONDS)
        started.finish(deadline)

    owner, engine = in_threads([members[1], members[3]], receive)
    waiting.wait(SECONDS)
    members[1].abort()
    for future in (owner, engine):
        with pytest.raises(CommunicatorError, match="abort"):
            future.result(SECONDS)


def test_fences_and_closing_are_those_of_both_transports() -> None:
    members, near, far = connected(PAIRS)
    assert members[2].fence() is PASSED
    members[0].close()
    members[0].close()
    for fabric in (near, far):
        with pytest.raises(CommunicatorError):
            fabric.communicator(0).start(pattern(8, 0, CPU), sender=0, receivers=(1,), deadline=Deadline(1))
