"""From layouts to programs: all that is decided before a byte moves, and nothing that waits."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wavecast.runtime.carriers import Carriers, PullRule, part_routes
from wavecast.runtime.errors import LayoutError
from wavecast.runtime.layout.shard import Layout
from wavecast.runtime.naming import Renames
from wavecast.runtime.options import SyncOptions
from wavecast.runtime.plan.digest import plan_digest
from wavecast.runtime.plan.pairs import SCALE
from wavecast.runtime.plan.reshard import ReshardPlan, plan_reshard
from wavecast.runtime.plan.tasks import task_ends, task_routes
from wavecast.runtime.plan.timetable import make_timetable
from wavecast.runtime.transfer.comm_ported import plan_legs
from wavecast.runtime.transfer.program import PackedProgram, Program, compile_programs, pack_programs
from wavecast.scheduler import Schedule, Task
from wavecast.scheduler.release import ReleaseState

__all__ = ("Preparation", "prepare")

#: One task's bytes travel while those of the next are packed.
_STAGED_IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class Preparation:
    """
    A plan made ready to run.

    :ivar driven: the schedule with the order in which calls reach the actors: an actor works its program step by step,
        sends and receives alike, so that this is the order of half duplex whatever the waves keep to
    :ivar digest: of plan and schedule; all actors' programs carry it
    :ivar programs: one an actor, and ``packed`` the same ready to be sent
    :ivar step_of: by actor, then by task id: the task's position in that actor's program
    :ivar carriers: the ways the bytes go
    :ivar groups: sorted actor sets of three or more that broadcast among themselves, in schedule order
    :ivar edges: sender and receiver of one-to-one tasks whose bytes a communicator moves, in schedule order
    :ivar pulls: sender and receiver of tasks that the receiver pulls, in schedule order
    :ivar in_flight: tasks an actor is given at a time
    :ivar ahead: by actor: how many of its first steps may start with the run, before a task has finished
    :ivar readings: whose memory is read by whom: senders' by those that pull, that of a port's owner by those it serves
        and the other way round, and boards by those that agree, or that meet before a move that both take part in
    :ivar is_safe_ahead: steps may start before all actors are known to have begun: all is pulled, or met for by members
        that can read each other's boards, so that none enters a move that another will not
    :ivar agreeing: the receivers, when that is so, all steps start with the run and the destinations' actors can read
        each other's memory: they can end the run among themselves; else nothing
    :ivar pulled_nbytes: bytes that are pulled, of ``plan.nbytes``
    :ivar tensors: how many logical tensors are sent
    :ivar left_out: tensors of the destinations of which nothing is sent, in their order: not selected, or without a
        source and allowed to be
    :ivar reshard_seconds: to find the routes
    :ivar schedule_seconds: from routes to programs
    """

    plan: ReshardPlan
    schedule: Schedule
    driven: Schedule
    digest: str
    programs: tuple[Program, ...]
    packed: tuple[PackedProgram, ...]
    step_of: tuple[dict[int, int], ...]
    carriers: Carriers
    groups: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    pulls: tuple[tuple[int, int], ...]
    in_flight: int
    ahead: tuple[int, ...]
    readings: frozenset[tuple[int, int]]
    is_safe_ahead: bool
    agreeing: tuple[int, ...]
    pulled_nbytes: int
    tensors: int
    left_out: tuple[str, ...]
    reshard_seconds: float
    schedule_seconds: float


def prepare(
    sources: Sequence[Layout],
    destinations: Sequence[Layout],
    options: SyncOptions,
    names: frozenset[str] | None,
    carriers: Carriers,
    *,
    renames: Sequence[Renames] = (),
    replicas: Sequence[range] = (),
) -> Preparation:
    """
    Plan, schedule, verify and compile.

    :param carriers: the ways open to these actors
    :param names: the tensors selected, or ``None`` for all
    :param renames: one an actor, where layouts have other names than the actors themselves (see
        :func:`~wavecast.runtime.naming.name_layouts`)
    :param replicas: the numbers of the actors of each replica; each must be sent something
    :raises LayoutError: when the layouts cannot be served, or a replica would be sent nothing
    """
    start = time.perf_counter()
    wanted = {piece.tensor: None for layout in destinations for piece in layout.pieces if piece.box.numel}
    if names is not None:
        # With the scales of a weight that a destination holds alone, so that the plan can tell.
        held = names | {name + SCALE for name in names}
        sources = [_only(layout, held) for layout in sources]
        destinations = [_only(layout, names) for layout in destinations]

    plan = plan_reshard(sources, destinations, allow_missing=options.allow_missing)
    _require_delivery(plan, replicas)
    sent = {route.tensor for route in plan.routes}
    resharded = time.perf_counter()
    if options.relays:
        # An engine sends on what it packs from where it was unpacked: a relay's hops are moved, not pulled.
        relayed = ("relays send on what they have unpacked",) if carriers.pulls else ()
        carriers = replace(carriers, pulls=frozenset(), reasons=(*carriers.reasons, *relayed))

    layouts = (*sources, *destinations)
    places = [layout.place for layout in layouts]
    plan = part_routes(plan, layouts, carriers)
    pulled = PullRule(layouts, carriers)
    carriers = replace(carriers, reasons=(*carriers.reasons, *pulled.reasons(plan.routes)))
    schedule = make_timetable(
        plan,
        chunk_bytes=options.chunk_bytes,
        strategy=options.strategy,
        ports=options.ports,
        fan_out=options.fan_out,
        link=options.link,
        apart=pulled,
        owners=carriers.owners,
    )
    driven = replace(schedule, ports="half")
    # What the run needs to know of it is worked out here, off the event loop.
    _ = driven.order
    traffic = _Traffic.of(schedule, pulled)
    digest = _digest(plan, schedule, traffic, options, carriers, renames)
    programs = compile_programs(
        schedule,
        actors=len(layouts),
        digest=digest,
        bucket_bytes=options.bucket_bytes,
        checksum=options.checksum,
        kernels=carriers.kernels,
        pulled=pulled,
        near=lambda route: places[route.sender] == places[route.receivers[0]],
        renames=renames,
    )
    step_of = tuple({step.task: index for index, step in enumerate(program.steps)} for program in programs)
    meetings = _meetings(traffic.moved, carriers)
    is_safe_ahead = bool(meetings) or not traffic.moved
    longest = max((len(program.steps) for program in programs), default=1)
    in_flight = options.in_flight or (max(longest, 1) if is_safe_ahead else _STAGED_IN_FLIGHT)
    ahead = _count_ahead(driven, options.lookahead, in_flight, step_of)
    receivers = tuple(range(len(sources), len(layouts)))
    agreeing = _agreeing(receivers, programs, ahead, carriers) if is_safe_ahead else ()
    neighbours = _neighbours(traffic.moved, carriers)
    pulls = traffic.pulls
    return Preparation(
        plan=plan,
        schedule=schedule,
        driven=driven,
        digest=digest,
        programs=programs,
        packed=pack_programs(programs),
        step_of=step_of,
        groups=traffic.groups,
        carriers=carriers,
        edges=traffic.edges,
        pulls=pulls,
        in_flight=in_flight,
        ahead=ahead,
        readings=frozenset((*pulls, *neighbours, *meetings, *itertools.permutations(agreeing, 2))),
        is_safe_ahead=is_safe_ahead,
        agreeing=agreeing,
        pulled_nbytes=sum(task.nbytes for task in traffic.pulled),
        tensors=len(sent),
        left_out=tuple(name for name in wanted if name not in sent),
        reshard_seconds=resharded - start,
        schedule_seconds=time.perf_counter() - resharded,
    )


@dataclass(frozen=True, slots=True)
class _Traffic:
    """
    Which tasks go which way, each in schedule order.

    :ivar pulled: by their receivers
    :ivar moved: by a communicator
    """

    pulled: tuple[Task, ...]
    moved: tuple[Task, ...]

    @classmethod
    def of(cls, schedule: Schedule, rule: PullRule) -> _Traffic:
        """Sort the tasks of ``schedule``."""
        pulled: list[Task] = []
        moved: list[Task] = []
        for task in (task for wave in schedule.waves for task in wave.tasks):
            single = len(task_ends(task)[1]) == 1
            (pulled if single and rule(task_routes(task)[0]) else moved).append(task)

        return cls(tuple(pulled), tuple(moved))

    @property
    def pulls(self) -> tuple[tuple[int, int], ...]:
        return _pairs(self.pulled)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        return _pairs(self.moved)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        ends = [task_ends(task) for task in self.moved]
        return tuple(dict.fromkeys(tuple(sorted((one, *others))) for one, others in ends if len(others) > 1))


def _pairs(tasks: Sequence[Task]) -> tuple[tuple[int, int], ...]:
    """Return sender and receiver of those of ``tasks`` that have one receiver."""
    ends = [task_ends(task) for task in tasks]
    return tuple(dict.fromkeys((sender, receivers[0]) for sender, receivers in ends if len(receivers) == 1))


def _digest(
    plan: ReshardPlan,
    schedule: Schedule,
    traffic: _Traffic,
    options: SyncOptions,
    carriers: Carriers,
    renames: Sequence[Renames],
) -> str:
    """Sum up all that decides what an actor does with a task: all must agree on it."""
    pulled = [task.id for task in traffic.pulled]
    which = _short_hash(pulled) if pulled else "none"
    way = f"{carriers.moved}-{which}{'-kernels' if carriers.kernels else ''}"
    digest = f"{plan_digest(plan, schedule)}-{options.bucket_bytes}-{int(options.checksum)}-{way}"
    return f"{digest}-{_short_hash(tuple(renames))}" if any(renames) else digest


def _short_hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _count_ahead(
    schedule: Schedule, lookahead: int | None, in_flight: int, step_of: Sequence[Mapping[int, int]]
) -> tuple[int, ...]:
    """Return how many steps of each actor the executor asks for before anything has finished."""
    counts = [0] * len(step_of)
    if schedule.tasks:
        tasks = schedule.tasks
        for position in ReleaseState(schedule.order, lookahead=lookahead, in_flight=in_flight).start():
            for member in tasks[position].members:
                counts[member] += 1

    return tuple(counts)


def _meetings(moved: Sequence[Task], carriers: Carriers) -> tuple[tuple[int, int], ...]:
    """Return the pairs of members of ``moved``, if all may read each other's boards and what moves is a collective."""
    pairs = tuple(dict.fromkeys(pair for task in moved for pair in itertools.permutations(task.members, 2)))
    met = carriers.moved == "nccl" and not carriers.owners and carriers.boards.issuperset(pairs)
    return pairs if met else ()


