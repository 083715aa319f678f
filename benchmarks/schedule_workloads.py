"""Workloads for wave schedules, and the ways of others to schedule them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.timetable import make_timetable
from wavecast.runtime.presets import preset
from wavecast.scheduler import LinkCost, PortModel, Schedule, Task, Wave, fan_out, plan_divisible, plan_waves

__all__ = ("Workload", "WORKLOADS", "BASELINES", "FAMILIES", "random_plan")

_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """
    Tasks to schedule.

    :ivar name: short, unique
    :ivar ports: the port model it is scheduled in
    :ivar build: makes the tasks
    :ivar replica_size: engine ranks of a replica, where there are replicas
    """

    name: str
    ports: PortModel
    build: Callable[[], tuple[Task, ...]]
    replica_size: int = 1


def reshard(name: str, src: str, dst: str, replicas: int = 1) -> Callable[[], tuple[Task, ...]]:
    """Return the tasks of a model on its way from one mesh to replicas of another, cut as a sync would cut them."""

    def build() -> tuple[Task, ...]:
        config = preset(name)
        plan = plan_reshard(layouts(config, MeshSpec.parse(src)), layouts(config, MeshSpec.parse(dst)) * replicas)
        tasks = (task for wave in make_timetable(plan).waves for task in wave.tasks)
        return tuple(replace(task, payload=None) for task in sorted(tasks, key=lambda task: task.id))

    return build


def all_to_all(sources: int, destinations: int, nbytes: int = 64 * _MB) -> Callable[[], tuple[Task, ...]]:
    """Return every source to every destination, source by source; 0 destinations: among the sources themselves."""

    def build() -> tuple[Task, ...]:
        first, count = (sources, destinations) if destinations else (0, sources)
        pairs = [(a, first + b) for a in range(sources) for b in range(count) if a != first + b]
        return tuple(Task(id, (a,), (b,), nbytes) for id, (a, b) in enumerate(pairs))

    return build


def skewed(sources: int, destinations: int, count: int) -> Callable[[], tuple[Task, ...]]:
    """Return pairs of random size: most small, a few large, as of experts beside embeddings."""

    def build() -> tuple[Task, ...]:
        rng = random.Random(count)
        return tuple(
            Task(
                id,
                (rng.randrange(sources),),
                (sources + rng.randrange(destinations),),
                min(int(rng.paretovariate(1.1) * 4 * _MB), 2048 * _MB),
            )
            for id in range(count)
        )

    return build


def skewed_chains(sources: int, destinations: int, count: int) -> Callable[[], tuple[Task, ...]]:
    """Return pairs of few, very different sizes, which cannot be cut, most of which come after an earlier one."""

    def build() -> tuple[Task, ...]:
        rng = random.Random(count)
        return tuple(
            Task(
                id,
                (rng.randrange(sources),),
                (sources + rng.randrange(destinations),),
                rng.choice((8, 8, 8, 16, 32, 512)) * _MB,
                after=(rng.randrange(max(0, id - 4 * sources), id),) if id and rng.random() < 0.7 else (),
            )
            for id in range(count)
        )

    return build


def landing_exchange(tp: int, parts: int, replicas: int) -> Callable[[], tuple[Task, ...]]:
    """Return all ordered pairs in each group of ``parts`` of a replica's ranks: what a landing rank got, passed on."""

    def build() -> tuple[Task, ...]:
        pairs = [
            (replica * tp + group + a, replica * tp + group + b)
            for replica in range(replicas)
            for group in range(0, tp, parts)
            for a in range(parts)
            for b in range(parts)
            if a != b
        ]
        return tuple(Task(id, (a,), (b,), 64 * _MB) for id, (a, b) in enumerate(pairs))

    return build


def relayed(receivers: int, chunks: int, method: str) -> Callable[[], tuple[Task, ...]]:
    """Return a stream of chunks to many receivers, each of which costs its sender a copy."""

    def build() -> tuple[Task, ...]:
        tasks = [Task(chunk, (0,), tuple(range(1, receivers + 1)), 64 * _MB) for chunk in range(chunks)]
        return fan_out(tasks, ports="full", method=method, cost=LinkCost(branching=1.0))  # type: ignore[arg-type]

    return build


def random_broadcasts(sources: int, destinations: int, count: int) -> Callable[[], tuple[Task, ...]]:
    """Return tasks of one sender and one to eight receivers."""

    def build() -> tuple[Task, ...]:
        rng = random.Random(count)
        return tuple(
            Task(
                id,
                (rng.randrange(sources),),
                tuple(sources + actor for actor in rng.sample(range(destinations), rng.randint(1, 8))),
                64 * _MB,
            )
            for id in range(count)
        )

    return build


