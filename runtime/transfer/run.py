"""One sync, as one actor sees it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import torch

from wavecast.runtime import errors
from wavecast.runtime.transfer.copying import Copier
from wavecast.runtime.transfer.fused import Tally
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import Reply, RunId, RunStep

__all__ = ("Run",)


class Run:
    """
    One sync, as one actor sees it.

    :ivar host_seconds: the processor's time that this actor's threads spent on it, waits left out
    :ivar peers: the actors that must have found their weights in place for the run to close by itself
    :ivar lends: its memory is where peers that pull from it believe it to be
    :ivar opened: its first step has been queued
    :ivar queued: how many of its steps have been
    :ivar end: after all that was queued for it on the device, where that is known beforehand
    :ivar close: ends the run on this actor; ``None`` when the driver does
    :ivar failed: a step of it did, whoever has been told so yet
    :ivar releases_memory: nothing of this actor's memory is mapped any more, and its commit lets go of it
    """

    def __init__(self, name: RunId, actor: int, memory: Memory) -> None:
        self.name = name
        self.actor = actor
        self.memory = memory
        self.next_step = 0
        self.queued = 0
        self.end: torch.cuda.Event | None = None
        self.waiting: dict[int, tuple[RunStep, Future[Reply]]] = {}
        self.peers: tuple[int, ...] = ()
        self.close: Callable[[], object] | None = None
        self.lends = False
        self.opened = False
        self.failed = False
        self.releases_memory = False
        self.given_up = ""
        self.copier: Copier | None = None
        self.tally: Tally | None = None
        self.wrote = False
        self.host_seconds = 0.0
        self.ready: torch.cuda.Event | None = None
        if memory.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(memory.device))

    def close_with(self, peers: tuple[int, ...], close: Callable[[], object]) -> None:
        """
        Let the run end by itself once its steps are through and ``peers`` agree.

        :param close: ends it on this actor
        """
        self.peers = peers
        self.close = close

    def spend(self, seconds: float) -> None:
        """Add to what this actor's threads spent on the run."""
        self.host_seconds += seconds

    def check(self) -> None:
        """Raise once the run has been given up."""
        if self.given_up:
            raise errors.SyncAborted(self.given_up)

    def give_up(self, reason: str) -> None:
        """Let nothing more be read or written, and answer the steps that wait for their turn."""
        self.given_up = reason
        for _, future in self.waiting.values():
            future.set_exception(errors.SyncAborted(reason))

        self.waiting.clear()
