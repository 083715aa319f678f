"""What moves a session's bytes: its connection, its program, staging memory, and what is mapped of others'."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch

from wavecast.runtime import errors
from wavecast.runtime.collector import collector_paused
from wavecast.runtime.transfer.announcer import Announcer
from wavecast.runtime.transfer.comm import Communicator, Deadline
from wavecast.runtime.transfer.copying import Copier, TensorCopier
from wavecast.runtime.transfer.fused import FusedCopier, Tables, Tally
from wavecast.runtime.transfer.lending import export_addresses
from wavecast.runtime.transfer.memory import Memory
from wavecast.runtime.transfer.messages import Addresses, Connect, Connected
from wavecast.runtime.transfer.program import Bucket, Program, fill_buckets
from wavecast.runtime.transfer.pull import Puller
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.staging import Staging

__all__ = ("Equipment", "Join")

#: Meets the other members of a connection, from this address, and returns this actor's end.
Join = Callable[[Connect, str, torch.device, Deadline], Communicator]


class Equipment:
    """
    What moves a session's bytes.

    Used on the session's lane, where all is made and mapped. Who ends a run or the group does so on another thread: a
    connection that is made meanwhile is aborted as soon as it is there.

    :ivar announcer: says on the actor's board how runs begin and end
    :ivar forwards: the program sends what it has received
    :ivar epoch: changes when a connection that may be in the making is given up
    """

    def __init__(self, announcer: Announcer) -> None:
        self.announcer = announcer
        self.forwards = False
        self.staging: Staging | None = None
        self.puller: Puller | None = None
        self.epoch = 0
        # No connection is taken on while another thread gives one up.
        self._lock = threading.Lock()
        self._program: Program | None = None
        self._buckets: dict[int, tuple[Bucket, ...]] = {}
        self._communicator: Communicator | None = None
        self._tables: Tables | None = None

    # The program, and what follows from it.

    @property
    def program(self) -> Program:
        """
        The program last taken on.

        :raises SyncError: when there is none
        """
        if self._program is None:
            raise errors.SyncError("the actor has no program")

        return self._program

    def load(self, program: Program, device: torch.device) -> None:
        """Take on a program for memory on ``device``."""
        self._program = program
        self._buckets = {}
        self._tables = None
        if self.puller is not None and self.puller.device != device:
            # The shards are on another GPU by now, or on none.
            self.detach()

        if self.puller is not None:
            self.puller.take_on(program)

        if device.type == "cuda":
            # Whether others will read it is not known yet, but now is the time to make it.
            self.announcer.make_room(len(program.steps), device)

        sends = any(step.sender == program.actor for step in program.steps)
        self.forwards = sends and any(program.actor in step.receivers for step in program.steps)
        self._allocate()

    def buckets_of(self, step: int) -> tuple[Bucket, ...]:
        """Return how the bytes of a step travel."""
        program = self.program
        if step not in self._buckets:
            self._buckets[step] = fill_buckets(program.steps[step].cuts, bucket_bytes=program.bucket_bytes)

        return self._buckets[step]

    def memory_of(self, run: Run) -> Memory:
        """Return the run's memory, found by the names that the program's cuts have."""
        return run.memory if self._program is None else run.memory.under(self._program.renames)

    def copier_of(self, run: Run) -> Copier:
        """Return what copies and sums up in ``run``, made at its first use: bytes that are pulled travel before."""
        if run.copier is not None:
            return run.copier

        program, memory = self.program, self.memory_of(run)
        if program.kernels:
            if self._tables is None or self._tables.memory is not memory:
                self._tables = Tables(memory)

            run.tally = self._tally(len(program.steps), memory.device) if program.checksum else None
            end = len(program.steps) - 1
            buckets = () if program.steps[end].pull else self.buckets_of(end)
            run.copier = FusedCopier(self._tables, run.tally, last=(end, buckets[-1].first if buckets else 0))
        else:
            run.copier = TensorCopier(memory, checksum=program.checksum)

        return run.copier

    def _tally(self, steps: int, device: torch.device) -> Tally:
        return Tally(steps, device, self.announcer.board if self.announcer.has_room(steps) else None)

    # The connection.

    def connect(self, request: Connect, address: str, device: torch.device, *, join: Join, epoch: int) -> Connected:
        """
        Build this actor's end of a connection.

        :param join: meets the others
        :param epoch: as it was when this was asked for
        :raises SyncAborted: when the connection was given up meanwhile
        """
        deadline = Deadline(request.seconds)
        started = deadline.left
        self.drop_connection(abort=False)
        communicator = join(request, address, device, deadline)
        with self._lock:
            if epoch != self.epoch:
                communicator.abort()
                raise errors.SyncAborted("the connection was given up while it was made")

            self._communicator = communicator
            self._allocate()

        return Connected(started - deadline.left, communicator.device_bytes)

    def give_up_connection(self) -> Communicator | None:
        """Abort the connection, or the one that is being made; return what was there."""
        with self._lock:
            self.epoch += 1
            return self.drop_connection(abort=True)

    def drop_connection(self, *, abort: bool) -> Communicator | None:
        """Give back the communicator and staging memory, and return what is left of it; the next one is made anew."""
        communicator, self._communicator = self._communicator, None
        self.staging = None
        if communicator is not None:
            if abort:
                communicator.abort()
            else:
                communicator.close()

        return communicator

    def _allocate(self) -> None:
        """Hold two buckets, no larger than the largest that the program fills."""
        self.staging = None
        if self._communicator is None or self._program is None:
            return

        steps = [index for index, step in enumerate(self._program.steps) if not step.pull]
        largest = max((bucket.nbytes for step in steps for bucket in self.buckets_of(step)), default=0)
        self.staging = Staging(largest, self._communicator)

    # What is lent to others, and pulled from them.

    def pulling(self, memory: Memory) -> Puller:
        """Return what pulls into ``memory`` and lends it, made at its first use."""
        if self.puller is None:
            self.puller = Puller(memory.device)
            self.puller.take_on(self.program)

        return self.puller

    def export(self, run: Run) -> Addresses:
        """Say where the cuts lie that others pull from this actor, and let them."""
        program, board = self.program, self.announcer.board
        if board is None:
            raise errors.SyncError("the actor was asked for its addresses before it had its program on a GPU")

        with collector_paused():
            addresses = export_addresses(program, self.memory_of(run), board)

        self.announcer.export(run.memory)
        self.announcer.begin(run)
        return addresses

    def prepare_sends(self, run: Run) -> None:
        """Work out all that is lent, while the receivers map what :meth:`export` told them."""
        run.check()
        memory = self.memory_of(run)
        puller = self.pulling(memory)
        puller.begin(memory, run.ready)
        with collector_paused():
            puller.prepare_sends(self.program)

    def attach(self, run: Run, found: Mapping[int, Addresses]) -> None:
        """Map what this actor pulls from, and work out all that is pulled."""
        program, memory = self.program, self.memory_of(run)
        puller = self.pulling(memory)
        puller.attach(found)
        puller.begin(memory, run.ready)
        with collector_paused():
            puller.prepare_receives(program)

    def detach(self) -> None:
        """Unmap others' memory and forget where the shards are; the next :meth:`attach` maps it anew."""
        puller, self.puller = self.puller, None
        if puller is not None:
            puller.close()

        self._tables = None
        self.announcer.export(None)

    def give_back(self) -> Puller | None:
        """
        Give back all but what is mapped of others' memory, for good.

        :return: what has that: to be closed on the lane, behind what may be using it
        """
        self._program = None
        self._buckets = {}
        self._tables = None
        self.announcer.export(None)
        with self._lock:
            self.epoch += 1
            self.drop_connection(abort=False)

        puller, self.puller = self.puller, None
        return puller