def random_pairs(sources: int, destinations: int, count: int) -> Callable[[], tuple[Task, ...]]:
    """Return one-to-one tasks of one size."""

    def build() -> tuple[Task, ...]:
        rng = random.Random(count)
        return tuple(
            Task(id, (rng.randrange(sources),), (sources + rng.randrange(destinations),), 64 * _MB)
            for id in range(count)
        )

    return build


WORKLOADS: tuple[Workload, ...] = (
    Workload("7b tp2 to tp2", "half", reshard("qwen2.5-7b", "tp=2", "tp=2"), 2),
    Workload("7b tp3 to tp2", "half", reshard("qwen2.5-7b", "tp=3", "tp=2"), 2),
    Workload("7b tp4,pp2 to tp6", "half", reshard("qwen2.5-7b", "tp=4,pp=2", "tp=6"), 6),
    Workload("7b tp2,pp2,dp2 to tp4 x3", "half", reshard("qwen2.5-7b", "tp=2,pp=2,dp=2", "tp=4", 3), 4),
    Workload("7b tp2 to tp2 x8", "half", reshard("qwen2.5-7b", "tp=2", "tp=2", 8), 2),
    Workload("7b tp2 to tp4 x64", "half", reshard("qwen2.5-7b", "tp=2", "tp=4", 64), 4),
    Workload("70b tp8,pp4 to tp8 x4", "half", reshard("llama-3-70b", "tp=8,pp=4", "tp=8", 4), 8),
    Workload("30b-a3b tp4,pp2,ep4 to tp8 x2", "half", reshard("qwen3-30b-a3b", "tp=4,pp=2,ep=4", "tp=8", 2), 8),
    Workload("30b-a3b ep2 to tp2", "half", reshard("qwen3-30b-a3b", "dp=2,ep=2,etp=1", "tp=2"), 2),
    Workload("mixtral tp2,ep8,dp8 to tp8 x2", "half", reshard("mixtral-8x7b", "tp=2,ep=8,dp=8", "tp=8", 2), 8),
    Workload("world 6: 3 to 3", "half", all_to_all(3, 3), 3),
    Workload("world 12: 6 to 6", "half", all_to_all(6, 6), 6),
    Workload("world 24: 12 to 12", "half", all_to_all(12, 12), 12),
    Workload("world 32: pp4 to pp1", "half", reshard("qwen2.5-7b", "tp=4,pp=4", "tp=4", 4), 4),
    Workload("skewed 8 to 8", "half", skewed(8, 8, 200), 8),
    Workload("skewed 64 to 64", "half", skewed(64, 64, 2000), 8),
    Workload("skewed chains 8 to 8", "half", skewed_chains(8, 8, 100), 8),
    Workload("skewed chains 64 to 64", "half", skewed_chains(64, 64, 2000), 8),
    Workload("colocated 8", "half", all_to_all(8, 0), 8),
    Workload("colocated 33", "half", all_to_all(33, 0), 11),
    Workload("colocated 33, full ports", "full", all_to_all(33, 0), 11),
    Workload("landing exchange tp4/2 x3", "half", landing_exchange(4, 2, 3), 4),
    Workload("landing exchange tp8/4 x6", "half", landing_exchange(8, 4, 6), 8),
    Workload("relay 16 chunks to 31", "full", relayed(31, 16, "tree"), 1),
    Workload("broadcast 16 chunks to 31", "full", relayed(31, 16, "broadcast"), 1),
    Workload("pairs 64 to 64", "half", random_pairs(64, 64, 2000), 8),
    Workload("pairs 512 to 512", "half", random_pairs(512, 512, 20_000), 8),
    Workload("broadcasts 24 to 24", "half", random_broadcasts(24, 24, 500), 8),
    Workload("broadcasts 512 to 512", "half", random_broadcasts(512, 512, 10_000), 8),
)


