"""What actors tell a driver ahead of their answers, and what becomes of the answers."""

from __future__ import annotations

import asyncio
import pickle
import secrets
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.local_actors import LocalActor, local
from tests.runtime.test_task_cancellation import Stage, group_of, hold
from wavecast.runtime.errors import SyncTimeout
from wavecast.runtime.notices import Notices, Told, listening
from wavecast.runtime.transfer import slip as slips
from wavecast.runtime.transfer.messages import Finished, RunStep, StepDone
from wavecast.runtime.transfer.slip import MOST_NBYTES, TOKEN_NBYTES, Slip, read_notice

__all__ = ("local",)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="the sockets' names are Linux's"),
]

REPLY = StepDone(Finished((-(2**63), 2**64 - 1, 0), 1 << 40, 0.25), closed=True)
sums = st.lists(st.integers(-(2**63), 2**64 - 1), max_size=40).map(tuple)
finished = st.builds(Finished, sums, st.integers(0, 2**63 - 1), st.floats(0, 1e6))
replies = st.builds(StepDone, st.none() | finished, st.booleans())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def heard(told: Told) -> StepDone | None:
    """Wait for what is told from now on."""
    found: asyncio.Future[StepDone | None] = asyncio.get_running_loop().create_future()
    told.then(found.set_result)
    return await found


