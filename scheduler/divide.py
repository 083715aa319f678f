"""Tasks that may be cut: chunks of equal bytes, and schedules that reach the busiest port's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from wavecast.scheduler.bounds import divisible_nbytes, lower_bound, uncut_nbytes
from wavecast.scheduler.cost import LinkCost
from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.konig import is_bipartite
from wavecast.scheduler.leveling import StepBudget, level_rounds
from wavecast.scheduler.openshop import open_shop
from wavecast.scheduler.ports import PortModel, TaskGraph, build_graph
from wavecast.scheduler.relaxation import relax
from wavecast.scheduler.schedule import Schedule, check_strategy, gather, plan_waves
from wavecast.scheduler.task import Task

__all__ = ("chunk_sizes", "Cut", "Division", "plan_divisible", "plan_preemptive")

# So many times a size that first fit cannot do with is tried with a strategy that searches.
_SEARCHES = 5
# More chunks a task than this are left to rounds where colouring is only a heuristic.
_PIECES_PER_TASK = 4
# How often rounds look again at what is left: the coarser make fewer pieces.
_LOOK_AGAIN = (16, 32, 64, 128, 256)
# What may be looked at: memberships and dependencies of the chunks that are coloured, some five seconds of one core.
_CHUNK_STEPS = 1_000_000
# And tasks looked at in rounds: as long again.
_ROUND_STEPS = 12_000_000
# Rounding to whole units makes the rounds of the linear programme a little longer.
_ROOM = 0.99


def chunk_sizes(nbytes: int, *, chunk_bytes: int, min_chunk_bytes: int = 1) -> tuple[int, ...]:
    """
    Cut ``nbytes`` into as few chunks as ``chunk_bytes`` allows, equal to within one byte, larger ones first.

    :param chunk_bytes: the most a chunk may have
    :param min_chunk_bytes: rather fewer, longer chunks than one below this; never decides while it is at most half of
        ``chunk_bytes``
    :return: one chunk of no bytes for no bytes
    :raises ValueError: for negative bytes, a chunk size below 1, and for what is no whole number
    """
    for name, value in (("nbytes", nbytes), ("chunk_bytes", chunk_bytes), ("min_chunk_bytes", min_chunk_bytes)):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} is {value!r}: it must be a whole number of bytes")

    if nbytes < 0 or chunk_bytes < 1 or min_chunk_bytes < 1:
        raise ValueError(
            f"cannot cut {nbytes} bytes into chunks of {min_chunk_bytes} to {chunk_bytes}: bytes must be 0 or more, "
            "chunks 1 or more"
        )

    return _equal(nbytes, _count(nbytes, chunk_bytes, min_chunk_bytes))


def _count(nbytes: int, chunk_bytes: int, min_chunk_bytes: int) -> int:
    return max(1, min(-(-nbytes // chunk_bytes), nbytes // min_chunk_bytes))


def _equal(nbytes: int, count: int) -> tuple[int, ...]:
    size, longer = divmod(nbytes, count)
    return (size + 1,) * longer + (size,) * (count - longer)


@dataclass(frozen=True, slots=True)
class Cut:
    """
    The part of a task that a piece of it carries.

    :ivar task: the id of the task that was cut
    :ivar offset: first byte of the piece in it
    :ivar nbytes: length of the piece
    """

    task: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Division:
    """
    A schedule of pieces.

    :ivar schedule: of tasks numbered from 0, each with the members and the payload of the task it was cut from
    :ivar cuts: per piece, by id, what it carries; in task order, and then by offset
    """

    schedule: Schedule
    cuts: tuple[Cut, ...]


def plan_divisible(
    tasks: Iterable[Task],
    *,
    strategy: str = "auto",
    ports: PortModel = "half",
    max_gap: float = 1.05,
    min_chunk_bytes: int = 1 << 20,
    cost: LinkCost | None = None,
) -> Division:
    """
    Cut tasks into chunks of equal bytes, no smaller than needed, and sort the chunks into waves.

    Starts with whole tasks and takes a quarter off the chunk size until the sum of the waves' largest chunks is within
    ``max_gap`` of what no cutting can go below (:func:`~wavecast.scheduler.bounds.divisible_nbytes`; mostly the busiest
    port's bytes), or chunks would fall below ``min_chunk_bytes``. The best schedule met is returned: of the smallest
    such sum, or with ``cost`` of the fewest seconds, if all wait for the longest of a wave. The sizes tried are a grid:
    one between them may be better.

    Sizes between that cannot get there, or be better than the best so far, whatever the colouring, are skipped
    (:func:`~wavecast.scheduler.bounds.uncut_nbytes`). A size is tried with ``largest_first``, which is fast and often
    enough, then with ``strategy``: that up to five times, and where the goal is met in more waves than needed.

    Where the conflicts are not bipartite and there are no dependencies, no more than four chunks a task are tried, and
    ``strategy`` on whole tasks alone. After these come pieces of any number of ``min_chunk_bytes``: in rounds of the
    longest that is left (:func:`~wavecast.scheduler.leveling.level_rounds`), then, for small plans, in rounds of the
    shortest sum there is (:func:`~wavecast.scheduler.relaxation.relax`), whose own bound may show that there is no more
    to gain. That is tried for at most 400 different sets of ports and given up after a count of steps, so that
    ``max_gap`` is a goal and not a promise: compare the result with
    :func:`~wavecast.scheduler.bounds.divisible_nbytes`.

    A piece comes after all pieces of the tasks that its task comes after.

    Time is bounded by counts, so that the result is the same everywhere. Whole tasks are always tried. Chunks are,
    while memberships and dependencies of all those tried, and a quarter of the tasks' for each size ruled out, stay
    below a million; rounds, until they have looked at twelve million tasks. Either is some five seconds of one core, a
    search by ``strategy`` comes on top up to five times, and the linear programme has its own count.

    :param max_gap: the gap to reach, 1 or more
    :param min_chunk_bytes: no piece is smaller, but for the last one of a task
    :param cost: of a task, to weigh the start-ups of more waves against shorter ones
    :raises ValueError: for a ``max_gap`` below 1 or a ``min_chunk_bytes`` below 1
    :raises ScheduleError: as :func:`~wavecast.scheduler.plan_waves` does
    :raises ValueError: for a ``max_gap`` below 1 or a ``min_chunk_bytes`` below 1
    """
    if not (hasattr(max_gap, "__float__") and max_gap >= 1):
        raise ValueError(f"max_gap is {max_gap!r}: it must be 1 or more")

    _check_unit(min_chunk_bytes)
    tasks = tuple(tasks)
    check_strategy(strategy)
    graph = build_graph(tasks, ports)
    search = _Search(tasks, graph, ports, min_chunk_bytes, cost, max_gap)
    if graph.after or is_bipartite(graph):
        search.try_chunks(strategy, searches=_SEARCHES)
    else:
        search.try_chunks(strategy, searches=1, most_pieces=_PIECES_PER_TASK * len(tasks))
        search.try_rounds()

    return search.best


class _Search:
    """The best division met so far, and the ways to look for a better one."""

    def __init__(
        self,
        tasks: tuple[Task, ...],
        graph: TaskGraph,
        ports: PortModel,
        min_chunk_bytes: int,
        cost: LinkCost | None,
        max_gap: float,
    ) -> None:
        self.best = Division(plan_waves((), ports=ports), ())
        self._tasks = tasks
        self._graph = graph
        self._ports = ports
        self._unit = min_chunk_bytes
        self._max_gap = max_gap
        self._goal = max_gap * divisible_nbytes(graph)
        self._free = cost is None  # start-ups cost nothing
        self._price = LinkCost(alpha_seconds=0.0, nbytes_per_second=1.0) if cost is None else cost
        self._seconds = float("inf")  # of the best
        self._rank = (float("inf"), 0, float("inf"))  # of the best
        self._memberships = sum(map(len, graph.ports))
        self._chunk_steps = _CHUNK_STEPS  # left
        self._round_budget = StepBudget(_ROUND_STEPS)

    @property
    def _met(self) -> bool:
        return bool(self.best.cuts) and self.best.schedule.makespan_bytes <= self._goal

    def try_chunks(self, strategy: str, *, searches: int, most_pieces: int | None = None) -> None:
        """Try whole tasks, then chunks of ever smaller size, until the goal is met."""
        graph = self._graph
        chunk_bytes = max(graph.nbytes, default=0)
        while True:
            size = max(chunk_bytes, 1)
            last = chunk_bytes < 4 * self._unit // 3
            shortest = uncut_nbytes(graph, chunk_bytes=size)
            self._chunk_steps -= self._memberships // 4
            promising = shortest <= self._goal or (last and self._free)
            if not self.best.cuts or (
                promising and _fewest_seconds(graph, shortest, chunk_bytes, self._price) < self._seconds
            ):
                counts = [_count(nbytes, size, self._unit) for nbytes in graph.nbytes]
                self._chunk_steps -= self._steps_of(counts)
                too_many = most_pieces is not None and sum(counts) > most_pieces
                if self.best.cuts and (too_many or self._chunk_steps < 0):
                    return

                pieces, cuts = _cut(self._tasks, [_equal(*part) for part in zip(graph.nbytes, counts, strict=True)])
                schedule = plan_waves(pieces, strategy="largest_first", ports=self._ports)
                self._keep(Division(schedule, cuts))
                # Where as few waves as possible are to be had at the same gap, more are for nothing.
                spare = most_pieces is None and len(schedule.waves) > schedule.bound.waves
                if spare if self._met else searches:
                    searches -= not self._met
                    self._keep(Division(plan_waves(pieces, strategy=strategy, ports=self._ports), cuts))

            if last or self._met or self._chunk_steps < 0:
                return

            chunk_bytes = chunk_bytes * 3 // 4

    def try_rounds(self) -> None:
        """Try rounds of any lengths, until the goal is met or shown to be out of reach."""
        units = [-(-nbytes // self._unit) for nbytes in self._graph.nbytes]
        for parts in _LOOK_AGAIN:
            if self._met:
                return

            rounds = level_rounds(self._graph, units, parts=parts, budget=self._round_budget)
            if self._round_budget.left < 0:
                break

            self._keep(_pieces(self._tasks, self._graph, rounds, self._unit, self._ports, "leveled"))

        if not self._met:
            relaxed = relax(
                self._graph,
                unit=self._unit,
                bound_enough=self.best.schedule.makespan_bytes / self._max_gap,
                sum_enough=_ROOM * self._goal,
            )
            if relaxed.rounds and self.best.schedule.makespan_bytes > self._max_gap * relaxed.bound:
                self._keep(_pieces(self._tasks, self._graph, relaxed.rounds, self._unit, self._ports, "relaxed"))

    def _steps_of(self, counts: Sequence[int]) -> int:
        """Return the memberships and dependencies of so many pieces of each task."""
        steps = sum(count * len(ports) for count, ports in zip(counts, self._graph.ports, strict=True))
        for count, before in zip(counts, self._graph.after, strict=False):
            steps += count * sum(counts[earlier] for earlier in before)

        return steps

    def _keep(self, division: Division) -> None:
        seconds = sum(self._price.seconds(wave.longest_nbytes) for wave in division.schedule.waves)
        # Within the goal fewer waves are better than fewer bytes, unless seconds weigh both.
        rank = (max(seconds, self._goal) if self._free else seconds, len(division.schedule.waves), seconds)
        if rank < self._rank:
            self.best, self._rank, self._seconds = division, rank, seconds


def _fewest_seconds(graph: TaskGraph, shortest: int, chunk_bytes: int, cost: LinkCost) -> float:
    """Return what waves of chunks of that size take at least, given the least sum of their longest ones."""
    chunks = [0] * graph.n_ports
    for ports, nbytes in zip(graph.ports, graph.nbytes, strict=True):
        for port in ports:
            chunks[port] += max(1, -(-nbytes // max(chunk_bytes, 1)))

    return max(chunks, default=0) * cost.alpha_seconds + shortest / cost.nbytes_per_second


def plan_preemptive(tasks: Iterable[Task], *, ports: PortModel = "half", min_chunk_bytes: int = 1) -> Division:
    """
    Cut tasks such that the sum of the waves' largest pieces is exactly the busiest port's bytes.

    Gonzalez and Sahni's open shop (:func:`~wavecast.scheduler.openshop.open_shop`), for one-to-one tasks over a
    bipartite graph without dependencies. It makes about as many waves as there are tasks and ports, each of up to half
    as many pieces as ports: meant for plans of up to some hundred tasks, and to compare others with.

    :param min_chunk_bytes: every task counts as a whole number of these, and is cut nowhere else; with more than 1 the
        bytes of the busiest port are exceeded by less than this for each of its tasks
    :raises ValueError: for a ``min_chunk_bytes`` below 1
    :raises ScheduleError: when the tasks are not such, and as :func:`~wavecast.scheduler.plan_waves` does
    :raises ValueError: for a ``min_chunk_bytes`` below 1
    """
    _check_unit(min_chunk_bytes)
    tasks = tuple(tasks)
    graph = build_graph(tasks, ports)
    if graph.after or not is_bipartite(graph):
        raise ScheduleError(
            "cutting anywhere needs one-to-one tasks over a bipartite graph, without dependencies: use plan_divisible"
        )

    units = [-(-nbytes // min_chunk_bytes) for nbytes in graph.nbytes]
    rounds = open_shop(graph.ports, units, n_ports=graph.n_ports)
    return _pieces(tasks, graph, rounds, min_chunk_bytes, ports, "preemptive")


def _check_unit(min_chunk_bytes: int) -> None:
    if not (isinstance(min_chunk_bytes, int) and min_chunk_bytes >= 1):
        raise ValueError(f"min_chunk_bytes is {min_chunk_bytes!r}: it must be a whole number of bytes from 1")


def _pieces(
    tasks: tuple[Task, ...],
    graph: TaskGraph,
    rounds: Sequence[tuple[int, tuple[int, ...]]],
    unit: int,
    ports: PortModel,
    strategy: str,
) -> Division:
    """Cut tasks into what rounds of whole units hold of them; a task of no bytes gets a wave of its own."""
    sizes: list[list[int]] = [[] for _ in tasks]
    waves: list[list[int]] = [[] for _ in tasks]
    left = list(graph.nbytes)
    for wave, (length, members) in enumerate(rounds):
        for task in members:
            # The last unit of a task may be a short one, and nothing may be left of it.
            nbytes = min(length * unit, left[task])
            if nbytes:
                left[task] -= nbytes
                sizes[task].append(nbytes)
                waves[task].append(wave)

    for task, nbytes in enumerate(graph.nbytes):
        if nbytes == 0:
            sizes[task].append(0)
            waves[task].append(len(rounds) + task)

    pieces, cuts = _cut(tasks, sizes)
    bound = lower_bound(build_graph(pieces, ports))
    return Division(
        Schedule(gather(pieces, [wave for task in waves for wave in task]), bound, ports, strategy),
        cuts,
    )


def _cut(tasks: Sequence[Task], sizes: Sequence[Sequence[int]]) -> tuple[tuple[Task, ...], tuple[Cut, ...]]:
    pieces: list[Task] = []
    cuts: list[Cut] = []
    ids: dict[int, range] = {}
    first = 0
    for task, parts in zip(tasks, sizes, strict=True):
        ids[task.id] = range(first, first + len(parts))
        first += len(parts)

    for task, parts in zip(tasks, sizes, strict=True):
        after = tuple(id for before in task.after for id in ids[before])
        offset = 0
        for nbytes in parts:
            pieces.append(replace(task, id=len(pieces), nbytes=nbytes, after=after))
            cuts.append(Cut(task.id, offset, nbytes))
            offset += nbytes

    return tuple(pieces), tuple(cuts)