def merge_chunks(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """Return one task a sender and set of receivers: what is sent where nothing is cut. Not for dependencies."""
    merged: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for task in tasks:
        key = (task.senders, task.receivers)
        merged[key] = merged.get(key, 0) + task.nbytes

    return tuple(Task(id, *key, nbytes) for id, (key, nbytes) in enumerate(merged.items()))


def serial(workload: Workload, tasks: tuple[Task, ...]) -> Schedule:
    """One task after the other."""
    order = plan_waves(tasks, strategy="first_fit", ports=workload.ports).tasks
    return Schedule(tuple(Wave((task,)) for task in order), ports=workload.ports, strategy="serial")


def chatlearn(workload: Workload, tasks: tuple[Task, ...]) -> Schedule:
    """
    ChatLearn's first stage, described anew: one group a sender and its receivers, whole, first fit, a barrier after
    each wave.
    """
    if any(task.after for task in tasks):
        return plan_waves(tasks, strategy="first_fit", ports=workload.ports)

    return plan_waves(merge_chunks(tasks), strategy="first_fit", ports=workload.ports)


def chatlearn_chunks(workload: Workload, tasks: tuple[Task, ...]) -> Schedule:
    """
    ChatLearn's second stage, described anew: first fit, then each wave in chunks of as many pairs as a replica has
    ranks, one chunk after the other. There a last chunk that is not full is dropped; here it stays, or ranks would keep
    old weights.
    """
    waves = chatlearn(workload, tasks).waves
    size = workload.replica_size
    return Schedule(
        tuple(Wave(wave.tasks[start : start + size]) for wave in waves for start in range(0, len(wave.tasks), size)),
        ports=workload.ports,
        strategy="chatlearn_chunks",
    )


def halving(workload: Workload, tasks: tuple[Task, ...]) -> Schedule:
    """
    Rounds in the way of Awex 0.9: ``int(log2(world))`` times the world is halved, and in each part the left half meets
    the right one, each rank one peer at a time. Pairs that never meet, as there are when the world is no power of two,
    go one after the other at the end. One-to-many tasks are sent one by one.
    """
    actors = sorted({actor for task in tasks for actor in task.members})
    rank = {actor: index for index, actor in enumerate(actors)}
    meets = meeting_times(len(actors))
    pairs: dict[tuple[int, int], int] = {}
    for task in tasks:
        for receiver in task.receivers:
            key = (task.senders[0], receiver)
            pairs[key] = pairs.get(key, 0) + task.nbytes

    timed: dict[tuple[int, ...], list[Task]] = {}
    for id, ((sender, receiver), nbytes) in enumerate(pairs.items()):
        low, high = sorted((rank[sender], rank[receiver]))
        # A half-duplex pair exchanges in two steps.
        when = (*meets.get((low, high), (len(actors), id)), int(rank[sender] > rank[receiver]))
        timed.setdefault(when, []).append(Task(id, (sender,), (receiver,), nbytes))

    return Schedule(tuple(Wave(tuple(timed[when])) for when in sorted(timed)), ports=workload.ports, strategy="halving")


def meeting_times(world: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Return for each pair of ranks that ever meets in halving rounds its round and its step in it."""
    times: dict[tuple[int, int], tuple[int, int]] = {}
    parts = [range(world)]
    for round in range(world.bit_length() - 1):
        halves: list[range] = []
        for part in parts:
            middle = len(part) // 2
            left, right = part[:middle], part[middle:]
            halves += [left, right]
            for step in range(len(right)):
                for index, member in enumerate(left):
                    times.setdefault((member, right[(index + step) % len(right)]), (round, step))

        parts = halves

    return times


def cut(workload: Workload, tasks: tuple[Task, ...]) -> Schedule:
    """Ours, for whoever may cut: the same bytes in chunks of 16 MiB or more, as few as is fastest."""
    return plan_divisible(
        merge_chunks(tasks), ports=workload.ports, max_gap=1.02, min_chunk_bytes=16 * _MB, cost=LinkCost()
    ).schedule


#: Schedules of the same bytes, cut or merged in ways of their own.
BASELINES: dict[str, Callable[[Workload, tuple[Task, ...]], Schedule]] = {
    "serial": serial,
    "chatlearn": chatlearn,
    "chatlearn_chunks": chatlearn_chunks,
    "halving": halving,
    "cut": cut,
}


def _uniform(rng: random.Random) -> int:
    return rng.randrange(1, 512) * _MB


def _exponential(rng: random.Random) -> int:
    return int(rng.expovariate(1 / (128 * _MB))) + 1


def _pareto(rng: random.Random) -> int:
    return min(int(rng.paretovariate(1.2) * 32 * _MB), 4096 * _MB)


def _few(rng: random.Random) -> int:
    return rng.choice((3, 64, 64, 272, 1037)) * _MB


SIZES: Sequence[Callable[[random.Random], int]] = (_uniform, _exponential, _pareto, _few)

#: Random plans: how actors are paired, and the port model.
FAMILIES: dict[str, PortModel] = {
    "disjoint pairs, half": "half",
    "any pairs, full": "full",
    "any pairs, half": "half",
    "broadcasts, half": "half",
}


def random_plan(seed: int, family: str) -> tuple[Task, ...]:
    """Return a plan of 2 to 1024 actors with 2 to 12 tasks an actor, of one of four distributions of sizes."""
    rng = random.Random(f"{family} {seed}")
    actors = 2 * round(2 ** rng.uniform(0, 9))
    size = SIZES[seed % len(SIZES)]
    half = actors // 2
    tasks: list[Task] = []
    for id in range(actors * rng.randint(2, 12)):
        sender = rng.randrange(half)
        receivers: tuple[int, ...] = (half + rng.randrange(half),)
        if family.startswith("any") and actors > 2:
            sender, receiver = rng.sample(range(actors), 2)
            receivers = (receiver,)
        elif family.startswith("broadcasts"):
            receivers = tuple(half + actor for actor in rng.sample(range(half), rng.randint(1, min(6, half))))

        tasks.append(Task(id, (sender,), receivers, size(rng)))

    return tuple(tasks)
