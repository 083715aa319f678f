from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.scheduler import FanOut, LinkCost, PortModel, ScheduleError, Task, fan_out, plan_waves, simulate, verify
from wavecast.scheduler.circulant import receive_blocks, skips
from wavecast.scheduler.fan_out import Hop, chain_hops, tree_hops


def stream(chunks: int, receivers: int, *, nbytes: int = 1) -> list[Task]:
    return [
        Task(chunk, (0,), tuple(range(1, receivers + 1)), nbytes, payload=f"chunk {chunk}") for chunk in range(chunks)
    ]


def check_hops(hops: tuple[Hop, ...], receivers: int, chunks: int) -> int:
    """Check a relay against the full model, and return its rounds."""
    holders = {(chunk, 0): -1 for chunk in range(chunks)}
    used: set[tuple[int, int, str]] = set()
    for hop in hops:
        assert holders[hop.chunk, hop.sender] < hop.round, "sent before it was there"
        assert (hop.chunk, hop.receiver) not in holders, "brought twice"
        assert (hop.round, hop.sender, "out") not in used
        assert (hop.round, hop.receiver, "in") not in used
        used |= {(hop.round, hop.sender, "out"), (hop.round, hop.receiver, "in")}
        holders[hop.chunk, hop.receiver] = hop.round

    assert len(holders) == chunks * (receivers + 1)
    return max((hop.round + 1 for hop in hops), default=0)


@pytest.mark.parametrize("receivers", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 23, 24, 31, 32, 47, 63, 64, 100, 128])
def test_a_tree_brings_k_chunks_to_r_receivers_in_k_plus_log_rounds(receivers: int) -> None:
    for chunks in (1, 2, 3, 5, 8, 13, 16, 33, 64):
        rounds = check_hops(tree_hops(receivers, chunks), receivers, chunks)
        assert rounds == chunks - 1 + math.ceil(math.log2(receivers + 1))


@pytest.mark.parametrize(
    ("receivers", "chunks", "rounds"),
    [(267, 27, 35), (289, 52, 60), (321, 62, 70), (533, 83, 92), (555, 65, 74), (777, 64, 73), (1023, 5, 14)],
)
def test_hundreds_of_receivers_take_as_few_rounds_as_there_can_be(receivers: int, chunks: int, rounds: int) -> None:
    assert check_hops(tree_hops(receivers, chunks), receivers, chunks) == rounds


@pytest.mark.parametrize("nodes", [*range(2, 130), 255, 256, 257, 1000, 1025, 2049])
def test_nodes_send_what_they_have_and_get_one_new_block_a_phase(nodes: int) -> None:
    """What Traff proves of the schedule, for every node and round of a phase."""
    distances = skips(nodes)
    rounds = len(distances) - 1
    blocks = [(), *(receive_blocks(node, distances) for node in range(1, nodes))]
    for node in range(1, nodes):
        (base,) = (block for block in blocks[node] if block >= 0)
        assert sorted(blocks[node]) == [block for block in range(-rounds, 0) if block != base - rounds] + [base]

        for step, block in enumerate(blocks[node]):
            sender = (node - distances[step]) % nodes
            if sender == 0:
                assert block == step
            else:
                assert block in blocks[sender][:step] or block == max(blocks[sender]) - rounds


def test_no_relay_of_up_to_64_chunks_to_up_to_128_receivers_takes_a_round_more_than_the_lower_bound() -> None:
    """Every number of receivers with some numbers of chunks, and every number of chunks with some of receivers."""
    pairs = {(receivers, chunks) for receivers in range(1, 129) for chunks in (1, 2, 3, 4, 7, 16)}
    pairs |= {(receivers, chunks) for receivers in (1, 2, 3, 5, 11, 21, 31, 33, 63, 65) for chunks in range(1, 65)}
    more = [
        tree_hops(receivers, chunks)[-1].round + 1 - (chunks - 1 + receivers.bit_length())
        for receivers, chunks in sorted(pairs)
    ]

    assert len(more) == len(pairs) == 1348
    assert set(more) == {0}


@given(receivers=st.integers(1, 20), chunks=st.integers(1, 20))
def test_a_chain_brings_k_chunks_to_r_receivers_in_k_plus_r_rounds(receivers: int, chunks: int) -> None:
    assert check_hops(chain_hops(receivers, chunks), receivers, chunks) == chunks + receivers - 1


