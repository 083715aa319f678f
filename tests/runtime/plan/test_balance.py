"""Senders: level bytes, near holders, few groups, ties that rotate."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavecast.runtime.layout.hf import layouts
from wavecast.runtime.layout.mesh import MeshSpec
from wavecast.runtime.layout.shard import Place
from wavecast.runtime.plan.balance import Demand, choose_senders, level_loads
from wavecast.runtime.plan.reshard import plan_reshard
from wavecast.runtime.plan.tasks import group_routes
from wavecast.runtime.presets import preset

MIB = 1 << 20


def sent(demands: list[Demand], shares: list[list[tuple[tuple[int, int], ...]]]) -> Counter[int]:
    """Return each sender's bytes, after checking that every box is shared out whole and by its holders."""
    totals: Counter[int] = Counter()
    for demand, found in zip(demands, shares, strict=True):
        assert len(found) == demand.count
        for share in found:
            assert sum(rows for _, rows in share) == demand.rows
            for sender, rows in share:
                assert sender in demand.holders
                assert rows > 0
                totals[sender] += rows * demand.nbytes // demand.rows

    return totals


@pytest.mark.parametrize(
    ("totals", "loads"),
    [
        ({(0, 1): 10, (0,): 4}, {0: 7, 1: 7}),
        ({(0,): 9, (0, 1): 4}, {0: 9, 1: 4}),
        ({(0, 1, 2): 7}, {0: 3, 1: 2, 2: 2}),
        ({(0, 1): 6, (1, 2): 6, (2, 3): 0}, {0: 4, 1: 4, 2: 4, 3: 0}),
        ({(0, 1): 12, (1, 2): 3, (2,): 3}, {0: 6, 1: 6, 2: 6}),
        ({}, {}),
    ],
)
def test_bytes_are_poured_level(totals, loads) -> None:
    quotas, found = level_loads(totals)
    assert {holders: sum(amounts) for holders, amounts in quotas.items()} == totals
    assert all(abs(found[actor] - load) <= 1 for actor, load in loads.items())
    assert sum(found.values()) == sum(loads.values())


@given(
    st.dictionaries(
        st.sets(st.integers(0, 5), min_size=1).map(lambda actors: tuple(sorted(actors))),
        st.integers(1, 10**6),
        min_size=1,
        max_size=8,
    )
)
def test_no_spread_has_a_lower_maximum(totals: dict[tuple[int, ...], int]) -> None:
    # Hall's condition: what only some actors hold, they must send between them.
    bound = max(
        sum(nbytes for holders, nbytes in totals.items() if set(holders) <= set(group)) / size
        for size in range(1, 7)
        for group in combinations(range(6), size)
    )
    quotas, loads = level_loads(totals)
    assert {holders: sum(amounts) for holders, amounts in quotas.items()} == totals
    assert all(amount >= 0 for amounts in quotas.values() for amount in amounts)
    assert max(loads.values()) <= bound * 1.01 + 6


