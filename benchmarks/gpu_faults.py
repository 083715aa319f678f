"""
Processes killed and stopped in the middle of a transfer, on two GPUs: the error, the time, and memory given back.

    timeout 90 python benchmarks/gpu_faults.py                          # NCCL, then CUDA IPC: a line of JSON a cell
    python benchmarks/gpu_faults.py --device cpu --transports gloo      # the same on any machine

One trainer and one engine, a GPU each. The process that is struck strikes itself as it comes to the second step of its
program: SIGKILL, or SIGSTOP until the sync has ended. Then the dead is replaced, one more sync is compared element by
element, the group is closed, and what is in use on each GPU is compared with what was before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

from wavecast.runtime import Layout, MeshSpec, ModelGroup, ParameterSyncGroup, SyncError, SyncOptions
from wavecast.runtime.cluster import ActorHandle, call_all, cluster, start_actor
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.presets import preset
from wavecast.runtime.transfer.messages import RunStep, decode

__all__ = ("Cell", "StruckActor", "main")

_DEADLINE_SECONDS = 3.0
_LONG_SECONDS = 60.0
#: CUDA's own bookkeeping may differ by so much between two processes that hold the same.
_SLACK_NBYTES = 64 << 20
_CASES = (("stop", "engine"), ("kill", "engine"), ("kill", "trainer"))


class StruckActor(DemoActor):
    """Strikes itself as it comes to the second step of its program."""

    fault = ""

    def arm(self, fault: str) -> None:
        self.fault = fault

    def wavecast_request(self, call: bytes, *attachments: bytes) -> bytes:
        request, _ = cast("tuple[object, object]", decode(call))
        if self.fault and isinstance(request, RunStep) and request.step == 1:
            fault, self.fault = self.fault, ""
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

        return super().wavecast_request(call, *attachments)


@dataclass(frozen=True, slots=True)
class Cell:
    """
    What became of one.

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
    healed: bool
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def good(self) -> bool:
        """Whether it ended as it must."""
        error = "ActorDied" if self.fault == "kill" else "SyncTimeout"
        given_back = all(now <= then + _SLACK_NBYTES for then, now in zip(self.before, self.after, strict=True))
        return self.error == error and self.seconds <= _DEADLINE_SECONDS + 1 and self.healed and given_back


class Stand:
    """The two actors, and new ones for those that died."""

    def __init__(self, layout: Layout, device: str, options: SyncOptions) -> None:
        self.layout = layout
        self.device = device
        self.options = options
        self.weights = Weights(seed=3)
        self.actors = [self.start(), self.start()]

    def start(self) -> ActorHandle:
        return start_actor(StruckActor, self.layout, self.weights, self.device, gpus=float(self.device == "cuda"))

    def group(self) -> ParameterSyncGroup:
        trainer, engine = self.actors
        return ParameterSyncGroup(ModelGroup("policy", [[trainer]]), ModelGroup("rollout", [[engine]]), self.options)

    async def in_use(self) -> tuple[int, ...]:
        return tuple(cast("list[int]", await call_all(self.actors, "device_bytes")))

    async def baseline(self) -> tuple[int, ...]:
        """Return what is in use once everything has been used once and given back."""
        await call_all(self.actors[:1], "fill", 0)
        async with self.group() as group:
            await group.sync(deadline=_LONG_SECONDS)

        return await self.in_use()

    async def strike(self, fault: str, struck: str, before: tuple[int, ...]) -> Cell:
        place = ("trainer", "engine").index(struck)
        victim = self.actors[place]
        (process,) = cast("list[int]", await call_all([victim], "process_id"))
        async with self.group() as group:
            await group.sync(deadline=_LONG_SECONDS)
            await call_all([victim], "arm", fault)
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

            await call_all(self.actors[:1], "fill", 1)
            await group.sync(deadline=_LONG_SECONDS)
            (differing,) = await call_all(self.actors[1:], "differing", 1)

        return Cell(
            transport=self.options.transport,
            fault=fault,
            struck=struck,
            error=type(error).__name__,
            actors=error.actors,
            phase=error.phase,
            seconds=round(seconds, 3),
            healed=differing == {},
            before=before,
            after=await self.in_use(),
        )


async def run(transports: list[str], device: str, model: str) -> bool:
    config = preset(model)
    (layout,) = layouts(config if device == "cuda" else config.with_layers(2), MeshSpec.parse("tp=1"))
    stand = Stand(layout, device, SyncOptions())
    chunk_bytes = 64 << 20 if device == "cuda" else 1 << 18
    good = True
    for transport in transports:
        stand.options = SyncOptions(transport=transport, chunk_bytes=chunk_bytes, in_flight=1)  # type: ignore[arg-type]
        before = await stand.baseline()
        for fault, struck in _CASES:
            cell = await stand.strike(fault, struck, before)
            print(json.dumps({**asdict(cell), "good": cell.good}), flush=True)
            good = good and cell.good

    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--transports", nargs="+", default=["nccl", "ipc"], choices=("nccl", "ipc", "gloo"))
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    model = options.model or ("qwen2.5-0.5b" if options.device == "cuda" else "tiny-qwen2")
    with cluster(None):
        return 0 if asyncio.run(run(options.transports, options.device, model)) else 1


if __name__ == "__main__":
    sys.exit(main())