def test_nobody_to_relay_to_makes_no_hops() -> None:
    assert tree_hops(0, 3) == tree_hops(3, 0) == ()


@pytest.mark.parametrize(("receivers", "chunks"), [(2, 4), (3, 5), (7, 8), (8, 16), (31, 6)])
def test_a_relay_takes_no_more_waves_than_it_has_rounds(receivers: int, chunks: int) -> None:
    tasks = fan_out(stream(chunks, receivers), method="tree", ports="full")

    schedule = plan_waves(tasks, ports="full", strategy="first_fit")
    verify(schedule, tasks)
    assert len(schedule.waves) <= chunks + math.ceil(math.log2(receivers + 1))
    assert len(plan_waves(tasks, ports="full").waves) <= len(schedule.waves)


@given(
    chunks=st.integers(1, 5),
    receivers=st.integers(1, 6),
    method=st.sampled_from(("auto", "broadcast", "chain", "tree")),
    ports=st.sampled_from(("half", "full")),
)
def test_every_receiver_gets_every_chunk_and_what_depends_on_it_waits(
    chunks: int, receivers: int, method: FanOut, ports: PortModel
) -> None:
    first = Task(90, (0,), (50,), 1)
    last = Task(91, (1,), (51,), 1, after=(0, 90))
    given_tasks = [
        first,
        *(Task(t.id, t.senders, t.receivers, t.nbytes, (90,), t.payload) for t in stream(chunks, receivers)),
        last,
    ]

    tasks = fan_out(given_tasks, method=method, ports=ports, cost=LinkCost(branching=1.0))

    schedule = plan_waves(tasks, ports=ports)
    verify(schedule, tasks)
    got: dict[object, list[int]] = {}
    by_id = {task.id: task for task in tasks}
    for task in tasks:
        if task.id not in (90, 91):
            got.setdefault(task.payload, []).extend(task.receivers)
            assert 90 in task.after

    assert got == {f"chunk {chunk}": got[f"chunk {chunk}"] for chunk in range(chunks)}
    assert all(sorted(actors) == list(range(1, receivers + 1)) for actors in got.values())
    (end,) = (task for task in tasks if task.id == 91)
    waits = {id for id in end.after if id != 90}
    assert waits == {task.id for task in tasks if task.payload == "chunk 0"}
    assert all(before in by_id for task in tasks for before in task.after)


def test_a_broadcast_is_kept_where_a_switch_copies() -> None:
    tasks = stream(8, 7, nbytes=1 << 30)

    assert fan_out(tasks, cost=LinkCost()) == tuple(tasks)


def test_a_relay_is_taken_where_each_receiver_costs_its_sender_a_copy() -> None:
    tasks = stream(8, 7, nbytes=1 << 30)
    cost = LinkCost(branching=1.0)

    relayed = fan_out(tasks, cost=cost, ports="full")

    before = simulate(plan_waves(tasks, ports="full"), cost).seconds
    after = simulate(plan_waves(relayed, ports="full"), cost).seconds
    assert len(relayed) == 56
    # 10 rounds instead of 8 broadcasts of 7 copies each.
    assert after == pytest.approx(before * 10 / 56, rel=0.05)


@pytest.mark.parametrize(("receivers", "chunks"), [(2, 8), (2, 32), (3, 4), (3, 16), (7, 8)])
def test_a_relay_by_default_is_no_slower_on_waves_planned_by_default(receivers: int, chunks: int) -> None:
    tasks = stream(chunks, receivers, nbytes=64 << 20)
    cost = LinkCost(branching=1.0)

    relayed = simulate(plan_waves(fan_out(tasks, cost=cost)), cost, barrier=True).seconds

    assert relayed <= simulate(plan_waves(tasks), cost, barrier=True).seconds


def test_tasks_of_one_receiver_or_several_senders_stay() -> None:
    tasks = [Task(0, (0,), (1,), 5), Task(1, (0, 1), (2, 3), 5), Task(2, (4,), (4, 5), 5)]

    assert fan_out(tasks, method="chain") == tuple(tasks)


def test_an_unknown_method_is_told_with_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match="method is 'flood': it must be one of auto, broadcast, chain, tree"):
        fan_out([], method="flood")  # type: ignore[arg-type]
