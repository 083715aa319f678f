"""One sender, many receivers: one broadcast each time, or a relay in which receivers pass on what they got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from wavecast.scheduler.circulant import receive_blocks, skips
from wavecast.scheduler.coloring import first_fit
from wavecast.scheduler.cost import LinkCost
from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.ports import PortModel, build_graph
from wavecast.scheduler.task import Task

__all__ = ("FanOut", "Hop", "fan_out", "chain_hops", "tree_hops")

FanOut = Literal["auto", "broadcast", "chain", "tree"]
"""How a task reaches its receivers. ``auto`` takes what costs the fewest seconds."""


@dataclass(frozen=True, slots=True)
class Hop:
    """
    A chunk that goes from one node of a relay to another.

    :ivar round: when, counted from 0
    :ivar chunk: which, counted from 0
    :ivar sender: 0 for the source, otherwise a receiver, counted from 1
    :ivar receiver: a receiver, counted from 1
    """

    round: int
    chunk: int
    sender: int
    receiver: int


def fan_out(
    tasks: Iterable[Task], *, ports: PortModel = "half", cost: LinkCost | None = None, method: FanOut = "auto"
) -> tuple[Task, ...]:
    """
    Rewrite tasks of one sender and several receivers into relays: where that is faster, or as ``method`` says.

    Tasks with the same sender and receivers are the chunks of one stream: while a receiver passes a chunk on, it gets
    the next one. A rewritten task becomes one task for each receiver, with the same bytes and payload, that comes after
    the task which brought the bytes to its sender. Tasks of several senders or one receiver stay as they are.

    Rewritten tasks get ids after the highest one given; a task that came after a rewritten one comes after all it
    became. In the full model first fit keeps to the rounds of the relay: a stream alone takes no more waves than the
    relay has rounds. In the half model a node that passes on cannot receive meanwhile, and there are more.

    :param ports: the model that the waves will keep to: give :func:`~wavecast.scheduler.plan_waves` the same
    :param cost: of a link; with its ``branching`` at 0 a broadcast is never slower
    :param method: how; ``auto`` compares the broadcast with the tree (in the half model, with the chain too)
    :return: rewritten tasks at the place of the first chunk of their stream, others as they were
    :raises ScheduleError: for an unknown method, and as :func:`~wavecast.scheduler.plan_waves` does
    """
    tasks = tuple(tasks)
    if method not in get_args(FanOut):
        raise ScheduleError(f"method is {method!r}: it must be one of {', '.join(get_args(FanOut))}")

    build_graph(tasks, ports)
    streams: dict[tuple[int, tuple[int, ...]], list[Task]] = {}
    for task in tasks:
        receivers = tuple(actor for actor in dict.fromkeys(task.receivers) if actor not in task.senders)
        if len(set(task.senders)) == 1 and len(receivers) > 1 and len(receivers) == len(set(task.receivers)):
            streams.setdefault((task.senders[0], receivers), []).append(task)

    next_id = max((task.id for task in tasks), default=-1) + 1
    became: dict[int, tuple[Task, ...]] = {}
    placed: dict[int, tuple[Task, ...]] = {}
    for (sender, receivers), chunks in streams.items():
        hops = _choose(chunks, receivers, ports, cost or LinkCost(), method)
        if hops is None:
            continue

        hop_tasks = _link(chunks, (sender, *receivers), hops, next_id)
        next_id += len(hop_tasks)
        placed[chunks[0].id] = hop_tasks
        for index, chunk in enumerate(chunks):
            became[chunk.id] = tuple(task for task, hop in zip(hop_tasks, hops, strict=True) if hop.chunk == index)

    return tuple(_place(tasks, became, placed))


def chain_hops(receivers: int, chunks: int) -> tuple[Hop, ...]:
    """Return a relay along a line: ``chunks + receivers - 1`` rounds in the full model."""
    return tuple(
        sorted(
            (Hop(chunk + node, chunk, node, node + 1) for chunk in range(chunks) for node in range(receivers)),
            key=lambda hop: (hop.round, hop.sender),
        )
    )


def tree_hops(receivers: int, chunks: int) -> tuple[Hop, ...]:
    """
    Return a relay in ``chunks + ceil(log2(receivers + 1)) - 1`` rounds, in the full model: as few as there can be.

    The last chunk leaves the source in round ``chunks`` at the earliest, and the holders of a chunk at most double in a
    round. That this is reached for any number of receivers and chunks is Traff's theorem (2022): nodes stand in a
    circle, in a round every node sends to the one at the same distance ahead, and distances take turns, so that blocks
    follow each other through trees that share no edge in any round (:mod:`~wavecast.scheduler.circulant`).

    O(receivers * chunks), and a search over the distances for each receiver.
    """
    if receivers < 1 or chunks < 1:
        return ()

    nodes = receivers + 1
    distances = skips(nodes)
    phase = len(distances) - 1
    blocks = [(), *(receive_blocks(node, distances) for node in range(1, nodes))]
    # The last phase ends with the last round, so the first one may be short of its first rounds.
    skipped = -(chunks - 1) % phase
    held = [(1 << chunks) - 1] + [0] * receivers  # per node: bitmask of the chunks it has
    hops: list[Hop] = []
    for round in range(chunks - 1 + phase):
        done, step = divmod(round + skipped, phase)
        now: list[Hop] = []
        for receiver in range(1, nodes):
            # Beyond the last chunk there are none: who would send one has the last chunk, or sent it before.
            chunk = min(blocks[receiver][step] + done * phase - skipped, chunks - 1)
            if chunk >= 0 and not held[receiver] >> chunk & 1:
                now.append(Hop(round, chunk, (receiver - distances[step]) % nodes, receiver))

        for hop in now:
            held[hop.receiver] |= 1 << hop.chunk

        hops += sorted(now, key=lambda hop: hop.sender)

    return tuple(hops)


def _choose(
    chunks: list[Task], receivers: tuple[int, ...], ports: PortModel, cost: LinkCost, method: FanOut
) -> tuple[Hop, ...] | None:
    """Return the hops of the cheapest way, or None for a broadcast of each chunk."""
    # Where further receivers cost nothing: a relay has no fewer rounds than chunks, each as long as the largest.
    if method == "broadcast" or (method == "auto" and not cost.branching):
        return None

    ways = {"chain": chain_hops, "tree": tree_hops}
    if method != "auto":
        return ways[method](len(receivers), len(chunks))

    best: tuple[Hop, ...] | None = None
    lowest = sum(map(cost, chunks))
    bare = [replace(chunk, after=()) for chunk in chunks]
    largest = max(chunk.nbytes for chunk in chunks)
    for way in ways.values():
        hops = way(len(receivers), len(chunks))
        linked = _link(bare, tuple(range(len(receivers) + 1)), hops, 0)
        seconds = (max(first_fit(build_graph(linked, ports))) + 1) * cost.seconds(largest)
        if seconds < lowest:
            best, lowest = hops, seconds

    return best


def _link(chunks: list[Task], nodes: tuple[int, ...], hops: tuple[Hop, ...], first_id: int) -> tuple[Task, ...]:
    brought: dict[tuple[int, int], int] = {}  # (chunk, node): the task that brings it there
    linked: list[Task] = []
    for hop in hops:
        chunk = chunks[hop.chunk]
        id = first_id + len(linked)
        brought[hop.chunk, hop.receiver] = id
        before = chunk.after if hop.sender == 0 else (*chunk.after, brought[hop.chunk, hop.sender])
        linked.append(
            replace(chunk, id=id, senders=(nodes[hop.sender],), receivers=(nodes[hop.receiver],), after=before)
        )

    return tuple(linked)


def _place(
    tasks: tuple[Task, ...], became: dict[int, tuple[Task, ...]], placed: dict[int, tuple[Task, ...]]
) -> Iterator[Task]:
    for task in tasks:
        for written in placed.get(task.id, () if task.id in became else (task,)):
            if any(before in became for before in written.after):
                after = dict.fromkeys(
                    id
                    for before in written.after
                    for id in ([hop.id for hop in became[before]] if before in became else [before])
                )
                written = replace(written, after=tuple(after))

            yield written
