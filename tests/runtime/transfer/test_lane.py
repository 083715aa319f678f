"""One thread, calls in order, and nothing that keeps a process."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import CancelledError, Future

import pytest

from wavecast.runtime.transfer.lane import Lane

SECONDS = 10.0


def test_calls_run_in_order_on_one_daemon_thread() -> None:
    lane = Lane("lane-test")
    seen: list[int] = []

    def call(number: int) -> threading.Thread:
        seen.append(number)
        return threading.current_thread()

    futures = [lane.submit(lambda number=number: call(number)) for number in range(50)]  # type: ignore[misc]
    threads = {future.result(SECONDS) for future in futures}
    assert seen == list(range(50))
    (thread,) = threads
    assert thread.name == "lane-test"
    assert thread.daemon
    lane.close()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_a_call_that_raises_is_its_own_affair() -> None:
    lane = Lane("lane-test")

    def fail() -> None:
        raise KeyboardInterrupt("even this")

    failed, after = lane.submit(fail), lane.submit(lambda: 7)
    with pytest.raises(KeyboardInterrupt):
        failed.result(SECONDS)

    assert after.result(SECONDS) == 7
    lane.close()


def test_a_cancelled_call_does_not_run() -> None:
    lane = Lane("lane-test")
    gate, ran = threading.Event(), []
    first = lane.submit(lambda: gate.wait(SECONDS))
    second: Future[None] = lane.submit(lambda: ran.append(1))
    assert second.cancel()
    gate.set()
    assert first.result(SECONDS)
    assert lane.submit(lambda: 3).result(SECONDS) == 3
    with pytest.raises(CancelledError):
        second.result(0)

    assert ran == []
    lane.close()


def test_a_closed_lane_works_off_what_it_was_given() -> None:
    lane = Lane("lane-test")
    gate = threading.Event()
    lane.submit(lambda: gate.wait(SECONDS))
    last = lane.submit(lambda: 5)
    lane.close()
    gate.set()
    assert last.result(SECONDS) == 5


def test_a_call_given_to_a_closed_lane_fails_instead_of_waiting_for_ever() -> None:
    lane = Lane("lane-test")
    lane.close()
    lane.close()
    with pytest.raises(RuntimeError, match="has ended"):
        lane.submit(lambda: 5).result(SECONDS)


def test_a_lane_keeps_nothing_of_a_call_that_is_over() -> None:
    """What a call held, a model's memory say, must not live until the next call."""

    class Held:
        pass

    lane = Lane("lane-test")
    held = Held()
    seen = weakref.ref(held)
    lane.submit(lambda held=held: None).result(SECONDS)  # type: ignore[misc]
    del held
    barrier = lane.submit(lambda: None)
    barrier.result(SECONDS)
    gc.collect()
    assert seen() is None
    lane.close()
