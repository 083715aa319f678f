"""The collector stands still in a block, for as long as any is open, and is afterwards as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from wavecast.runtime.collector import collector_paused


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


def test_nothing_is_collected_in_a_block_and_collecting_goes_on_after_it() -> None:
    gc.enable()
    with collector_paused():
        before = gc.get_stats()
        kept = [[number] for number in range(10 * gc.get_threshold()[0])]
        assert gc.get_stats() == before

    assert gc.isenabled()
    assert len(kept) == 10 * gc.get_threshold()[0]


def test_blocks_nest_and_the_last_one_out_turns_it_on_again() -> None:
    gc.enable()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with collector_paused():
            inside.set()
            leave.wait(20)

    other = threading.Thread(target=hold)
    with collector_paused():
        other.start()
        assert inside.wait(20)

    assert not gc.isenabled()
    leave.set()
    other.join()
    assert gc.isenabled()


def test_an_error_turns_it_on_again() -> None:
    gc.enable()
    with pytest.raises(ValueError, match="the test's"), collector_paused():
        raise ValueError("the test's")

    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()

    assert not gc.isenabled()
