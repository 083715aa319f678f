"""What every communicator must do. Each implementation's own test file calls :func:`check_communicator`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch

from wavecast.runtime.transfer.comm import Communicator, CommunicatorError, Deadline, MoveTimeout

Part = Callable[[Communicator], object]
#: Makes ``size`` connected communicators, given the groups that broadcast and the edges in use.
Make = Callable[[int, tuple[tuple[int, ...], ...], tuple[tuple[int, int], ...]], Sequence[Communicator]]

SECONDS = 20.0


def in_threads(communicators: Sequence[Communicator], part: Part) -> list[Future[object]]:
    """Run ``part`` once a communicator, each on a thread of its own, and return their futures."""
    futures: list[Future[object]] = [Future() for _ in communicators]

    def run(communicator: Communicator, future: Future[object]) -> None:
        try:
            future.set_result(part(communicator))
        except BaseException as error:
            future.set_exception(error)

    for communicator, future in zip(communicators, futures, strict=True):
        threading.Thread(target=run, args=(communicator, future), daemon=True).start()

    return futures


def results(communicators: Sequence[Communicator], part: Part) -> list[object]:
    """Return what each of them made of ``part``; of several failures the one that is no mere waiting for the others."""
    futures = in_threads(communicators, part)
    failures = [error for future in futures if (error := future.exception(2 * SECONDS)) is not None]
    if failures:
        raise min(failures, key=lambda error: isinstance(error, MoveTimeout))

    return [future.result() for future in futures]


def pattern(nbytes: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).to(device)


def check_communicator(make: Make) -> None:
    """Run the whole suite. ``make`` is called once a check, for up to three members."""
    for check in (
        check_one_to_one,
        check_several_at_once_on_one_edge,
        check_both_directions_in_order,
        check_sizes,
    ):
        check(make)


def check_three_members(make: Make) -> None:
    for check in (check_broadcast, check_disjoint_members_need_no_order):
        check(make)


def check_failures(make: Make) -> None:
    for check in (
        check_deadline_ends_a_receive,
        check_abort_fails_what_comes_after,
        check_close_may_be_called_again,
    ):
        check(make)


def _move(communicator: Communicator, nbytes: int, sender: int, receivers: tuple[int, ...], seed: int) -> torch.Tensor:
    deadline = Deadline(SECONDS)
    sends = communicator.rank == sender
    buffer = (
        pattern(nbytes, seed, communicator.device)
        if sends
        else torch.zeros_like(pattern(nbytes, 0, communicator.device))
    )
    move = communicator.start(buffer, sender=sender, receivers=receivers, deadline=deadline)
    move.finish(deadline)
    communicator.fence().wait(deadline)
    return buffer


def check_one_to_one(make: Make) -> None:
    members = make(2, (), ((0, 1),))
    sent, got = results(members, lambda member: _move(member, 4096, 0, (1,), seed=3))
    assert torch.equal(torch.as_tensor(sent).cpu(), torch.as_tensor(got).cpu())
    _close(members)


def check_sizes(make: Make) -> None:
    members = make(2, (), ((0, 1),))
    for nbytes in (1, 17, 1 << 20):
        sent, got = results(members, lambda member, n=nbytes: _move(member, n, 0, (1,), seed=n))  # type: ignore[misc]
        assert torch.equal(torch.as_tensor(sent).cpu(), torch.as_tensor(got).cpu())

    _close(members)


def check_several_at_once_on_one_edge(make: Make) -> None:
    members = make(2, (), ((0, 1),))

    def part(member: Communicator) -> list[torch.Tensor]:
        deadline = Deadline(SECONDS)
        buffers = [
            pattern(2048, seed, member.device) if member.rank == 0 else pattern(2048, 99, member.device)
            for seed in range(3)
        ]
        moves = [member.start(buffer, sender=0, receivers=(1,), deadline=deadline) for buffer in buffers]
        for move in moves:
            move.finish(deadline)

        member.fence().wait(deadline)
        return buffers

    sent, got = results(members, part)
    assert isinstance(sent, list)
    assert isinstance(got, list)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(sent, got, strict=True))
    _close(members)


def check_both_directions_in_order(make: Make) -> None:
    members = make(2, (), ((0, 1), (1, 0)))

    def part(member: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        return _move(member, 512, 0, (1,), seed=1), _move(member, 512, 1, (0,), seed=2)

    (forth0, back0), (forth1, back1) = results(members, part)  # type: ignore[misc]
    assert torch.equal(forth0.cpu(), forth1.cpu())
    assert torch.equal(back0.cpu(), back1.cpu())
    assert not torch.equal(forth0.cpu(), back0.cpu())
    _close(members)


def check_broadcast(make: Make) -> None:
    members = make(3, ((0, 1, 2),), ())
    for sender in range(3):
        receivers = tuple(rank for rank in range(3) if rank != sender)
        buffers = results(members, lambda member, s=sender, r=receivers: _move(member, 4096, s, r, seed=s))  # type: ignore[misc]
        wanted = pattern(4096, sender, torch.device("cpu"))
        assert all(torch.equal(torch.as_tensor(buffer).cpu(), wanted) for buffer in buffers)

    _close(members)


def check_disjoint_members_need_no_order(make: Make) -> None:
    """Actor 2 takes no part in the moves between 0 and 1, and is not waited for."""
    members = make(3, (), ((0, 1),))
    sent, got = results(members[:2], lambda member: _move(member, 256, 0, (1,), seed=5))
    assert torch.equal(torch.as_tensor(sent).cpu(), torch.as_tensor(got).cpu())
    _close(members)


def check_deadline_ends_a_receive(make: Make) -> None:
    members = make(2, (), ((0, 1),))
    receiver = members[1]
    buffer = pattern(64, 0, receiver.device)
    deadline = Deadline(0.2)

    def receive(member: Communicator) -> None:
        member.start(buffer, sender=0, receivers=(1,), deadline=deadline).finish(deadline)
        member.fence().wait(deadline)

    (future,) = in_threads([receiver], receive)
    with pytest.raises(MoveTimeout):
        future.result(SECONDS)

    for member in members:
        member.abort()


def check_abort_fails_what_comes_after(make: Make) -> None:
    members = make(2, (), ((0, 1),))
    for member in members:
        member.abort()
        member.abort()

    buffer = pattern(64, 0, members[0].device)
    for member in members:
        with pytest.raises(CommunicatorError, match="abort"):
            member.start(buffer, sender=0, receivers=(1,), deadline=Deadline(1.0)).finish(Deadline(1.0))


def check_close_may_be_called_again(make: Make) -> None:
    members = make(2, (), ((0, 1),))
    _close(members)
    _close(members)
    with pytest.raises(CommunicatorError):
        members[0].start(pattern(64, 0, members[0].device), sender=0, receivers=(1,), deadline=Deadline(1.0)).finish(
            Deadline(1.0)
        )


def _close(members: Sequence[Communicator]) -> None:
    for future in in_threads(members, lambda member: member.close()):
        future.result(SECONDS)
