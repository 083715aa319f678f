"""
Where each millisecond of one warm sync goes: what driver and actors were at, on one clock.

    python benchmarks/trace_sync.py --case across-7b --json trace.json      # cases as in bench_sync.py
    python benchmarks/trace_sync.py --case across-7b --profile DIR          # and PyTorch's profiler on every actor

The calls are marked by wrapping them, in this process and in the actors; a mark costs microseconds. With `--profile`
one more sync is recorded by PyTorch's profiler on every actor: DIR gets a Chrome trace of each, and the report says
what each GPU did, by kernel. Transfers run on threads of their own, of which the profiler sees nothing but the GPU.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import anyio
import torch
from common import count, environment, named_option, results_file, write_results
from sync_cases import Case, find_cases
from sync_measure import case_facts, started_actors

from wavecast.runtime import ModelGroup, ParameterSyncGroup
from wavecast.runtime.cluster import RayActors, call_all, cluster
from wavecast.runtime.demo import DemoActor
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.transfer import steps
from wavecast.runtime.transfer.agent import Agent
from wavecast.runtime.transfer.announcer import Announcer
from wavecast.runtime.transfer.board import AGREED, BEGUN, SUMMED, Boards
from wavecast.runtime.transfer.pull import Puller
from wavecast.runtime.transfer.runs import Runs
from wavecast.runtime.transfer.staging import Staging
from wavecast.runtime.transfer.steps import Steps

__all__ = ("Mark", "TracedActor", "main")

_WORDS = {BEGUN: "begun", SUMMED: "summed up", AGREED: "agreed"}
_DEVICE_TYPES = {"DeviceType.CUDA", "DeviceType.PrivateUse1"}


class Mark(NamedTuple):
    """
    A call: what it was, when it began (nanoseconds of the system's clock), and how long it took.
    """

    what: str
    began: int
    nanoseconds: int


class Marks:
    """The calls of this process that were wrapped, in the order in which they ended."""

    def __init__(self) -> None:
        self.found: list[Mark] = []

    def wrap(self, owner: object, method: str, name: Callable[..., str]) -> None:
        """Mark every call of ``owner.method``; ``name`` gets its arguments and says what it is."""
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def marked(*args: object, **options: object) -> object:
            began = time.time_ns()
            try:
                return inner(*args, **options)
            finally:
                self.found.append(Mark(name(*args), began, time.time_ns() - began))

        setattr(owner, method, marked)

    def take(self) -> list[Mark]:
        """Return what was marked since the last time."""
        found, self.found = self.found, []
        return found


class TracedActor(DemoActor):
    """Marks its own calls once it is told to."""

    def mark(self) -> None:
        """Wrap what an actor does in a sync."""
        marks = self._marks = Marks()
        marks.wrap(Agent, "serve", lambda agent, request, *_: f"serves {type(request).__name__}")
        marks.wrap(Runs, "begin", lambda *_: "begins")
        marks.wrap(Announcer, "begin", lambda *_: "says that it has begun")
        marks.wrap(Steps, "_open", lambda *_: "opens its steps")
        marks.wrap(Steps, "queue", lambda own, run, request: f"queues step {request.step}")
        marks.wrap(Steps, "_finish", lambda *_: "finishes")
        marks.wrap(Boards, "wait", lambda own, peer, word, *_: f"hears actor {peer}: {_WORDS[word]}")
        marks.wrap(Puller, "receive", lambda *_: "queues pulls")
        marks.wrap(Puller, "send", lambda *_: "queues sums")
        marks.wrap(Steps, "_close_run", lambda *_: "agrees on the end")
        marks.wrap(Staging, "send", lambda *_: "queues sends")
        marks.wrap(Staging, "receive", lambda *_: "queues receives")
        marks.wrap(steps.CudaFence, "wait", lambda *_: "waits for the device")

    def marks(self) -> list[Mark]:
        """Return the calls since the last time."""
        return self._marks.take()

    def start_profile(self) -> None:
        """Let PyTorch's profiler record from here on."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)

        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def stop_profile(self, path: str) -> list[Mark]:
        """Write a Chrome trace to ``path``; return what the device did, or the host where there is none."""
        self._finish()
        self._profiler.stop()
        self._profiler.export_chrome_trace(path)
        events = self._profiler.profiler.kineto_results.events()
        on_device = [event for event in events if str(event.device_type()) in _DEVICE_TYPES]
        return [
            Mark(event.name(), event.start_ns(), event.duration_ns())
            for event in on_device or events
            if event.duration_ns() > 0
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Trace a case; print it, and write it as JSON. Return 0 when its weights were right, else 1, or 2 when refused."""
    args = _parse(argv)
    try:
        (case,) = find_cases(suite=None, names=[args.case])
        case = case.with_options(dict(args.set))
        case.sync_options()
    except ConfigError as error:
        print(f"trace_sync: {error}", file=sys.stderr)
        return 2

    reason = case.reason_to_skip(torch.cuda.device_count())
    if reason is not None:
        print(f"trace_sync: {args.case} {reason}", file=sys.stderr)
        return 2

    if args.profile is not None:
        args.profile = os.path.abspath(args.profile)
        try:
            os.makedirs(args.profile, exist_ok=True)
        except OSError as error:
            print(f"trace_sync: cannot write traces to {args.profile!r}: {error.strerror}", file=sys.stderr)
            return 2

    with cluster(None):
        report = anyio.run(functools.partial(_trace, case, warm=args.warm, profile=args.profile), backend="asyncio")

    if args.json is not None:
        write_results(args.json, report)

    print("\n".join(_lines(report)))
    return 0 if report["verified"] else 1


async def _trace(case: Case, *, warm: int, profile: str | None) -> dict[str, object]:
    marks = Marks()
    async with started_actors(case, TracedActor) as (trainers, engines):
        every = [*trainers, *(actor for replica in engines for actor in replica)]
        policy, rollout = ModelGroup("policy", [trainers]), ModelGroup("rollout", engines)
        async with ParameterSyncGroup(policy, rollout, case.sync_options()) as group:
            await call_all(trainers, "fill", 0)
            await group.sync(deadline=120.0)
            await call_all(every, "mark")
            marks.wrap(RayActors, "start", lambda own, actor, request, *_: f"asks actor {actor}: {_kind(request)}")
            runs: list[tuple[float, list[dict[str, object]]]] = []
            for _ in range(warm):
                marks.take()
                await call_all(every, "marks")
                began = time.time_ns()
                await group.sync(deadline=120.0)
                ended = time.time_ns()
                actors = [cast("list[Mark]", found) for found in await call_all(every, "marks")]
                here = [*marks.take(), Mark("sync()", began, ended - began)]
                runs.append(((ended - began) / 1e6, _merge([here, *actors], began)))

            device: list[dict[str, object]] = []
            if profile is not None:
                await call_all(every, "start_profile")
                began = time.time_ns()
                await group.sync(deadline=120.0)
                for number, actor in enumerate(every):
                    path = f"{profile}/{case.name}-actor{number}.json"
                    (found,) = await call_all([actor], "stop_profile", path)
                    device.extend(_by_kind(number, cast("list[Mark]", found), began))

            differing = await call_all(every[len(trainers) :], "differing", 0)

    runs.sort(key=lambda run: run[0])
    typical = runs[len(runs) // 2]
    return {
        **environment(),
        "case": case_facts(case),
        "milliseconds": [run[0] for run in runs],
        "timeline": typical[1],
        "device": device,
        "verified": not any(differing),
    }


def _kind(request: object) -> str:
    return type(request).__name__


def _merge(found: Iterable[Sequence[Mark]], epoch: int) -> list[dict[str, object]]:
    """Return all marks in the order in which they began; the first of ``found`` are the driver's."""
    rows = [
        {
            "who": "driver" if number == 0 else f"actor {number - 1}",
            "what": mark.what,
            "at": (mark.began - epoch) / 1e6,
            "milliseconds": mark.nanoseconds / 1e6,
        }
        for number, marks in enumerate(found)
        for mark in marks
    ]
    return sorted(rows, key=lambda row: cast("float", row["at"]))


def _by_kind(actor: int, found: Sequence[Mark], epoch: int) -> list[dict[str, object]]:
    """Return what an actor's device did, by kernel or kind of copy, the longest first."""
    kinds: dict[str, list[Mark]] = {}
    for mark in found:
        kinds.setdefault(mark.what[:80], []).append(mark)

    rows: list[dict[str, object]] = [
        {
            "actor": actor,
            "what": what,
            "count": len(marks),
            "milliseconds": sum(mark.nanoseconds for mark in marks) / 1e6,
            "first": (min(mark.began for mark in marks) - epoch) / 1e6,
            "last": (max(mark.began + mark.nanoseconds for mark in marks) - epoch) / 1e6,
        }
        for what, marks in kinds.items()
    ]
    return sorted(rows, key=lambda row: -cast("float", row["milliseconds"]))[:12]


def _lines(report: dict[str, object]) -> Iterable[str]:
    spread = cast("list[float]", report["milliseconds"])
    yield f"warm syncs, ms: {', '.join(f'{value:.1f}' for value in spread)}; the median one:"
    for row in cast("list[dict[str, float]]", report["timeline"]):
        yield f"{row['at']:9.2f} {row['milliseconds']:9.2f}  {row['who']:<8} {row['what']}"

    for row in cast("list[dict[str, float]]", report["device"]):
        span = f"{row['first']:9.2f} to {row['last']:9.2f}"
        yield f"{span}  actor {row['actor']}: {row['milliseconds']:9.2f} ms in {row['count']:>5}  {row['what']}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, help="a case of bench_sync.py")
    parser.add_argument("--warm", type=count, default=7, help="warm syncs, of which the median is shown")
    parser.add_argument(
        "--set", action="append", type=named_option, default=[], metavar="NAME=VALUE", help="an option, in JSON"
    )
    parser.add_argument("--profile", metavar="DIR", help="record one more sync with PyTorch's profiler")
    parser.add_argument("--json", type=results_file, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
