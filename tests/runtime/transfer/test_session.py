"""What a session keeps while it is closed, or its connection given up, in the middle of being made."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from wavecast.runtime.errors import SyncAborted
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.transfer.comm import Communicator, Deadline
from wavecast.runtime.transfer.comm_fake import FakeCommunicator, FakeFabric
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import Connect, Connected, RunId
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.session import Session

SECONDS = 5.0
NAME = RunId("group", 1)
REQUEST = Connect(NAME, "connection", "gloo", "127.0.0.1", 0, 0, 1, (), (), SECONDS, bytes(32))


class Noting(FakeCommunicator):
    """:ivar ends: how it was ended, each time"""

    def __init__(self) -> None:
        super().__init__(FakeFabric(1), 0)
        self.ends: list[str] = []

    def abort(self) -> None:
        self.ends.append("abort")
        super().abort()

    def close(self) -> None:
        self.ends.append("close")
        super().close()


class Slow(Session):
    """A session in a run, whose peers are met when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting, self.met = threading.Event(), threading.Event()
        self.made = Noting()
        self.run = Run(NAME, 0, Memory([Shard("w", torch.zeros(8), (0,), (8,))]))

    def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        self.meeting.set()
        assert self.met.wait(SECONDS)
        return self.made


@contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def let_lanes_end(session: Session) -> None:
    for lane in (session.lane, session._waits):
        lane._thread.join(SECONDS)
        assert not lane._thread.is_alive()


@pytest.mark.parametrize("end", ["close", "give_up"])
def test_a_connection_that_comes_too_late_is_aborted_and_kept_by_nobody(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    session = Slow()
    give_up = session.equipment.give_up_connection

    def given_up() -> Communicator | None:
        found = give_up()
        session.met.set()
        return found

    monkeypatch.setattr(session.equipment, "give_up_connection", given_up)
    answer = session.connect(REQUEST, "127.0.0.1")
    assert session.meeting.wait(SECONDS)
    if end == "close":
        session.close()
    else:
        session.give_up(NAME, "the test had enough")

    session.met.set()
    with pytest.raises(SyncAborted, match="the connection was given up while it was made"):
        answer.result(SECONDS)

    assert session.made.ends == ["abort"]
    assert session.equipment.staging is None
    session.close()


def test_a_connection_that_was_there_is_closed() -> None:
    session = Slow()
    session.met.set()
    assert isinstance(session.connect(REQUEST, "127.0.0.1").result(SECONDS), Connected)
    session.close()
    assert session.made.ends == ["close"]


def test_closing_waits_for_a_connection_that_is_being_taken_on(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Slow()
    session.met.set()
    taking_on, go_on = threading.Event(), threading.Event()

    def allocate() -> None:
        taking_on.set()
        assert go_on.wait(SECONDS)

    monkeypatch.setattr(session.equipment, "_allocate", allocate)
    answer = session.connect(REQUEST, "127.0.0.1")
    assert taking_on.wait(SECONDS)
    closing = threading.Thread(target=session.close)
    closing.start()
    # As long as it is being taken on, which is until the test goes on.
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert isinstance(answer.result(SECONDS), Connected)
    assert session.made.ends == ["close"]


def test_a_closed_session_goes_without_the_garbage_collector() -> None:
    with no_collector():
        session = Slow()
        session.met.set()
        assert isinstance(session.connect(REQUEST, "127.0.0.1").result(SECONDS), Connected)
        session.close()
        let_lanes_end(session)
        kept = [weakref.ref(each) for each in (session, session.announcer, session.equipment, session.made)]
        del session
        assert [found() for found in kept] == [None] * 4
