"""The independent check of a schedule. Shares no code with what made it."""

from __future__ import annotations

from collections.abc import Iterable

from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.schedule import Schedule
from wavecast.scheduler.task import Task, check_integers

__all__ = ("verify",)


def verify(schedule: Schedule, tasks: Iterable[Task]) -> None:
    """
    Check that ``schedule`` does ``tasks``, all of them, once each, and can neither clash nor wait in a circle.

    A task without sender or receiver is refused too: no port would ever set it free.

    Linear in the number of memberships. Payloads are not compared.

    :raises ScheduleError: naming the tasks and the loss, the clash, the broken dependency or the circle; or an id or an
        actor that is no integer, or a port model that there is not
    """
    asked = list(tasks)
    if schedule.ports not in ("half", "full"):
        raise ScheduleError(f"the schedule's ports are {schedule.ports!r}: they must be half or full")

    check_integers(asked)
    check_integers(schedule.tasks)
    wave_of = _check_complete(schedule, asked)
    _check_clashes(schedule)
    _check_waits(schedule)
    for task in asked:
        for before in task.after:
            if wave_of[before] >= wave_of[task.id]:
                raise ScheduleError(
                    f"task {task.id} in wave {wave_of[task.id]} comes after task {before}, "
                    f"which is in wave {wave_of[before]}",
                    tasks=(task.id, before),
                )


def _check_complete(schedule: Schedule, asked: list[Task]) -> dict[int, int]:
    wave_of: dict[int, int] = {}
    held: dict[int, Task] = {}
    for index, wave in enumerate(schedule.waves):
        for task in wave.tasks:
            if task.id in wave_of:
                raise ScheduleError(
                    f"task {task.id} is scheduled twice: in wave {wave_of[task.id]} and in wave {index}",
                    tasks=(task.id,),
                )

            if not task.senders or not task.receivers:
                side = "receiver" if task.senders else "sender"
                raise ScheduleError(f"task {task.id} in wave {index} has no {side}", tasks=(task.id,))

            wave_of[task.id] = index
            held[task.id] = task

    seen: set[int] = set()
    for task in asked:
        if task.id in seen:
            raise ScheduleError(f"task id {task.id} was asked for twice", tasks=(task.id,))

        seen.add(task.id)
        got = held.get(task.id)
        if got is None:
            raise ScheduleError(f"task {task.id} is lost: no wave has it", tasks=(task.id,))

        if not task.senders or not task.receivers:
            raise ScheduleError(
                f"task {task.id} has senders {task.senders} and receivers {task.receivers}: it needs one of each",
                tasks=(task.id,),
            )

        wanted = (task.senders, task.receivers, task.nbytes, task.after)
        if wanted != (got.senders, got.receivers, got.nbytes, got.after):
            raise ScheduleError(
                f"task {task.id} was altered: asked for {wanted}, "
                f"scheduled {(got.senders, got.receivers, got.nbytes, got.after)}",
                tasks=(task.id,),
            )

        for before in task.after:
            if before not in wave_of:
                raise ScheduleError(
                    f"task {task.id} comes after task {before}, which no wave has", tasks=(task.id, before)
                )

    for extra in wave_of:
        if extra not in seen:
            raise ScheduleError(f"task {extra} in wave {wave_of[extra]} was never asked for", tasks=(extra,))

    return wave_of


def _uses(schedule: Schedule, task: Task) -> list[tuple[str, int]]:
    if schedule.ports == "full":
        return [("sends", a) for a in sorted(set(task.senders))] + [
            ("receives", a) for a in sorted(set(task.receivers))
        ]

    return [("takes part", a) for a in sorted({*task.senders, *task.receivers})]


def _check_clashes(schedule: Schedule) -> None:
    for index, wave in enumerate(schedule.waves):
        user: dict[tuple[str, int], int] = {}
        for task in wave.tasks:
            for use in _uses(schedule, task):
                other = user.setdefault(use, task.id)
                if other != task.id:
                    raise ScheduleError(
                        f"wave {index} clashes: actor {use[1]} {use[0]} in both task {other} and task {task.id}",
                        tasks=(other, task.id),
                    )


def _check_waits(schedule: Schedule) -> None:
    """
    Look for a circle among "waits for".

    A task waits for the task before it at each of its actors, in wave order, and for those it comes after. Whatever the
    lookahead, nothing else is ever waited for except tasks of earlier waves.
    """
    waits: dict[int, list[int]] = {}
    latest: dict[tuple[str, int], int] = {}
    for wave in schedule.waves:
        for task in wave.tasks:
            uses = _uses(schedule, task)
            waits[task.id] = [latest[use] for use in uses if use in latest] + list(task.after)
            latest.update((use, task.id) for use in uses)

    state: dict[int, int] = {}  # 1: on the path now, 2: known to be free of circles
    for root in waits:
        path = [(root, iter(waits[root]))] if root not in state else []
        state.setdefault(root, 1)
        while path:
            node, remaining = path[-1]
            step = next(remaining, None)
            if step is None:
                state[node] = 2
                path.pop()
            elif step not in state:
                state[step] = 1
                path.append((step, iter(waits[step])))
            elif state[step] == 1:
                nodes = [entry[0] for entry in path]
                circle = tuple(nodes[nodes.index(step) :])
                raise ScheduleError(
                    f"tasks wait for each other in a circle: {' for '.join(map(str, (*circle, step)))}", tasks=circle
                )
