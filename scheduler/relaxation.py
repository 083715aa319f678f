"""
What cutting can reach and what it cannot: the linear programme of waves of any length.

Give every set of tasks that share no port a length, such that each task is in sets of its own length together, and the
sum of all lengths is least. That is what tasks cut anywhere take, exactly (fractional edge colouring, weighted). Its
dual gives each task a price a byte, such that no set costs more than 1: then all bytes at their prices are a lower
bound, whoever made the prices up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, fsum

from wavecast.scheduler.bounds import divisible_nbytes
from wavecast.scheduler.leveling import StepBudget, level_rounds
from wavecast.scheduler.ports import TaskGraph

__all__ = ("Relaxation", "relax")

# Sets of members up to which it is tried: a pivot takes the square of it.
_MOST_CLASSES = 400
_MOST_STEPS = 400_000_000
_MOST_NODES = 20_000
# Tasks looked at for the sets to start from: many tasks of few sets are given up.
_LEVEL_STEPS = 12_000_000
_EPSILON = 1e-9
_CLOSE = 1.005
# Share of the best prices so far in those that are asked for (Wentges 1997).
_STEADY = 0.9


@dataclass(frozen=True, slots=True)
class Relaxation:
    """
    What a set of tasks takes when they may be cut anywhere.

    :ivar bound: bytes: the sum over the waves of the largest piece is never less; 0 when nothing was found out
    :ivar rounds: lengths in whole units, and tasks that share no port, which together hold every task; as long as the
        bound but for rounding, unless the search was given up; empty when it was not begun
    """

    bound: int
    rounds: tuple[tuple[int, tuple[int, ...]], ...]


def relax(graph: TaskGraph, *, unit: int = 1, bound_enough: float = float("inf"), sum_enough: float = 0) -> Relaxation:
    """
    Solve the programme by column generation (Gilmore and Gomory 1961), for small plans without dependencies.

    Sets enter by the simplex method, in each step the dearest one at the prices of now, found by branch and bound over
    the tasks of each first port. Tasks of the same ports count as one. It stops when sum and bound are within half a
    per cent of each other, or after a count of steps, so that it gives the same everywhere: mostly well under a second,
    some seconds at worst. Not begun for tasks of more than 400 different sets of ports.

    :param unit: bytes of a unit; each task counts as a whole number of these in the rounds
    :param bound_enough: stop when the bound is at least so many bytes
    :param sum_enough: stop when the rounds are at most so many bytes together
    """
    classes: dict[tuple[int, ...], list[int]] = {}
    for task, ports in enumerate(graph.ports):
        if graph.nbytes[task]:
            classes.setdefault(tuple(sorted(ports)), []).append(task)

    if not classes or len(classes) > _MOST_CLASSES:
        return Relaxation(0, ())

    members = list(classes.values())
    master = _Master([sum(graph.nbytes[task] for task in tasks) for tasks in members])
    pricing = _Pricing(list(classes))
    place = {task: index for index, tasks in enumerate(members) for task in tasks}
    rounds = level_rounds(graph, graph.nbytes, parts=32, budget=StepBudget(_LEVEL_STEPS))
    if not rounds:
        return Relaxation(0, ())

    known = [tuple(place[task] for task in tasks) for _, tasks in rounds]
    bound, steady = 0.0, [0.0] * len(members)
    while master.steps + pricing.steps < _MOST_STEPS:
        value, chosen = max((master.price(each), each) for each in known)
        if value > 1 + _EPSILON:
            master.enter(chosen)
            continue

        # Prices leap about: those that gave the best bound so far, moved towards those of now, tell more.
        for share in (_STEADY, 0.0):
            prices = [share * old + (1 - share) * new for old, new in zip(steady, master.prices, strict=True)]
            value, chosen, exact = pricing.dearest(prices)
            if exact and (worth := master.worth(prices) / max(value, _EPSILON)) > bound:
                bound, steady = worth, [price / max(value, _EPSILON) for price in prices]

            if master.price(chosen) > 1 + _EPSILON:
                break
        else:
            break

        total = fsum(master.sizes)
        if total <= max(bound * _CLOSE, sum_enough) or bound >= bound_enough:
            break

        master.enter(chosen)

    # What needs no prices holds too, and may be all there is when the steps were over early.
    bound = max(bound, divisible_nbytes(graph))
    # Whole bytes, and what a float lacks in precision must not make them too many.
    return Relaxation(ceil(bound * (1 - _EPSILON)), tuple(_whole(graph, members, master, unit)))


class _Master:
    """The simplex method on what is known so far: a length for as many sets as there are classes."""

    def __init__(self, demands: list[int]) -> None:
        count = len(demands)
        self.demands = demands
        self.sets: list[tuple[int, ...]] = [(index,) for index in range(count)]
        self.sizes = [float(demand) for demand in demands]  # of each set
        self.prices = [1.0] * count  # of each class, a unit
        self.steps = 0
        self._inverse = [[float(row == column) for column in range(count)] for row in range(count)]

    def worth(self, prices: list[float]) -> float:
        """Return all demands at ``prices``, none of them below 0."""
        return fsum(demand * price for demand, price in zip(self.demands, prices, strict=True) if price > 0)

    def price(self, chosen: tuple[int, ...]) -> float:
        """Return what a set costs at the prices of now."""
        return fsum(self.prices[index] for index in chosen)

    def enter(self, chosen: tuple[int, ...]) -> None:
        """Let the set ``chosen``, which costs more than 1, grow until it takes the place of another one."""
        value = self.price(chosen)
        rows = self._inverse
        drops = [fsum(row[index] for index in chosen) for row in rows]
        out = min(
            (row for row, drop in enumerate(drops) if drop > _EPSILON), key=lambda row: self.sizes[row] / drops[row]
        )
        size = self.sizes[out] / drops[out]
        pivot = [entry / drops[out] for entry in rows[out]]
        for row, drop in enumerate(drops):
            if row != out and drop:
                rows[row] = [entry - drop * other for entry, other in zip(rows[row], pivot, strict=True)]
                self.sizes[row] = max(0.0, self.sizes[row] - drop * size)
                self.steps += len(pivot)

        rows[out], self.sizes[out], self.sets[out] = pivot, size, chosen
        self.prices = [price + (1 - value) * entry for price, entry in zip(self.prices, pivot, strict=True)]


class _Pricing:
    """The dearest set of classes that share no port."""

    def __init__(self, edges: list[tuple[int, ...]]) -> None:
        self.steps = 0
        self._masks = [sum(1 << port for port in edge) for edge in edges]
        self._by_first: dict[int, list[int]] = {}
        for index, edge in enumerate(edges):
            self._by_first.setdefault(edge[0], []).append(index)

    def dearest(self, prices: list[float]) -> tuple[float, tuple[int, ...], bool]:
        """Return its price, the set itself, and whether it is sure that there is none dearer."""
        groups = [
            sorted(((prices[index], index) for index in group if prices[index] > _EPSILON), reverse=True)
            for group in self._by_first.values()
        ]
        groups = sorted((group for group in groups if group), key=lambda group: -group[0][0])
        # At most the dearest of each group to come can be added.
        to_come = [0.0]
        for group in reversed(groups):
            to_come.append(to_come[-1] + group[0][0])

        to_come.reverse()
        best, chosen, nodes = 0.0, tuple[int, ...](), 0
        stack: list[tuple[int, int, float, tuple[int, ...]]] = [(0, 0, 0.0, ())]
        while stack and nodes < _MOST_NODES:
            nodes += 1
            depth, used, value, taken = stack.pop()
            if value > best + _EPSILON:
                best, chosen = value, taken

            if value + to_come[depth] <= best + _EPSILON:
                continue

            stack.append((depth + 1, used, value, taken))
            for price, index in reversed(groups[depth]):
                if not self._masks[index] & used and value + price + to_come[depth + 1] > best + _EPSILON:
                    stack.append((depth + 1, used | self._masks[index], value + price, (*taken, index)))

        self.steps += 20 * nodes
        return best, chosen, not stack


def _whole(graph: TaskGraph, members: list[list[int]], master: _Master, unit: int) -> list[tuple[int, tuple[int, ...]]]:
    """Hand the lengths of sets of classes to tasks, in whole units, and level what rounding leaves over."""
    left = [-(-nbytes // unit) for nbytes in graph.nbytes]
    turn = [0] * len(members)
    rounds: list[tuple[int, tuple[int, ...]]] = []
    for size, chosen in sorted(zip(master.sizes, master.sets, strict=True), key=lambda each: (-each[0], each[1])):
        rest = int(size / unit + _EPSILON)
        while rest:
            tasks: list[int] = []
            for index in chosen:
                while turn[index] < len(members[index]) and not left[members[index][turn[index]]]:
                    turn[index] += 1

                if turn[index] < len(members[index]):
                    tasks.append(members[index][turn[index]])

            if not tasks:
                break

            length = min(rest, *(left[task] for task in tasks))
            rest -= length
            rounds.append((length, tuple(sorted(tasks))))
            for task in tasks:
                left[task] -= length

    return rounds + level_rounds(graph, left, parts=64)
