"""How a sync is prepared when receivers pass on what they got."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import pytest

from wavecast.runtime.carriers import Carriers
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.scheduler import LinkCost


def side(parts: int, tensor: str) -> list[Layout]:
    """The layouts of ``parts`` actors that share twelve rows of 64 float32."""
    size = 12 // parts
    return [Layout((Piece(tensor, Box((part * size, 0), (size, 64)), (12, 64), "float32"),)) for part in range(parts)]


def made(
    sources: Sequence[Layout],
    destinations: Sequence[Layout],
    *,
    options: SyncOptions,
    carriers: Carriers | None = None,
) -> Preparation:
    return prepare(sources, destinations, options, None, carriers or Carriers("gloo"))


@pytest.mark.parametrize("method", ["chain", "tree"])
def test_replicas_are_reached_hop_by_hop_when_asked_for(method: Literal["chain", "tree"]) -> None:
    """Six chunks of two rows to three replicas: eighteen hops between two actors each, and no group."""
    sources, destinations = side(1, "w"), [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    ready = made(sources, destinations, options=SyncOptions(chunk_bytes=512, fan_out=method))
    assert ready.groups == ()
    assert len(ready.schedule.tasks) == 18
    assert [
        len([step for step in program.steps if step.receivers == (program.actor,)]) for program in ready.programs
    ] == [0, 6, 6, 6]
    assert any(sender > 0 for sender, _ in ready.edges)


def test_calls_reach_a_relay_in_the_order_of_its_program_in_full_duplex_too() -> None:
    """A plain actor takes one call at a time: one that came before its turn would keep out the one it waits for."""
    sources, destinations = side(1, "w"), [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    ready = made(sources, destinations, options=SyncOptions(chunk_bytes=512, fan_out="tree", ports="full"))
    assert ready.schedule.ports == "full"
    assert ready.driven.waves == ready.schedule.waves
    assert any(
        len({*task.members, *other.members}) < 4
        for wave in ready.schedule.waves
        for task, other in itertools.combinations(wave.tasks, 2)
    )
    tasks = ready.driven.tasks
    in_order = {tuple(tasks[position].id for position in queue) for queue in ready.driven.order.queues}
    assert in_order == {tuple(step.task for step in program.steps) for program in ready.programs}


def test_a_relay_is_chosen_by_cost_and_shows_in_the_digest() -> None:
    sources, destinations = side(1, "w"), [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    copied = LinkCost(alpha_seconds=0.0, branching=1.0)
    options = [
        SyncOptions(chunk_bytes=512),
        SyncOptions(chunk_bytes=512, fan_out="broadcast", link=copied),
        SyncOptions(chunk_bytes=512, link=copied),
        SyncOptions(chunk_bytes=512, fan_out="chain"),
        SyncOptions(chunk_bytes=512, fan_out="tree", ports="full"),
    ]
    found = [made(sources, destinations, options=each) for each in options]
    assert [bool(ready.groups) for ready in found] == [True, True, False, False, False]
    digests = [ready.digest for ready in found]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_relays_hops_are_never_pulled() -> None:
    everyone = frozenset(itertools.permutations(range(4), 2))
    sources, destinations = side(1, "w"), [*side(1, "w"), *side(1, "w"), *side(1, "w")]
    options = SyncOptions(chunk_bytes=512)
    pulled = made(sources, destinations, options=options, carriers=Carriers("nccl", everyone))
    moved = made(
        sources,
        destinations,
        options=SyncOptions(chunk_bytes=512, fan_out="chain"),
        carriers=Carriers("nccl", everyone),
    )
    assert moved.pulls == ()
    assert sorted(moved.edges) == [(0, 1), (1, 2), (2, 3)]
    assert moved.carriers.reasons == ("relays send on what they have unpacked",)
    assert pulled.digest != moved.digest