def throw(address: bytes, *datagrams: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        for datagram in datagrams:
            out.sendto(datagram, address)


@given(reply=replies, token=st.binary(min_size=TOKEN_NBYTES, max_size=TOKEN_NBYTES))
def test_a_notice_is_read_as_what_was_written(reply: StepDone, token: bytes) -> None:
    assert read_notice(slips._write(token, reply)) == reply


@given(st.binary(max_size=200))
def test_any_bytes_are_a_notice_or_none(noise: bytes) -> None:
    found = read_notice(noise)
    assert found is None or read_notice(slips._write(noise[:TOKEN_NBYTES], found)) is not None


@given(reply=replies, cut=st.integers(1, 60))
def test_a_notice_that_is_cut_or_too_long_is_none(reply: StepDone, cut: int) -> None:
    notice = slips._write(bytes(TOKEN_NBYTES), reply)
    assert read_notice(notice[:-cut]) is None
    assert read_notice(notice + bytes(cut)) is None


async def test_who_has_a_slip_is_heard_once() -> None:
    with listening() as notices:
        assert notices is not None
        slip, told = notices.issue()
        other, unheard = notices.issue()
        slip.send(REPLY)
        slip.send(StepDone())
        assert await heard(told) == REPLY
        await asyncio.sleep(0)
        assert not unheard.done
        other.send(StepDone())
        assert await heard(unheard) == StepDone()

    # Nobody listens any more, which is nothing to whoever sends.
    slip.send(REPLY)


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


async def test_a_stranger_is_not_heard_and_nothing_of_his_is_unpickled(tmp_path: Path) -> None:
    with listening() as notices:
        assert notices is not None
        slip, told = notices.issue()
        bomb = pickle.dumps(Bomb(tmp_path / "mark"))
        forged = slips._write(secrets.token_bytes(TOKEN_NBYTES), StepDone(closed=True))
        throw(slip.address, bomb, b"", forged, slip.token, slip.token + bomb, bytes(MOST_NBYTES + 100))
        slip.send(REPLY)
        assert await heard(told) == REPLY
        assert not (tmp_path / "mark").exists()


async def test_what_comes_without_a_token_is_not_read_any_further(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def reading(notice: bytes) -> StepDone | None:
        read.append(notice[:TOKEN_NBYTES])
        return read_notice(notice)

    monkeypatch.setattr("wavecast.runtime.notices.read_notice", reading)
    with listening() as notices:
        assert notices is not None
        slip, told = notices.issue()
        sums = tuple(range(1000))
        throw(slip.address, slips._write(bytes(TOKEN_NBYTES), StepDone(Finished(sums, 0, 0.0))), b"", b"short")
        # Known, but no notice: the real one may still come.
        throw(slip.address, slip.token)
        slip.send(REPLY)
        slip.send(REPLY)
        assert await heard(told) == REPLY
        notices.read()

    assert read == [slip.token, slip.token]


async def test_a_flood_holds_up_the_loop_for_some_datagrams_at_a_time() -> None:
    with listening() as notices:
        assert notices is not None
        slip, told = notices.issue()
        turns = 0
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            sent = 0
            while sent < 200:
                try:
                    out.sendto(b"noise", slip.address)
                    sent += 1
                except BlockingIOError:
                    notices.read()
                    turns += 1

        notices.read()
        slip.send(REPLY)
        assert await heard(told) == REPLY
        # The system itself takes in no more than a queue of them.
        assert turns >= 1


async def test_what_has_no_room_in_a_datagram_is_left_to_the_answer() -> None:
    with listening() as notices:
        assert notices is not None
        slip, told = notices.issue()
        slip.send(StepDone(Finished((1,) * 4000, 0, 0.0)))
        slip.send(REPLY)
        assert await heard(told) == REPLY


async def test_where_no_socket_can_be_had_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*options: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        with listening() as notices:
            assert notices is None

        Slip(b"\0nobody", bytes(TOKEN_NBYTES)).send(REPLY)

    def watch_nothing(*options: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", watch_nothing)
    with listening() as notices:
        assert notices is None


@pytest.mark.usefixtures("local")
async def test_a_sync_returns_on_what_is_told_although_no_step_is_answered() -> None:
    stage = Stage()
    # A step at a time: the system's queue has room for ten.
    async with group_of(stage, in_flight=1, lookahead=0) as group:
        gates = [hold_answers(actor) for actor in stage.actors]
        assert (await group.sync(1)).version == 1
        assert stage.values(0) == stage.values(1) == {1.0}
        # And the next one, behind calls that have not been answered.
        stage.fill(2.0)
        assert (await group.sync()).version == 2
        assert stage.values(0) == stage.values(1) == {2.0}
        for gate in gates:
            gate.set()


@pytest.mark.usefixtures("local")
async def test_a_sync_of_which_nothing_can_be_told_returns_on_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[StepDone] = []
    monkeypatch.setattr(Slip, "send", lambda self, reply: sent.append(reply))
    stage = Stage()
    async with group_of(stage) as group:
        assert (await group.sync(1)).version == 1
        assert stage.values(0) == stage.values(1) == {1.0}

    assert sent


@pytest.mark.usefixtures("local")
async def test_a_step_that_fails_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    told: list[StepDone] = []
    monkeypatch.setattr(Slip, "send", lambda self, reply: told.append(reply))
    async with group_of(stage) as group:
        # The next one comes to its steps at once, long before its deadline.
        await group.sync()
        told.clear()
        came, go = hold(stage.trainers[0], RunStep)
        sync = asyncio.ensure_future(group.sync(deadline=1.0))
        await asyncio.wait((sync, asyncio.ensure_future(came.wait())), return_when=asyncio.FIRST_COMPLETED)
        assert came.is_set()
        with pytest.raises(SyncTimeout):
            await sync

        assert not any(reply.closed for reply in told)
        go.set()


def hold_answers(actor: LocalActor) -> asyncio.Event:
    """Keep back the answers to steps, once they have been given."""
    go = asyncio.Event()
    serve = actor._serve

    async def late(request: object, *rest: object) -> bytes:
        answer = await serve(request, *rest)  # type: ignore[arg-type]
        if isinstance(request, RunStep):
            await go.wait()

        return answer

    actor._serve = late  # type: ignore[method-assign, assignment]
    return go


def test_the_driver_reads_no_message_of_the_host_s_from_its_socket() -> None:
    for module in (Notices, Slip):
        source = Path(sys.modules[module.__module__].__file__ or "").read_text()
        assert "pickle" not in source
        assert "decode(" not in source
