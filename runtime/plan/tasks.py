"""From routes to tasks: the one bridge into the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.plan.chunks import LARGEST_ELEMENT, MIN_CHUNK_BYTES, choose_chunk_bytes, cut_run
from wavecast.runtime.plan.collector import paused_collector
from wavecast.runtime.plan.reshard import ReshardPlan
from wavecast.runtime.plan.route import Route
from wavecast.scheduler import FanOut, LinkCost, Task, fan_out

__all__ = (
    "MAX_TASKS",
    "build_tasks",
    "spread_tasks",
    "task_ends",
    "task_routes",
    "through_owners",
    "relabel",
    "group_routes",
)

#: So many are scheduled in two seconds, and each costs its members a call.
MAX_TASKS = 1 << 16

_Members = tuple[int, tuple[int, ...]]
#: Members of a run of bytes, and what ``apart`` says of its routes.
_Run = tuple[int, tuple[int, ...], bool]


def build_tasks(
    plan: ReshardPlan,
    *,
    chunk_bytes: int | None = None,
    min_chunk_bytes: int = MIN_CHUNK_BYTES,
    apart: Callable[[Route], bool] | None = None,
) -> tuple[Task, ...]:
    """
    Return the tasks that move ``plan``'s routes, with ids from 0 in their order.

    Routes between the same actors are one run of bytes, cut into equal chunks
    (:func:`~wavecast.runtime.plan.chunks.cut_run`); a task's payload is its chunk's routes. Runs are interleaved by
    the part of them that is done, runs that start at the same point so that neighbours share no actor where possible:
    to take tasks by id is a reasonable schedule by itself.

    :param chunk_bytes: the most bytes of a task; left out it follows from the busiest actor's bytes and the runs'
    :param min_chunk_bytes: the least that is chosen when ``chunk_bytes`` is left out; a run shorter than that is one
        task
    :param apart: routes of which this says different things never share a task
    :raises ConfigError: when ``chunk_bytes`` is less than an element, or makes more tasks than :data:`MAX_TASKS` and
        than there are runs
    """
    with paused_collector():
        return _build(plan, chunk_bytes, min_chunk_bytes, apart)


def _build(
    plan: ReshardPlan, chunk_bytes: int | None, min_chunk_bytes: int, apart: Callable[[Route], bool] | None
) -> tuple[Task, ...]:
    groups: dict[_Run, tuple[Route, ...]] = {}
    for kind, routes in _kinds(plan.routes, apart):
        groups.update(((*members, kind), found) for members, found in group_routes(routes).items())

    if chunk_bytes is None:
        busiest = max((*plan.sent_nbytes(), *plan.received_nbytes()), default=0)
        runs = (sum(route.nbytes for route in routes) for routes in groups.values())
        chunk_bytes = choose_chunk_bytes(busiest, runs, min_chunk_bytes=min_chunk_bytes)
    else:
        _check_count(groups.values(), chunk_bytes)

    rank = {members: place for place, members in enumerate(sorted(groups, key=_diagonal(groups)))}
    chunks: list[tuple[float, int, _Run, tuple[Route, ...]]] = []
    for members, routes in groups.items():
        cut = cut_run(routes, chunk_bytes=chunk_bytes)
        for number, payload in enumerate(cut):
            chunks.append(((2 * number + 1) / (2 * len(cut)), rank[members], members, payload))

    chunks.sort(key=lambda chunk: chunk[:2])
    return tuple(
        Task(id, (members[0],), members[1], sum(route.nbytes for route in payload), payload=payload)
        for id, (_, _, members, payload) in enumerate(chunks)
    )


def spread_tasks(tasks: Iterable[Task], *, method: FanOut = "auto", cost: LinkCost | None = None) -> tuple[Task, ...]:
    """
    Return ``tasks`` as they reach their receivers: broadcasts as they are, or relays hop by hop.

    A hop (:func:`~wavecast.scheduler.fan_out`) carries the routes of the broadcast it was part of, from the actor that
    sends it to the one that gets it. Tasks without a hop stay the same objects.

    :param tasks: what :func:`build_tasks` made
    :param method: how; ``"auto"`` relays where that takes fewer seconds by ``cost``
    :param cost: of a link; without ``branching`` a broadcast is never slower, and stays
    """
    # Whatever the waves are planned for, an actor works one task at a time: a relay's rounds are those of half duplex.
    return tuple(map(relabel, fan_out(tasks, method=method, ports="half", cost=cost)))


def group_routes(routes: Iterable[Route]) -> dict[tuple[int, tuple[int, ...]], tuple[Route, ...]]:
    """Return the routes between the same actors, by ``(sender, receivers)``, all in the order given."""
    groups: dict[_Members, list[Route]] = {}
    for route in routes:
        key = (route.sender, route.receivers)
        found = groups.get(key)
        if found is None:
            groups[key] = [route]
        else:
            found.append(route)

    return {members: tuple(found) for members, found in groups.items()}


def task_routes(task: Task) -> tuple[Route, ...]:
    """
    Return the routes of a task that :func:`build_tasks` made.

    :raises TypeError: when the task carries something else
    """
    payload = task.payload
    if isinstance(payload, tuple) and all(isinstance(route, Route) for route in payload):
        return payload

    raise TypeError(f"task {task.id} carries no routes")


def task_ends(task: Task) -> tuple[int, tuple[int, ...]]:
    """
    Return whose memory a task is read from, and who it is written to: its other members are owners of ports.

    :raises TypeError: when the task carries something else than routes
    """
    routes = task_routes(task)
    return (routes[0].sender, routes[0].receivers) if routes else (task.senders[0], task.receivers)


def through_owners(
    tasks: Iterable[Task], owners: Sequence[int], *, apart: Callable[[Route], bool] | None = None
) -> tuple[Task, ...]:
    """
    Return ``tasks`` with the owners of their ends' ports among their members, where actors share GPUs.

    What goes from GPU to GPU takes the ports of both, so no two such tasks may share a wave.

    :param owners: for each actor the one through which its GPU's bytes go; empty: each has a GPU of its own
    :param apart: tells of routes that need no port but their receivers'
    """
    if not owners:
        return tuple(tasks)

    def widen(task: Task) -> Task:
        sender, receivers = task_ends(task)
        home, away = owners[sender], [owners[each] for each in receivers if owners[each] != owners[sender]]
        if not away or (apart is not None and apart(task_routes(task)[0])):
            return task

        senders = tuple(dict.fromkeys((sender, home)))
        return replace(task, senders=senders, receivers=tuple(dict.fromkeys((*receivers, *away))))

    return tuple(map(widen, tasks))


def relabel(task: Task) -> Task:
    """
    Return ``task`` with the sender and receivers of its routes made those of the task itself.

    For tasks that a fan-out has rewritten: a receiver that forwards holds each box where it received it, so only the
    members differ.

    :raises TypeError: when the task carries something else than routes
    """
    sender, receivers = task.senders[0], tuple(sorted(task.receivers))
    routes = task_routes(task)
    if all(route.sender == sender and route.receivers == receivers for route in routes):
        return task

    return replace(task, payload=tuple(replace(route, sender=sender, receivers=receivers) for route in routes))


def _check_count(runs: Collection[tuple[Route, ...]], chunk_bytes: int) -> None:
    """Refuse chunks so small that planning would not end in any reasonable time."""
    if chunk_bytes < LARGEST_ELEMENT:
        raise ConfigError(f"chunk_bytes is {chunk_bytes}; an element may need {LARGEST_ELEMENT}")

    sizes = [sum(route.nbytes for route in routes) for routes in runs]
    count = sum(-(-nbytes // chunk_bytes) for nbytes in sizes)
    if count > max(MAX_TASKS, len(sizes)):
        raise ConfigError(
            f"chunk_bytes is {chunk_bytes}: it cuts {sum(sizes)} bytes into {count} tasks, more than {MAX_TASKS}"
        )


def _kinds(routes: tuple[Route, ...], apart: Callable[[Route], bool] | None) -> list[tuple[bool, tuple[Route, ...]]]:
    if apart is None:
        return [(False, routes)]

    said = [(apart(route), route) for route in routes]
    return [(kind, tuple(route for found, route in said if found is kind)) for kind in (False, True)]


def _diagonal(groups: Iterable[_Run]) -> Callable[[_Run], tuple[int, int, bool]]:
    """Return a sort key that walks the (sender, receivers) table along its diagonals."""
    members = list(groups)
    row = {sender: place for place, sender in enumerate(sorted({run[0] for run in members}))}
    column = {receivers: place for place, receivers in enumerate(sorted({run[1] for run in members}))}

    def key(run: _Run) -> tuple[int, int, bool]:
        sender, receivers, kind = run
        return (column[receivers] - row[sender]) % len(column), row[sender], kind

    return key
