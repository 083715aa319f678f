"""
Processes killed and stopped in the middle of a transfer, on two GPUs: the error, the versions, and memory given back.

    timeout 180 python benchmarks/gpu_faults.py      # NCCL, then CUDA IPC: a line of JSON a cell
    python benchmarks/gpu_faults.py --device cpu     # the same on any machine, over gloo

One trainer and one engine, a GPU each. The process that is struck strikes itself while the second step of its program
is on its way, from a thread of its own that starts as the bytes set out: SIGKILL, or SIGSTOP until the sync has ended.
A step is 4 GiB on a GPU, 64 MiB over gloo. Then the dead is replaced, one more sync is compared element by element, the
group is closed, and what is in use on each GPU (without GPUs: resident in each process) is compared with what was.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from wavecast.runtime import Layout, MeshSpec, ModelGroup, ParameterSyncGroup, SyncError, SyncOptions
from wavecast.runtime.cluster import ActorHandle, call_all, cluster, start_actor
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.demo_memory import SeparateMemory
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.presets import preset
from wavecast.runtime.report import Torn
from wavecast.runtime.transfer.comm import Communicator, CudaFence, Deadline, Fence, Move
from wavecast.runtime.transfer.messages import RunStep
from wavecast.runtime.transfer.run import Run
from wavecast.runtime.transfer.steps import Steps

__all__ = ("Cell", "StruckActor", "main")

_DEADLINE_SECONDS = 5.0
_LONG_SECONDS = 120.0
#: From the moment bytes set out to the strike: a step takes several times as long.
_DELAY_SECONDS = {"cuda": 1e-3, "cpu": 20e-3}
_CHUNK_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
#: CUDA's own bookkeeping may differ by so much between two processes that hold the same.
_SLACK_NBYTES = 64 << 20
_CASES = (("stop", "engine"), ("stop", "trainer"), ("kill", "engine"), ("kill", "trainer"))


class StruckActor(DemoActor):
    """Strikes itself while the second step of its program is on its way."""

    def arm(self, fault: str, witness: str) -> None:
        """
        Strike in the next sync.

        :param fault: ``"kill"`` or ``"stop"``
        :param witness: a file to which is written, before the strike, what was under way: the dead tell nothing
        """
        unwatched = Steps.queue

        def watched(steps: Steps, run: Run, request: RunStep) -> list[Fence]:
            if request.step != 1:
                return unwatched(steps, run, request)

            Steps.queue = unwatched  # type: ignore[method-assign]
            blow = Blow(fault, Path(witness), _DELAY_SECONDS[self._device.type])
            equipment = steps._equipment
            communicator = equipment._communicator
            if communicator is None or equipment.program.steps[1].pull:
                blow.begin()
            else:
                blow.begin_with(communicator)

            fences = blow.fences = unwatched(steps, run, request)
            return fences

        Steps.queue = watched  # type: ignore[method-assign]

    def in_use(self) -> int:
        """Return the bytes in use on the actor's GPU, or without one those that its process has resident."""
        if self._device.type == "cuda":
            return self.device_bytes()

        gc.collect()
        # What was freed goes back to the machine, as far as the C library can.
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Blow:
    """
    A thread that strikes its own process a moment after bytes have set out.

    :ivar fences: of the step, once the lane is through with it
    """

    def __init__(self, fault: str, witness: Path, delay: float) -> None:
        self.fences: Sequence[Fence] | None = None
        self._signal = signal.SIGKILL if fault == "kill" else signal.SIGSTOP
        self._witness = witness
        self._timer = threading.Timer(delay, self._strike)
        self._timer.daemon = True

    def begin(self) -> None:
        """Let the moment run."""
        self._timer.start()

    def begin_with(self, communicator: Communicator) -> None:
        """Let it run from the next move on: what is packed before is no transfer yet."""
        start = communicator.start

        def started(buffer: torch.Tensor, *, sender: int, receivers: tuple[int, ...], deadline: Deadline) -> Move:
            communicator.start = start  # type: ignore[method-assign]
            move = start(buffer, sender=sender, receivers=receivers, deadline=deadline)
            self.begin()
            return move

        communicator.start = started  # type: ignore[method-assign]

    def _strike(self) -> None:
        self._witness.write_text(json.dumps(self._under_way()))
        os.kill(os.getpid(), self._signal)

    def _under_way(self) -> bool | None:
        """Tell whether bytes of the step were on their way; ``None`` where others pull them: this end cannot know."""
        if self.fences is None:
            return True

        events = [fence._event for fence in self.fences if isinstance(fence, CudaFence)]
        return None if not self.fences else not all(event.query() for event in events)


@dataclass(frozen=True, slots=True)
class Cell:
    """
    What became of one.

    :ivar under_way: bytes were on their way as the process was struck; ``None`` where only the other end knows
    :ivar versions: what the error said the replica had
    :ivar expected: what it had to say: it had been written to
    :ivar version: of the replica once it was healed
    :ivar before: bytes in use on the trainer's and the engine's GPU, after a sync and with the group closed
    :ivar after: the same, after the failure, the next sync, and with the group closed
    """

    transport: str
    fault: str
    struck: str
    error: str
    actors: tuple[int, ...]
    phase: str
    seconds: float
    under_way: bool | None
    versions: str
    expected: str
    version: object
    healed: bool
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def good(self) -> bool:
        """Whether it ended as it must."""
        error = "ActorDied" if self.fault == "kill" else "SyncTimeout"
        given_back = all(now <= then + _SLACK_NBYTES for then, now in zip(self.before, self.after, strict=True))
        in_time = self.seconds <= _DEADLINE_SECONDS + 1
        told = self.error == error and self.versions == self.expected and isinstance(self.version, int)
        return told and in_time and self.under_way is not False and self.healed and given_back


