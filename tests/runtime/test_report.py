"""Reports are values."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from wavecast.runtime.report import PhaseSeconds, SyncReport, Torn
from wavecast.scheduler import RunReport


def report(*, nbytes: int = 3_000_000_000, transfer: float = 1.5) -> SyncReport:
    return SyncReport(
        version=7,
        dry_run=False,
        nbytes=nbytes,
        tensors=3,
        partial=False,
        routes=4,
        tasks=2,
        waves=2,
        bound_waves=2,
        makespan_bytes=nbytes,
        bound_bytes=nbytes,
        gap=1.0,
        strategy="first_fit",
        ports="half",
        transport="gloo",
        pulled_nbytes=0,
        transport_reasons=(),
        device="cpu",
        staging_bytes=64,
        communicator_bytes=0,
        host_seconds=0.25,
        connected=True,
        planned=True,
        seconds=PhaseSeconds(0.1, 0.2, 0.3, transfer, 0.5, 0.6, 3.2),
        reshard_seconds=0.1,
        schedule_seconds=0.1,
        run=RunReport(0.0, ()),
        digest="d",
    )


def test_speed_is_bytes_delivered_by_the_seconds_of_the_transfer() -> None:
    assert report().gigabytes_per_second == 2.0


def test_what_moved_nothing_has_no_speed() -> None:
    assert report(nbytes=0, transfer=0.0).gigabytes_per_second == 0.0


def test_a_report_survives_pickling_and_cannot_be_changed() -> None:
    made = report()
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.version = 8  # type: ignore[misc]


def test_torn_says_between_which_versions() -> None:
    assert Torn(3, 4) == Torn(from_version=3, to_version=4)
    assert Torn(None, 0) != Torn(0, 0)
    assert repr(Torn(3, 4)) == "Torn(from_version=3, to_version=4)"
