"""The collector stands still in a block, for as long as any is open, and is afterwards as it was."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from wavecast.runtime import collector
from wavecast.runtime.collector import collect_what_is_due, collector_paused


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


def test_what_was_put_off_is_done_once_and_only_after_much_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.enable()
    monkeypatch.setattr(collector, "_MANY", 5000)
    monkeypatch.setattr(collector, "_made", 0)
    kept: list[list[int]] = []

    def make() -> None:
        with collector_paused():
            kept.extend([number] for number in range(3000))

    make()
    assert not collect_what_is_due()
    make()
    before = gc.get_stats()[2]["collections"]
    assert collect_what_is_due()
    assert gc.get_stats()[2]["collections"] == before + 1
    assert not collect_what_is_due()
    make()
    assert not collect_what_is_due()


def test_a_collector_that_is_off_is_not_called_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.disable()
    monkeypatch.setattr(collector, "_made", 1 << 30)
    before = gc.get_stats()[2]["collections"]
    assert not collect_what_is_due()
    assert gc.get_stats()[2]["collections"] == before