@given(st.data())
def test_senders_are_level_within_a_box_and_the_slack(data: st.DataObject) -> None:
    demands = [
        Demand(
            holders=tuple(sorted(data.draw(st.sets(st.integers(0, 5), min_size=1)))),
            receivers=tuple(sorted(data.draw(st.sets(st.integers(6, 9), min_size=1)))),
            nbytes=(rows := data.draw(st.integers(1, 50))) * data.draw(st.integers(1, 200_000)),
            rows=rows,
            count=data.draw(st.integers(1, 30)),
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    totals: Counter[tuple[int, ...]] = Counter()
    for demand in demands:
        totals[demand.holders] += demand.nbytes * demand.count

    _, loads = level_loads(totals)
    found = sent(demands, choose_senders(demands, [None] * 10))
    # A box may stick out, at most once for each set of holders an actor is in: it stays whole where the holder with the
    # most room could take less than 256 KiB of it, and so could, but for a row, each of the others.
    coarse = max(len(demand.holders) * ((256 << 10) + demand.nbytes // demand.rows) for demand in demands)
    assert max(found.values()) <= max(loads.values()) * (1 + 1 / 64) + coarse * len(totals)


def test_a_box_too_large_to_level_is_cut_along_its_rows() -> None:
    demands = [Demand(holders=(0, 1, 2), receivers=(3,), nbytes=96 * MIB, rows=96, count=1)]
    assert choose_senders(demands, [None] * 4) == [[((0, 32), (1, 32), (2, 32))]]


def test_a_small_box_stays_whole() -> None:
    demands = [Demand(holders=(0, 1), receivers=(2,), nbytes=4096, rows=64, count=1)]
    assert choose_senders(demands, [None] * 3) == [[((0, 64),)]]


def test_a_cut_box_reaches_its_receiver_whole(kit) -> None:
    shape = (4099, 65)
    sources, destinations = kit.split("w", shape, 1, copies=3), kit.split("w", shape, 1, copies=2)
    plan = plan_reshard(sources, destinations)
    assert [route.sender for route in plan.routes] == [0, 1, 2]
    kit.apply_routes(plan.routes, sources, destinations)


def test_flows_fill_one_holder_before_they_open_the_next() -> None:
    demands = [Demand((0, 1, 2, 3), (receiver,), nbytes=MIB, rows=4, count=100) for receiver in (4, 5)]
    shares = choose_senders(demands, [None] * 6)
    assert sent(demands, shares) == {0: 50 * MIB, 1: 50 * MIB, 2: 50 * MIB, 3: 50 * MIB}
    pairs = {
        (sender, demand.receivers)
        for demand, each in zip(demands, shares, strict=True)
        for s in each
        for sender, _ in s
    }
    assert len(pairs) == 4


def test_a_holder_that_serves_the_same_receivers_is_preferred() -> None:
    demands = [
        Demand((1,), (2,), nbytes=100 * MIB, rows=1, count=1),
        Demand((0,), (3,), nbytes=100 * MIB, rows=1, count=1),
        Demand((0, 1), (2,), nbytes=1000, rows=1, count=5),
        Demand((0, 1), (3,), nbytes=1000, rows=1, count=5),
    ]
    shares = choose_senders(demands, [None] * 4)
    assert {share[0][0] for share in shares[2]} == {1}
    assert {share[0][0] for share in shares[3]} == {0}


def test_ties_rotate_over_the_holders() -> None:
    demands = [Demand((0, 1, 2), (receiver,), nbytes=1000, rows=1, count=1) for receiver in (3, 4, 5)]
    assert [share[0][0][0] for share in choose_senders(demands, [None] * 6)] == [0, 1, 2]


def test_a_holder_on_the_same_device_sends() -> None:
    places = [Place("a", "gpu0"), Place("a", "gpu1"), Place("b", "gpu2"), Place("a", "gpu1"), Place("a", "gpu0")]
    demands = [Demand((0, 1, 2), (receiver,), nbytes=MIB, rows=4, count=8) for receiver in (3, 4)]
    shares = choose_senders(demands, places)
    assert set(shares[0]) == {((1, 4),)}
    assert set(shares[1]) == {((0, 4),)}


def test_a_holder_on_the_same_node_sends() -> None:
    places = [Place("a", "gpu0"), Place("b", "gpu1"), Place("b", "gpu2"), Place("a", "gpu3")]
    demands = [Demand((0, 1), (receiver,), nbytes=MIB, rows=4, count=8) for receiver in (2, 3)]
    shares = choose_senders(demands, places)
    assert set(shares[0]) == {((1, 4),)}
    assert set(shares[1]) == {((0, 4),)}


def test_equal_device_names_on_two_nodes_are_not_near() -> None:
    places = [Place("a", "cpu"), Place("b", "cpu"), Place("b", "cpu")]
    assert choose_senders([Demand((0, 1), (2,), MIB, 4, 1)], places) == [[((1, 4),)]]


def test_near_holders_do_not_carry_far_more_than_their_part() -> None:
    places = [Place("a", "gpu0"), *(Place("b", f"gpu{n}") for n in range(1, 4)), Place("a", "gpu9")]
    demands = [Demand((0, 1, 2, 3), (4,), nbytes=MIB, rows=4, count=40)]
    assert sent(demands, choose_senders(demands, places)) == {0: 10 * MIB, 1: 10 * MIB, 2: 10 * MIB, 3: 10 * MIB}


@pytest.mark.parametrize(
    ("src", "dst", "replicas", "groups"),
    [
        ("tp=2,dp=2", "tp=2", 1, 5),
        ("tp=2,dp=4", "tp=4", 3, 13),
        ("tp=1,dp=8", "tp=2", 1, 9),
        ("tp=4,dp=3", "tp=2", 2, 13),
    ],
)
def test_a_7b_model_is_sent_level_and_by_few_groups(src: str, dst: str, replicas: int, groups: int) -> None:
    config = preset("qwen2.5-7b")
    plan = plan_reshard(layouts(config, MeshSpec.parse(src)), layouts(config, MeshSpec.parse(dst)) * replicas)
    loads = plan.sent_nbytes()
    assert max(loads) * len(loads) / sum(loads) <= 1.005
    assert len(group_routes(plan.routes)) <= groups