def _neighbours(moved: Sequence[Task], carriers: Carriers) -> frozenset[tuple[int, int]]:
    """Return out of whose memory who copies on a shared GPU: tried before it is needed, as far as it can be."""
    found: set[tuple[int, int]] = set()
    for task in moved if carriers.owners else ():
        sender, receivers = task_ends(task)
        legs = plan_legs(carriers.owners, sender, receivers)
        found.update((sender, each) for each in legs.first)
        found.update((owner, each) for owner, clients in legs.last.items() for each in clients)

    return carriers.boards.intersection(found)


def _agreeing(
    receivers: tuple[int, ...], programs: Sequence[Program], ahead: Sequence[int], carriers: Carriers
) -> tuple[int, ...]:
    """Return ``receivers`` when they can end a run among themselves; one that waited for a step could never agree."""
    at_once = all(count == len(program.steps) for count, program in zip(ahead, programs, strict=True))
    busy = all(any(step.sender != actor for step in programs[actor].steps) for actor in receivers)
    mapped = carriers.boards.issuperset(itertools.permutations(receivers, 2))
    return receivers if at_once and busy and mapped else ()


def _require_delivery(plan: ReshardPlan, replicas: Sequence[range]) -> None:
    """Refuse a plan that would bring a replica to a version without a byte of it."""
    reached = {actor for route in plan.routes for actor in route.receivers}
    for index, replica in enumerate(replicas):
        if reached.isdisjoint(replica):
            raise LayoutError(
                f"nothing would be sent to replica {index}: its actors hold none of the tensors to sync",
                actors=tuple(replica),
            )


def _only(layout: Layout, names: frozenset[str]) -> Layout:
    pieces = tuple(piece for piece in layout.pieces if piece.tensor in names)
    return replace(layout, pieces=pieces, computed=tuple(name for name in layout.computed if name in names))
