"""The fence of device work: it passes once that is through, and never once it was given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch

from tests.runtime.transfer import host_device
from tests.runtime.transfer.host_device import Device, Event
from wavecast.runtime.transfer.comm import CommunicatorError, CudaFence, Deadline, MoveTimeout


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return host_device.install(monkeypatch)


def behind(device: Device, job: Callable[[], object] = lambda: None) -> Event:
    """An event behind ``job`` on the device's stream."""
    stream, event = device.default, Event()
    assert stream is not None
    stream.put(job)
    event.record(stream)
    return event


def fence(event: Event, aborted: Callable[[], bool]) -> CudaFence:
    return CudaFence(cast("torch.cuda.Event", event), aborted)


def test_what_is_through_needs_no_time(device: Device) -> None:
    event = behind(device)
    device.drain()
    fence(event, lambda: False).wait(Deadline(-1))


def test_what_was_aborted_does_not_pass_although_its_event_has_come(device: Device) -> None:
    """An aborted kernel ends like any other, and what it should have written may be missing."""
    event = behind(device)
    device.drain()
    assert event.query()
    with pytest.raises(CommunicatorError, match="the communicator was aborted"):
        fence(event, lambda: True).wait(Deadline(5))


def test_an_abort_that_ends_the_work_while_it_is_waited_for_is_told(device: Device) -> None:
    """Not looked at before the event: it is the abort that lets that come."""
    aborted: list[bool] = []
    event = behind(device, lambda: aborted.append(True))

    def looked_at() -> bool:
        if aborted:
            return True

        # The first look finds none, and the event comes before the next.
        device.drain()
        return False

    with pytest.raises(CommunicatorError, match="the communicator was aborted"):
        fence(event, looked_at).wait(Deadline(5))

    assert event.query()


def test_a_wait_for_what_never_comes_is_ended_by_an_abort_or_by_its_deadline(device: Device) -> None:
    event = behind(device)
    with pytest.raises(CommunicatorError, match="the communicator was aborted"):
        fence(event, lambda: True).wait(Deadline(5))

    with pytest.raises(MoveTimeout, match="the device had not finished by the deadline"):
        fence(event, lambda: False).wait(Deadline(-1))
