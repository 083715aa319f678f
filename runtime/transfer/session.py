"""One group's state on one actor: the run under way, its steps in order, and the threads that take them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait

import torch

from wavecast.runtime import errors
from wavecast.runtime.transfer.announcer import Announcer
from wavecast.runtime.transfer.comm import Communicator, Deadline, Fence
from wavecast.runtime.transfer.equipment import Equipment
from wavecast.runtime.transfer.futures import Promise, item_of, pass_on
from wavecast.runtime.transfer.lane import Lane
from wavecast.runtime.transfer.meeting import Meeting
from wavecast.runtime.transfer.messages import Addresses, Connect, HostStore, Reply, RunId, RunStep
from wavecast.runtime.transfer.pull import Puller
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.staging import Staging
from wavecast.runtime.transfer.steps import Steps

__all__ = ("Session",)

#: How long giving up waits for the transfer thread before it leaves it behind.
_GRACE_SECONDS = 0.3


class Session:
    """
    One group's state on one actor.

    What moves bytes is started on :attr:`lane`, a thread of the session's own: the thread of a request stays free to
    notice that its call was cancelled. A second thread waits for the device, so that the next step can be queued
    meanwhile.

    :ivar run: the run under way, if any
    :ivar announcer: says on the actor's board how runs begin and end
    :ivar equipment: what moves the bytes
    :ivar steps: how they are moved
    """

    def __init__(self) -> None:
        self.lane = Lane("wavecast-transfer")
        self.announcer = Announcer()
        self.equipment = Equipment(self.announcer)
        self.run: Run | None = None
        self._waits = Lane("wavecast-arrivals")
        self._lock = threading.RLock()
        self.steps = Steps(self.equipment, self._lock)
        self._meeting = Meeting()
        self._started: dict[tuple[RunId, int], Promise[Reply]] = {}
        self._ended: tuple[RunId | None, str] = (None, "")

    def current(self, name: RunId) -> Run:
        """
        Return the run under way.

        :raises SyncAborted: when it is not the one named
        """
        run = self.run
        if run is None or run.name != name:
            ended, reason = self._ended
            raise errors.SyncAborted(reason if ended == name else "the run is no longer current on this actor")

        run.check()
        return run

    def start_ahead(self, requests: Sequence[RunStep]) -> None:
        """
        Start steps whose own calls are on their way: the first ones of the run that has just begun.

        What they became is kept beyond the end of the run, which may come before the calls.
        """
        self._started = {}
        if not requests:
            return

        self.steps.under_way.clear()
        with self._lock:
            run = self.current(requests[0].run)
            run.next_step = len(requests)
            queued = self.lane.submit(lambda: self.steps.queue_first(run, requests))
            for request in requests:
                future = self._started[request.run, request.step] = Promise()
                self._await(item_of(queued, request.step), run, request, future)

    def enqueue(self, request: RunStep) -> Promise[Reply]:
        """
        Hand the step to the lane as soon as all steps before it have been handed over.

        Of one that was started ahead this is what became of it.
        """
        future: Promise[Reply] = Promise()
        with self._lock:
            started_ahead = self._started.pop((request.run, request.step), None)
            if started_ahead is not None:
                return started_ahead

            run = self.current(request.run)
            if request.step < run.next_step or request.step in run.waiting:
                raise errors.SyncError(f"step {request.step} of the run was asked for twice")

            run.waiting[request.step] = (request, future)
            while run.next_step in run.waiting:
                ready, outer = run.waiting.pop(run.next_step)
                run.next_step += 1
                started = self.lane.submit(lambda ready=ready: self.steps.queue(run, ready))  # type: ignore[misc]
                self._await(started, run, ready, outer)

        return future

    def _await(self, started: Future[list[Fence]], run: Run, request: RunStep, outer: Future[Reply]) -> None:
        """Answer a step once its bytes have moved."""
        waits = self._waits

        def queued(done: Future[list[Fence]]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
            else:
                pass_on(waits.submit(lambda: self.steps.arrive(run, request, done.result())), outer)

        def note(done: Future[Reply]) -> None:
            run.failed = run.failed or done.exception() is not None

        outer.add_done_callback(note)
        started.add_done_callback(queued)

    def refuse(self, run: Run, requests: Sequence[RunStep]) -> None:
        """Start none of the steps of ``run``: they were planned for another layout. Peers are told as well."""
        error = errors.LayoutError("the actor holds another layout than the one the run was planned for")
        self.announcer.refuse(run)
        run.next_step = len(requests)
        self._started = {(request.run, request.step): Promise() for request in requests}
        for future in self._started.values():
            future.set_exception(error)

    def give_up(self, name: RunId, reason: str) -> None:
        """End the run at once: nothing is written after this returns. Another run than the one named is left alone."""
        with self._lock:
            run = self.run
            if run is None or run.name != name:
                # It may have ended by itself; an actor that begins it only now must not read what is here by then.
                self.announcer.take_back(name, agreed=False)
                return

            self.announcer.take_back(name, agreed=True)
            self.run = None
            self._ended = (name, reason)
            run.give_up(reason)
            puller, staging = self.equipment.puller, self.equipment.staging
            communicator = self.equipment.give_up_connection()
            # What is on its way out of a sender's memory arrives first, as may what is queued behind a receive.
            idle = self.lane.submit(lambda: _come_to_rest(puller, staging, communicator))
            if not wait((idle,), timeout=_GRACE_SECONDS).done:
                # Stuck in the transport, where it can do no harm: the run's check stops it before it writes.
                # Its mappings stay with it, to be given back once it is free: no two threads use one puller.
                if puller is not None:
                    self.lane.submit(puller.close)
                    self.equipment.puller = None

                self.lane.close()
                self._waits.close()
                self.lane = Lane("wavecast-transfer")
                self._waits = Lane("wavecast-arrivals")

    def forget_steps(self) -> None:
        """Return once no thread holds anything of the steps that were answered. On the lane."""
        # The one that answered them may not have run since.
        wait((self._waits.submit(lambda: None),), timeout=_GRACE_SECONDS)

    def close(self) -> None:
        """Release everything. The session must not be used again."""
        with self._lock:
            if self.run is not None:
                self.run.give_up("the group was closed")

            self.run = None
            self._meeting.close()
            puller = self.equipment.give_back()
            if puller is not None:
                self.lane.submit(puller.close)

            self.lane.close()
            self._waits.close()

    # Connection and addresses.

    def host_store(self, request: HostStore, address: str) -> int:
        """Open the rendezvous of a connection and return its port."""
        return self._meeting.host(request, address)

    def connect(self, request: Connect, address: str) -> Future[Reply]:
        """Build this actor's end of a connection on the lane."""
        epoch = self.equipment.epoch

        def connect() -> Reply:
            device = self.current(request.run).memory.device
            return self.equipment.connect(request, address, device, join=self._join, epoch=epoch)

        return self.lane.submit(connect)

    def export(self, name: RunId) -> Addresses:
        """Say where the cuts lie that others pull from this actor, and let them. On the lane."""
        run = self.current(name)
        addresses = self.equipment.export(run)
        # While the receivers map what they were told. What fails here fails again where it is answered for.
        self.lane.submit(lambda: self.equipment.prepare_sends(run))
        return addresses

    def _join(self, request: Connect, address: str, device: torch.device, deadline: Deadline) -> Communicator:
        """Meet the other members, and return this actor's end. The one place where they meet."""
        return self._meeting.join(request, address, device, deadline)


def _come_to_rest(puller: Puller | None, staging: Staging | None, communicator: Communicator | None) -> None:
    if puller is not None:
        puller.synchronize()

    if staging is not None:
        for stream in staging.streams():
            stream.synchronize()

    if communicator is not None and communicator.device.type == "cuda":
        # What it has mapped of others' memory is read by nothing any more. Gloo maps none, and may take its time.
        communicator.close()