class Stand:
    """The two actors, and new ones for those that died."""

    def __init__(self, layout: Layout, device: str, options: SyncOptions) -> None:
        self.layout = layout
        self.device = device
        self.options = options
        self.weights = Weights(seed=3)
        self.step = 0
        self.actors = [self.start(), self.start()]

    def start(self) -> ActorHandle:
        return start_actor(StruckActor, self.layout, self.weights, self.device, gpus=float(self.device == "cuda"))

    def group(self) -> ParameterSyncGroup:
        trainer, engine = self.actors
        return ParameterSyncGroup(ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine]]), self.options)

    async def in_use(self) -> tuple[int, ...]:
        return tuple(cast("list[int]", await call_all(self.actors, "in_use")))

    async def baseline(self) -> tuple[int, ...]:
        """Return what is in use once everything has been used once and given back."""
        await self.train()
        async with self.group() as group:
            await group.sync(deadline=_LONG_SECONDS)
            await call_all(self.actors[1:], "differing", self.step)

        return await self.in_use()

    async def train(self) -> None:
        """Give the trainer weights that nobody has had."""
        self.step += 1
        await call_all(self.actors[:1], "fill", self.step)

    async def strike(self, fault: str, struck: str, before: tuple[int, ...]) -> Cell:
        place = ("trainer", "engine").index(struck)
        victim = self.actors[place]
        (process,) = cast("list[int]", await call_all([victim], "process_id"))
        with tempfile.TemporaryDirectory() as folder:
            witness = Path(folder, "witness")
            async with self.group() as group:
                first = await group.sync(deadline=_LONG_SECONDS)
                await call_all([victim], "arm", fault, str(witness))
                error, start = SyncError("no error"), time.monotonic()
                try:
                    await group.sync(deadline=_DEADLINE_SECONDS)
                except SyncError as failure:
                    error = failure

                seconds = time.monotonic() - start
                if fault == "stop":
                    os.kill(process, signal.SIGCONT)
                else:
                    self.actors[place] = self.start()
                    await group.replace(victim, self.actors[place])

                await self.train()
                await group.sync(deadline=_LONG_SECONDS)
                (differing,) = await call_all(self.actors[1:], "differing", self.step)
                version = group.versions()[0]

            under_way = _read(witness)

        return Cell(
            transport=self.options.transport,
            fault=fault,
            struck=struck,
            error=type(error).__name__,
            actors=error.actors,
            phase=error.phase,
            seconds=round(seconds, 3),
            under_way=under_way,
            versions=repr(dict(error.versions)),
            expected=repr({0: Torn(first.version, first.version + 1)}),
            version=version,
            healed=differing == {},
            before=before,
            after=await self.in_use(),
        )


def _read(witness: Path) -> bool | None:
    """Return what was written down before the strike; without one nothing was under way."""
    return cast("bool | None", json.loads(witness.read_text())) if witness.exists() else False


async def run(transports: Sequence[str], device: str, layout: Layout) -> bool:
    """Strike in every case, over each of ``transports``; print a line for each, and return whether all were good."""
    stand = Stand(layout, device, SyncOptions())
    good = True
    for transport in transports:
        stand.options = SyncOptions(
            transport=transport,  # type: ignore[arg-type]
            chunk_bytes=_CHUNK_BYTES[device],
            budget_bytes=2 * _CHUNK_BYTES[device],
            in_flight=1,
        )
        before = await stand.baseline()
        for fault, struck in _CASES:
            cell = await stand.strike(fault, struck, before)
            print(json.dumps({**asdict(cell), "good": cell.good}), flush=True)
            good = good and cell.good

    return good


def main(argv: Sequence[str] | None = None) -> int:
    """Run what ``argv`` (else the command line) asks for; return 0 if every process's end was a good one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--transports", nargs="+", choices=("nccl", "ipc", "gloo"), help="gloo on CPUs, else nccl ipc")
    parser.add_argument("--model", default="", help="qwen2.5-7b on GPUs, else two layers of qwen2.5-0.5b")
    options = parser.parse_args(argv)
    here = torch.cuda.device_count()
    if options.device == "cuda" and here < 2:
        # Each of the two actors asks Ray for a GPU, and would wait for it.
        print(f"gpu_faults: needs 2 GPUs, {here} are here; --device cpu needs none", file=sys.stderr)
        return 2

    transports = options.transports or (["nccl", "ipc"] if options.device == "cuda" else ["gloo"])
    if options.device == "cpu" and transports != ["gloo"]:
        print(f"gpu_faults: --device cpu goes over gloo alone, not {' '.join(transports)}", file=sys.stderr)
        return 2

    try:
        layout = _layout(options.model, options.device)
    except ConfigError as error:
        print(f"gpu_faults: {error}", file=sys.stderr)
        return 2

    with cluster(None):
        return 0 if asyncio.run(run(transports, options.device, layout)) else 1


def _layout(model: str, device: str) -> Layout:
    """
    Return the whole of the model named, or of the default one for ``device``.

    :raises ConfigError: for an unknown model, and one that is no two steps long
    """
    on_gpu = device == "cuda"
    name = model or ("qwen2.5-7b" if on_gpu else "qwen2.5-0.5b")
    config = preset(name)
    (layout,) = layouts(config if on_gpu else config.with_layers(2), MeshSpec.parse("tp=1"))
    nbytes, step = SeparateMemory(layout).nbytes, _CHUNK_BYTES[device]
    if nbytes <= step:
        raise ConfigError(f"model {name!r} has {nbytes} bytes here: the strike needs a second step, after {step} bytes")

    return layout


if __name__ == "__main__":
    sys.exit(main())
