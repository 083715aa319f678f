"""Seconds by phase."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from wavecast.runtime.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; its one element is the time."""
    now = [100.0]
    monkeypatch.setattr("wavecast.runtime.stopwatch.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_each_phase_has_its_seconds_and_the_total_goes_on(clock: list[float]) -> None:
    watch = Stopwatch()
    clock[0] += 1
    with watch.measure("plan"):
        clock[0] += 2

    clock[0] += 4
    with watch.measure("transfer"):
        clock[0] += 8

    assert (watch.seconds("plan"), watch.seconds("transfer"), watch.seconds("verify")) == (2, 8, 0)
    assert watch.total == 15
    clock[0] += 16
    assert watch.total == 31


def test_a_phase_measured_again_adds_up(clock: list[float]) -> None:
    watch = Stopwatch()
    for seconds in (1, 2):
        with watch.measure("plan"):
            clock[0] += seconds

    assert watch.seconds("plan") == 3


def test_a_phase_that_raises_is_counted_and_named(clock: list[float]) -> None:
    """The phase a sync failed in is what its error says."""
    watch = Stopwatch()
    assert watch.phase == ""
    with watch.measure("plan"):
        assert watch.phase == "plan"

    def fail() -> None:
        clock[0] += 3
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), watch.measure("connect"):
        fail()

    assert watch.phase == "connect"
    assert watch.seconds("connect") == 3
