"""The steps of a run on one actor: queued for the device, waited for, and the run's end behind the last of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import torch

from wavecast.runtime import errors
from wavecast.runtime.transfer.agreement import Ending, agree
from wavecast.runtime.transfer.board import AGREED, SUMMED
from wavecast.runtime.transfer.comm import CudaFence, Deadline, Fence
from wavecast.runtime.transfer.equipment import Equipment
from wavecast.runtime.transfer.messages import Finished, Reply, RunStep, StepDone
from wavecast.runtime.transfer.program import Bucket, Program, Step
from wavecast.runtime.transfer.pull import Turn
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.staging import Leg

__all__ = ("Steps",)

#: So many parts before the end there is time to hear what the senders have summed up: each takes 0.3 ms, and what is
#: read of a board may wait for two of them.
_LAST_PARTS = 6


class Steps:
    """
    Runs the steps of a program.

    Queued on the session's lane; :meth:`arrive` waits for the device on a thread of its own meanwhile.

    :ivar under_way: the first parts of what was last started ahead are
    :param lock: held while a run is given up
    """

    def __init__(self, equipment: Equipment, lock: threading.RLock) -> None:
        self.under_way = threading.Event()
        self._equipment = equipment
        self._lock = lock

    def queue_first(self, run: Run, requests: Sequence[RunStep]) -> list[list[Fence]]:
        """Queue the run's first steps; return for each the fences after which its bytes have moved."""
        try:
            return self._queue_first(run, requests)
        finally:
            self.under_way.set()

    def _queue_first(self, run: Run, requests: Sequence[RunStep]) -> list[list[Fence]]:
        program = self._equipment.program
        steps = [program.steps[request.step] for request in requests]
        if not all(step.pull for step in steps):
            return [self.queue(run, request) for request in requests]

        # Part by part in turns: all links are busy at once, and those first that are not on this GPU.
        fences: list[list[Fence]] = [[] for _ in requests]
        turns = [(fences[number], self._parts(run, request)) for number, request in enumerate(requests)]
        turns = [turns[number] for number in sorted(range(len(steps)), key=lambda number: steps[number].near)]
        with self._on_host(run):
            while turns:
                turns = [(found, parts) for found, parts in turns if _take_next(parts, found)]
                self.under_way.set()

        return fences

    def queue(self, run: Run, request: RunStep) -> list[Fence]:
        """Queue a step; return the fences after which its bytes have moved."""
        with self._on_host(run):
            return list(self._parts(run, request))

    def arrive(self, run: Run, request: RunStep, fences: Sequence[Fence]) -> Reply:
        """Answer a step once its bytes have moved; the last one once everything is in place."""
        deadline = Deadline(request.seconds)
        last = request.step + 1 == len(self._equipment.program.steps)
        for number, fence in enumerate(fences):
            if last and number == max(len(fences) - _LAST_PARTS, 0):
                self._listen(run)

            fence.wait(deadline)

        if not last:
            return StepDone()

        finished = self._finish(run, deadline)
        return StepDone(finished, closed=self._close_run(run, finished, deadline))

    # Queued part by part.

    def _parts(self, run: Run, request: RunStep) -> Iterator[Fence]:
        equipment, deadline = self._equipment, Deadline(request.seconds)
        run.check()
        program = equipment.program
        if program.digest != request.digest:
            raise errors.SyncError(f"the actor has program {program.digest}, it was asked to run {request.digest}")

        if not run.opened:
            run.opened = True
            self._open(run, program, deadline)

        step = program.steps[request.step]
        if run.actor in step.receivers:
            run.wrote = True

        if equipment.forwards and equipment.puller is not None and equipment.staging is not None:
            for stream in equipment.staging.streams():
                equipment.puller.join(stream)

        yield from (
            self._pull(run, step, request.step, deadline)
            if step.pull
            else self._move(run, step, request.step, deadline)
        )
        run.queued += 1
        if run.queued == len(program.steps) and equipment.puller is not None:
            # Queued while bytes travel: in the end there is an event to wait for, and nothing to fetch.
            for stream in equipment.staging.streams() if equipment.staging is not None else ():
                equipment.puller.sums.wait_stream(stream)

            run.end = equipment.puller.finished(run.tally)

    @contextlib.contextmanager
    def _on_host(self, run: Run) -> Iterator[None]:
        """Count what this thread spends on the run."""
        started, waited = time.thread_time(), self._waited_seconds
        yield
        run.spend(time.thread_time() - started - (self._waited_seconds - waited))

    @property
    def _waited_seconds(self) -> float:
        puller = self._equipment.puller
        return puller.boards.waited_seconds if puller is not None else 0.0

    def _open(self, run: Run, program: Program, deadline: Deadline) -> None:
        """Let everything that moves bytes wait for the run's begin on the device; vouch for what others pull."""
        equipment = self._equipment
        memory, board = equipment.memory_of(run), equipment.announcer.board
        if equipment.staging is not None:
            equipment.staging.begin(run.ready)

        if any(step.pull for step in program.steps):
            puller = equipment.pulling(memory)
            puller.begin(memory, run.ready)
            if run.lends and board is not None:
                puller.vouch(program, board, self._turn(run, deadline))

    def _turn(self, run: Run, deadline: Deadline) -> Turn:
        return Turn(run.name.serial, deadline, run.check, lambda: bool(run.given_up), run.spend)

    def _pull(self, run: Run, step: Step, index: int, deadline: Deadline) -> Iterator[Fence]:
        puller = self._equipment.pulling(run.memory)

        def total() -> torch.Tensor | None:
            self._equipment.copier_of(run)
            return run.tally.total(index, puller.sums) if run.tally is not None else None

        if run.actor == step.sender:
            puller.send(step, total())
        else:
            yield from puller.receive(step, total, self._turn(run, deadline))

    def _move(self, run: Run, step: Step, index: int, deadline: Deadline) -> Sequence[Fence]:
        equipment = self._equipment
        staging, copier = equipment.staging, equipment.copier_of(run)
        if staging is None:
            raise errors.SyncError("the actor was asked to run before it was connected and had its program")

        leg = Leg(
            step=index,
            sender=step.sender,
            receivers=step.receivers,
            buckets=equipment.buckets_of(index),
            ahead=self._ahead(index, run),
            forwards=equipment.forwards,
            copier=copier,
            deadline=deadline,
            meet=lambda: self._meet(run, step, deadline),
            check=run.check,
        )
        if run.actor in step.through:
            return staging.carry(leg)

        return staging.send(leg) if run.actor == step.sender else staging.receive(leg)

    def _meet(self, run: Run, step: Step, deadline: Deadline) -> None:
        """Enter no collective before all whose boards this actor reads have begun the run."""
        puller = self._equipment.puller
        if puller is None:
            return

        for peer in (step.sender, *step.receivers):
            if puller.boards.reads(peer):
                puller.boards.wait_begun(peer, run.name.serial, deadline, run.check)

    def _ahead(self, step: int, run: Run) -> Bucket | None:
        """Return the first bucket of the next step, when this actor sends it and had all of it from the start."""
        program = self._equipment.program
        if self._equipment.forwards or step + 1 == len(program.steps):
            return None

        following = program.steps[step + 1]
        if following.pull or following.sender != run.actor:
            return None

        buckets = self._equipment.buckets_of(step + 1)
        return buckets[0] if buckets else None

    # The end of the run.

    def _listen(self, run: Run) -> None:
        """Hear what the senders have summed up while the last bytes travel, to compare it as soon as they are there."""
        puller = self._equipment.puller
        if run.close is not None and puller is not None:
            steps = self._equipment.program.steps
            for sender in {step.sender for step in steps if step.sender != run.actor}:
                tasks = [step.task for step in steps if step.sender == sender]
                puller.boards.listen(sender, tasks, run.name.serial)

    def _finish(self, run: Run, deadline: Deadline) -> Finished:
        """Wait until all that was written is in place; return the sums of the run's steps."""
        program, staging, puller = self._equipment.program, self._equipment.staging, self._equipment.puller
        started = time.thread_time()
        if not all(step.pull for step in program.steps):
            run.memory.require_still()
        elif any(step.sender == run.actor for step in program.steps):
            # Looked at as a whole before it was lent; what was received was looked at as it arrived.
            run.memory.require_in_place()

        run.spend(time.thread_time() - started)

        if staging is not None:
            staging.finish(deadline)

        if puller is not None:
            CudaFence(run.end or puller.finished(), lambda: bool(run.given_up)).wait(deadline)

        run.check()
        started = time.thread_time()
        sums = self._equipment.copier_of(run).sums(len(program.steps)) if program.checksum else []
        run.spend(time.thread_time() - started)
        return Finished(tuple(sums), staging.nbytes if staging is not None else 0, run.host_seconds)

    def _close_run(self, run: Run, finished: Finished, deadline: Deadline) -> bool:
        """End the run on this actor, if it may do so by itself and all agree; return whether it has ended."""
        board, puller = self._equipment.announcer.board, self._equipment.puller
        if run.close is None or board is None or puller is None:
            return False

        def say(word: int, serial: int) -> None:
            # Not once the run was given up: by then a later one may have said something.
            with self._lock:
                run.check()
                board.post(word, serial)

        if run.failed:
            # Without sums nothing else would show it.
            say(SUMMED, -run.name.serial)
            say(AGREED, -run.name.serial)
            return False

        ending = Ending(run.name.serial, run.actor, run.peers, deadline, run.check, say)
        if not agree(ending, self._equipment.program, finished.checksums, puller.boards):
            return False

        run.close()
        return True


def _take_next(parts: Iterator[Fence], found: list[Fence]) -> bool:
    """Add the next of ``parts`` to ``found``; tell whether there was one."""
    for part in parts:
        found.append(part)
        return True

    return False
