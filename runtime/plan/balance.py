"""Who sends what: level bytes, near holders, few groups of actors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from wavecast.runtime.layout.shard import Place

__all__ = ("Demand", "Share", "choose_senders", "level_loads")

#: One sender's part of a box, as (sender, rows); the parts of a box follow each other along the rows.
Share = tuple[tuple[int, int], ...]

_NEAR_FACTOR = 2  # near holders may come to carry this many times their level load before farther ones help
_SLACK = 128  # one part in so many of its level load may be added to a sender, to spare a cut or a group of actors
_MIN_CUT_NBYTES = 256 << 10  # less than this is never cut off: it moves in about the time a message takes anyway
_SWEEP_STEPS = 2_000_000
_Actors = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """
    Boxes alike in everything but their tensor.

    :ivar holders: actors of which any may send, ascending, at least one
    :ivar receivers: actors that want each box
    :ivar nbytes: of one box
    :ivar rows: into how many equal parts one box may be cut
    :ivar count: how many boxes
    """

    holders: tuple[int, ...]
    receivers: tuple[int, ...]
    nbytes: int
    rows: int
    count: int


def choose_senders(demands: Sequence[Demand], places: Sequence[Place | None]) -> list[list[Share]]:
    """
    Choose for every box who sends it; ``places[actor]`` is where an actor is, if known.

    First each set of holders is given quotas that level the bytes sent (see :func:`level_loads`). Then boxes are
    dealt out, largest first, and stay with one sender until its quota is used up: as in McNaughton's wrap-around rule
    (1959) for preemptive jobs on equal machines, few boxes must then be cut (along their rows, at the quota's end)
    and few pairs of sender and receivers come about, each of which can cost a communicator. A sender that already
    serves the same receivers is preferred, within one part in 128 of its load. Only holders nearest to a receiver
    (same device, else same node) are asked, as long as that at most doubles the load they would have otherwise. Ties
    rotate over the holders, as the one chosen has less left.

    :return: for each demand, one share a box; every sender's bytes are within about one part in 128 of level, but for
        boxes that would have to be cut into less than 256 KiB for each of their holders and are left whole
    """
    allowed = _choose_near(demands, places)
    quotas, loads = level_loads(_total(demands, allowed))
    ledger = _Ledger(quotas, {actor: load // _SLACK for actor, load in loads.items()})

    shares: list[list[Share]] = []
    free: list[int] = []
    for index, (demand, holders) in enumerate(zip(demands, allowed, strict=True)):
        if len(holders) == 1:
            shares.append([((holders[0], demand.rows),)] * demand.count)
            ledger.open(holders[0], demand.receivers)
        else:
            shares.append([])
            free.append(index)

    for index in sorted(free, key=lambda index: -demands[index].nbytes):
        demand = demands[index]
        flow = ledger.flow(allowed[index], demand.receivers)
        shares[index] = [ledger.take(flow, demand) for _ in range(demand.count)]

    return shares


def level_loads(totals: Mapping[_Actors, int]) -> tuple[dict[_Actors, list[int]], dict[int, int]]:
    """
    Spread ``totals[holders]`` bytes over each tuple of holders so that the actors' loads are level.

    Tuple by tuple the bytes are poured again over the other tuples' loads, until nothing moves: block coordinate
    descent on the sum of squares, whose least value also has the least possible maximum. Stops early at about two
    million steps.

    :return: for each tuple of holders the bytes of each of them, and each actor's load
    """
    loads: dict[int, int] = {}
    quotas: dict[_Actors, list[int]] = {}
    for holders, nbytes in totals.items():
        quotas[holders] = [0] * len(holders)
        for actor in holders:
            loads.setdefault(actor, 0)

        if len(holders) == 1:
            quotas[holders][0] = nbytes
            loads[holders[0]] += nbytes

    free = [holders for holders in quotas if len(holders) > 1]
    tolerance = sum(totals.values()) // 4096
    sweeps = max(4, min(64, _SWEEP_STEPS // (1 + sum(map(len, free)))))
    for _ in range(sweeps):
        moved = 0
        for holders in free:
            before = quotas[holders]
            others = [loads[actor] - quota for actor, quota in zip(holders, before, strict=True)]
            after = _pour(totals[holders], others)
            moved += sum(abs(a - b) for a, b in zip(after, before, strict=True))
            quotas[holders] = after
            for actor, other, quota in zip(holders, others, after, strict=True):
                loads[actor] = other + quota

        if moved <= tolerance:
            break

    return quotas, loads


def _pour(nbytes: int, loads: Sequence[int]) -> list[int]:
    """Return how much of ``nbytes`` goes on top of each load so that the least loaded end up level."""
    order = sorted(range(len(loads)), key=lambda i: loads[i])
    width, filled = 0, 0
    for i in order:
        if width and loads[i] * width - filled >= nbytes:
            break

        width += 1
        filled += loads[i]

    surface, spare = divmod(nbytes + filled, width)
    amounts = [0] * len(loads)
    for rank, i in enumerate(order[:width]):
        amounts[i] = surface - loads[i] + (rank < spare)

    return amounts


def _total(demands: Sequence[Demand], allowed: Sequence[_Actors]) -> dict[_Actors, int]:
    totals: dict[_Actors, int] = {}
    for demand, holders in zip(demands, allowed, strict=True):
        totals[holders] = totals.get(holders, 0) + demand.nbytes * demand.count

    return totals


def _choose_near(demands: Sequence[Demand], places: Sequence[Place | None]) -> list[_Actors]:
    """Return who may send each demand: the nearest holders, or all where the nearest would carry too much."""
    everyone = [demand.holders for demand in demands]
    if all(place is None for place in places):
        return everyone

    known: dict[tuple[_Actors, _Actors], _Actors] = {}
    nearest: list[_Actors] = []
    for demand in demands:
        key = (demand.holders, demand.receivers)
        if key not in known:
            known[key] = _nearest(demand.holders, demand.receivers, places)

        nearest.append(known[key])

    _, level = level_loads(_total(demands, everyone))
    _, loads = level_loads(_total(demands, nearest))
    return [
        near if all(loads[actor] <= _NEAR_FACTOR * level[actor] for actor in near) else holders
        for near, holders in zip(nearest, everyone, strict=True)
    ]


def _nearest(holders: _Actors, receivers: _Actors, places: Sequence[Place | None]) -> _Actors:
    if len(holders) == 1:
        return holders

    around = [place for place in (places[actor] for actor in receivers) if place is not None]
    nodes = {place.node for place in around}
    devices = {(place.node, place.device) for place in around}

    def nearness(actor: int) -> int:
        place = places[actor]
        if place is None or place.node not in nodes:
            return 0

        return 2 if (place.node, place.device) in devices else 1

    best = max(nearness(actor) for actor in holders)
    return tuple(actor for actor in holders if nearness(actor) == best)


@dataclass(slots=True, eq=False)
class _Flow:
    """Boxes with the same possible senders and the same receivers."""

    holders: _Actors
    left: list[int]  # of each holder's quota; shared by all flows with these holders
    opened: set[int]  # actors that serve these receivers; shared by all flows with these receivers
    current: int = -1


@dataclass(slots=True, eq=False)
class _Ledger:
    """What every possible sender may still take."""

    quotas: dict[_Actors, list[int]]
    slack: dict[int, int]
    _flows: dict[tuple[_Actors, _Actors], _Flow] = field(default_factory=dict)
    _opened: dict[_Actors, set[int]] = field(default_factory=dict)

    def open(self, sender: int, receivers: _Actors) -> None:
        self._opened.setdefault(receivers, set()).add(sender)

    def flow(self, holders: _Actors, receivers: _Actors) -> _Flow:
        key = (holders, receivers)
        if key not in self._flows:
            opened = self._opened.setdefault(receivers, set())
            self._flows[key] = _Flow(holders, self.quotas[holders], opened)

        return self._flows[key]

    def take(self, flow: _Flow, demand: Demand) -> Share:
        """Give one box of ``demand`` to a sender, or to several where no quota has room for it."""
        current, nbytes = flow.current, demand.nbytes
        if current >= 0 and flow.left[current] >= nbytes:
            flow.left[current] -= nbytes
            return ((flow.holders[current], demand.rows),)

        share: list[tuple[int, int]] = []
        rows = demand.rows
        row_nbytes = nbytes // rows
        while rows:
            index, taken = self._pick(flow, rows, row_nbytes)
            self._charge(flow, index, taken * row_nbytes)
            share.append((flow.holders[index], taken))
            rows -= taken

        return tuple(share)

    def _pick(self, flow: _Flow, rows: int, row_nbytes: int) -> tuple[int, int]:
        """Return which holder is to send how many rows."""
        nbytes = rows * row_nbytes
        left, holders = flow.left, flow.holders
        fits = [i for i, actor in enumerate(holders) if left[i] + self.slack[actor] >= nbytes]
        if fits:
            served = [i for i in fits if holders[i] in flow.opened]
            return max(served or fits, key=lambda i: left[i]), rows

        # 1. nobody has room for all of it: fill up whoever has most, if that is worth a cut
        widest = max(range(len(left)), key=lambda i: left[i])
        taken = left[widest] // row_nbytes
        if taken and min(taken, rows - taken) * row_nbytes >= _MIN_CUT_NBYTES:
            return widest, taken

        # 2. else let the one least over its quota take it
        return widest, rows

    def _charge(self, flow: _Flow, index: int, nbytes: int) -> None:
        sender = flow.holders[index]
        over = max(0, nbytes - flow.left[index])
        flow.left[index] -= nbytes - over
        self.slack[sender] = max(0, self.slack[sender] - over)
        flow.current = index
        flow.opened.add(sender)
