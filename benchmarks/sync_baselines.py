"""Other ways to bring the same bytes to the same places, each run beside a case and compared bit by bit once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import numpy
import ray
import torch
import torch.distributed as dist
from baseline_ways import WAYS, Flow, Held
from ceilings import Row
from common import quantile
from processes import Member, run_in_turn
from sync_cases import Case, engine_memories, trainer_memories
from sync_traffic import plan_case, traffic_of

from wavecast.runtime.cluster import end_actors, start_actor
from wavecast.runtime.demo import DemoActor, Weights
from wavecast.runtime.demo_memory import DemoMemory
from wavecast.runtime.errors import WavecastError
from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.layout.shard import describe
from wavecast.runtime.plan.reshard import plan_reshard

__all__ = ("BASELINES", "run_baselines")

#: Name and title of each.
BASELINES = {
    "seed": "the seed's way: 100 MB buckets, synchronous",
    "packed_broadcast": "gather and packed broadcast, 1 GiB x 2",
    "per_tensor": "one isend/irecv a tensor, 64 a batch",
    "object_store": "Ray's object store",
}
_STORE_BYTES = 2_000_000_000
_STORE_REPEATS = 3
_REPEATS = 5
#: Of small models on CPUs, so that there is more than one bucket.
_TOY_BUCKET_BYTES = 1 << 20


def run_baselines(case: Case, names: Sequence[str], *, seconds: float, repeats: int = _REPEATS) -> list[Row]:
    """
    Return a row for each baseline: seconds of its slowest rank, or how it failed or why it was left out.

    :param names: of :data:`BASELINES`
    :param seconds: for those that run in processes of their own, all together; and for the object store
    :param repeats: warm runs of each
    """
    try:
        plan = plan_case(case)
        facts: Row = {"case": case.name, "port_bytes": traffic_of(case, plan).port_bytes}
        rows = {name: {**facts, "name": name, "title": BASELINES[name]} for name in names}
        found = _in_processes(case, plan.routes, [name for name in names if name in WAYS], seconds, repeats)
        if "object_store" in names:
            found["object_store"] = _object_store(case, int(str(facts["port_bytes"])), seconds)
    except Exception as error:
        # A baseline is there for comparison: whatever is wrong with it, the cases go on.
        return [{"case": case.name, "name": name, "title": BASELINES[name], "error": _say(error)} for name in names]

    return [{**rows[name], **found[name]} for name in names]


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _in_processes(
    case: Case,
    routes: tuple,
    names: list[str],
    seconds: float,
    repeats: int,  # type: ignore[type-arg]
) -> dict[str, Row]:
    if len(set(case.places)) != len(case.places):
        return {name: {"reason": "actors share a GPU, which NCCL refuses"} for name in names}

    memories: tuple[DemoMemory, ...] = (
        *trainer_memories(case),
        *(memory for replica in engine_memories(case) for memory in replica),
    )
    sources = len(case.trainers)
    held = [describe(memory.allocate("meta")) for memory in memories[:sources]]
    whole = layouts(case.config(), MeshSpec(), dtype=case.dtype)
    flow = Flow(
        routes=routes,
        gather=plan_reshard(held, whole).routes,
        sources=sources,
        actors=len(memories),
        bucket_bytes=_TOY_BUCKET_BYTES if case.on_cpu else None,
    )
    return run_in_turn(
        _measure,
        dict.fromkeys(names),
        flow,
        memories,
        repeats,
        world=len(memories),
        device="cpu" if case.on_cpu else "cuda",
        seconds=seconds,
    )


def _measure(
    member: Member, names: dict[str, None], flow: Flow, memories: tuple[DemoMemory, ...], repeats: int
) -> None:
    actor = DemoActor(memories[member.rank], Weights(seed=0), str(member.device))
    held = Held(actor.transfer_shards())
    is_receiver = member.rank >= flow.sources
    if not is_receiver:
        actor.fill(0)

    for name in names:
        if is_receiver:
            actor.spoil()

        before = actor.device_bytes()
        dist.barrier()
        start = time.perf_counter()
        work = WAYS[name](member, flow, held)
        work()
        member.finish()
        first = time.perf_counter() - start
        seconds = member.time(work, repeats=repeats)
        # Memory that the allocator keeps counts: nobody else can have it.
        extra = _most(_used_bytes(member) - before)
        wrong = _most(sum(actor.differing(0).values()) if is_receiver else 0)
        if member.rank == 0:
            member.report(
                {
                    "name": name,
                    "seconds": {"p50": quantile(seconds, 0.5), "p95": quantile(seconds, 0.95), "min": min(seconds)},
                    "first_seconds": first,
                    "verified": wrong == 0,
                    "extra_device_bytes": extra,
                }
            )


def _used_bytes(member: Member) -> int:
    if member.device.type != "cuda":
        return 0

    free, total = torch.cuda.mem_get_info(member.device)
    return total - free


def _most(value: int) -> int:
    """Return the largest of all ranks' values."""
    found = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


class StoreEnd:
    """One end of a way through Ray's object store: bytes of a device, as numpy arrays."""

    def __init__(self, nbytes: int, device: str) -> None:
        self._held = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def fill(self, salt: int) -> None:
        self._held.copy_(_pattern(self._held.numel(), salt).to(self._held.device))

    def fetch(self) -> numpy.ndarray:
        return self._held.cpu().numpy()

    def store(self, array: numpy.ndarray) -> bool:
        with warnings.catch_warnings():
            # What comes out of the store is read-only, which a tensor cannot be; this one is only read.
            warnings.simplefilter("ignore")
            self._held.copy_(torch.from_numpy(array))

        if self._held.is_cuda:
            torch.cuda.synchronize(self._held.device)

        return True

    def differing(self, salt: int) -> int:
        return int((self._held.cpu() != _pattern(self._held.numel(), salt)).sum())


def _pattern(nbytes: int, salt: int) -> torch.Tensor:
    """Return bytes that differ from their neighbours, and from those of another salt."""
    period = (torch.arange(251) + salt).to(torch.uint8)
    return period.repeat(-(-nbytes // 251))[:nbytes]


def _object_store(case: Case, port_bytes: int, seconds: float) -> Row:
    """Move up to 2 GB from one actor to another through the store; of more bytes, say what they would take."""
    if len(case.places) != 2 or len(set(case.places)) != 2:
        return {"reason": "run for one pair of actors only"}

    nbytes = min(port_bytes, _STORE_BYTES)
    sender, receiver = (start_actor(StoreEnd, nbytes, case.device(actor)) for actor in range(2))
    try:
        until = time.monotonic() + seconds
        took = []
        ray.get(sender.fill.remote(1), timeout=seconds)  # type: ignore[attr-defined]
        for _ in range(_STORE_REPEATS + 1):
            start = time.perf_counter()
            done = receiver.store.remote(sender.fetch.remote())  # type: ignore[attr-defined]
            ray.get(done, timeout=max(until - time.monotonic(), 1.0))
            took.append(time.perf_counter() - start)

        wrong = ray.get(receiver.differing.remote(1), timeout=seconds)  # type: ignore[attr-defined]
    except (ray.exceptions.RayError, WavecastError, TimeoutError) as error:
        return {"error": _say(error)}
    finally:
        end_actors([sender, receiver])

    scale = port_bytes / nbytes
    warm = [value * scale for value in took[1:]]
    return {
        "seconds": {"p50": quantile(warm, 0.5), "p95": quantile(warm, 0.95), "min": min(warm)},
        "first_seconds": took[0],
        "verified": wrong == 0,
        "moved_bytes": nbytes,
        "scaled_by": scale,
    }
