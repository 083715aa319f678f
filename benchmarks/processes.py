"""Processes that measure together: one a rank, started for the purpose, ended at the latest when their time is up."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ("Member", "Outcome", "run_in_turn", "run_processes")

Row = dict[str, object]

#: For processes that are done to end by themselves.
_END_SECONDS = 5.0


class Member:
    """
    What one of the processes knows of the others.

    :ivar rank: its number, on GPUs also its GPU's
    :ivar device: where its tensors are
    :ivar seconds: for any one thing that all do together
    """

    def __init__(self, rank: int, world: int, device: torch.device, seconds: float, rows: Connection) -> None:
        self.rank = rank
        self.world = world
        self.device = device
        self.seconds = seconds
        self._rows = rows
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def report(self, row: Row) -> None:
        """Hand ``row`` to the process that started this one; it is kept whatever happens later."""
        self._rows.send(("row", row))

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """Return the ranks' group for moving bytes, NCCL or gloo. All ranks ask for the same groups in one order."""
        key = tuple(sorted(ranks))
        if key not in self._groups:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            made = dist.new_group(list(key), backend=backend, timeout=timedelta(seconds=self.seconds))
            self._groups[key] = made
            if self.rank in key:
                # Made now, by all: a communicator that only some of its ranks use first would wait for the others.
                dist.all_reduce(torch.zeros(1, device=self.device), group=made)

        return self._groups[key]

    def time(self, work: Callable[[], None], *, repeats: int, warm: int = 1) -> list[float]:
        """Do ``work`` on all ranks at once, again and again; return the slowest rank's seconds of each repeat."""
        seconds = []
        for _ in range(warm + repeats):
            dist.barrier()
            start = time.perf_counter()
            work()
            self.finish()
            seconds.append(time.perf_counter() - start)

        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return [float(value) for value in slowest[warm:]]

    def finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    What came of it.

    :ivar rows: what the members reported before they ended or failed
    :ivar error: the first failure in words, ``None`` when all went well
    """

    rows: tuple[Row, ...]
    error: str | None


def run_processes(entry: Callable[..., None], *args: object, world: int, device: str, seconds: float) -> Outcome:
    """
    Run ``entry(member, *args)`` in ``world`` processes that can talk over gloo, and return what they report.

    Nothing is raised for what goes wrong in them: a benchmark goes on with the next figure.

    :param entry: a function of a module, called in every process
    :param device: ``"cuda"`` puts each on the GPU of its rank; ``"cpu"``
    :param seconds: after these all of them are killed
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes: list[SpawnProcess] = []
        ends: list[Connection] = []
        for rank in range(world):
            mine, theirs = context.Pipe(duplex=False)
            store = str(Path(folder) / "store")
            process = context.Process(
                target=_start, args=(entry, rank, world, device, store, seconds, theirs, args), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(mine)

        outcome = Outcome((), "interrupted")
        try:
            outcome = _collect(ends, time.monotonic() + seconds, seconds)
        finally:
            # After a failure the others wait for one that will not come.
            _end(processes, grace=_END_SECONDS if outcome.error is None else 0.0)

        return outcome


def run_in_turn(
    entry: Callable[..., None], items: Mapping[str, object], *args: object, world: int, device: str, seconds: float
) -> dict[str, Row]:
    """
    Run ``entry(member, items, *args)``, which works off ``items`` in order and reports a row each, with its ``"name"``.

    An item that fails gets a row with its error, and those behind it go on in fresh processes.

    :param seconds: for all items together
    """
    found: dict[str, Row] = {}
    remaining = dict(items)
    until = time.monotonic() + seconds
    while remaining:
        left = max(until - time.monotonic(), 1.0)
        outcome = run_processes(entry, remaining, *args, world=world, device=device, seconds=left)
        for row in outcome.rows:
            name = str(row["name"])
            found[name] = row
            del remaining[name]

        if remaining:
            failed = next(iter(remaining))
            found[failed] = {"name": failed, "error": outcome.error or "nothing was reported"}
            del remaining[failed]

    return found


def _collect(ends: Sequence[Connection], until: float, seconds: float) -> Outcome:
    """Read rows until every process said that it is done, one failed, or the time is up."""
    rows: list[Row] = []
    running = list(ends)
    error: str | None = None
    while running and error is None:
        ready = wait(running, timeout=max(until - time.monotonic(), 0))
        if not ready:
            error = f"not done after {seconds:.0f} s"

        for end in ready:
            if isinstance(end, Connection):
                failure = _read(end, ends.index(end), running, rows)
                error = error or failure

    if error is not None:
        # A row of one member was sent before another failed in what came next: it is here, and counts.
        for end in list(running):
            while end in running and end.poll():
                _read(end, ends.index(end), running, rows)

    return Outcome(tuple(rows), error)


def _read(end: Connection, rank: int, running: list[Connection], rows: list[Row]) -> str | None:
    """Take in one message of a member; return in words how it failed, if it did."""
    try:
        what, value = end.recv()
    except EOFError:
        running.remove(end)
        return f"the process of rank {rank} ended without a word"

    if what == "row":
        rows.append(value)
        return None

    running.remove(end)
    return None if what == "done" else f"rank {rank}: {value}"


def _end(processes: Sequence[SpawnProcess], *, grace: float) -> None:
    for process in processes:
        process.join(timeout=grace)
        if process.is_alive():
            process.kill()

    for process in processes:
        process.join()


def _start(
    entry: Callable[..., None],
    rank: int,
    world: int,
    device: str,
    store: str,
    seconds: float,
    rows: Connection,
    args: tuple[object, ...],
) -> None:
    try:
        here = torch.device("cpu")
        if device == "cuda":
            here = torch.device("cuda", rank)
            torch.cuda.set_device(here)
        else:
            torch.set_num_threads(1)

        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        entry(Member(rank, world, here, seconds, rows), *args)
        dist.barrier()
        rows.send(("done", None))
    except Exception as error:
        rows.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"))
    finally:
        # Not destroyed: a group of NCCL's waits there for peers that may have failed. The process ends anyway.
        rows.close()
