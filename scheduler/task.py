"""The unit of scheduling: bytes that must go from some actors to others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import index

from wavecast.scheduler.errors import ScheduleError

__all__ = ("Task", "check_integers")


@dataclass(frozen=True, slots=True)
class Task:
    """
    Bytes that ``senders`` bring to ``receivers`` in one go.

    Actors are plain integers; what is moved is known to whoever dispatches the task, through ``payload``. An actor may
    be sender and receiver of the same task: a copy inside it.

    Lists of actors and ids are taken as tuples. That a task has a sender and a receiver, and ids that exist, is checked
    where tasks are scheduled.

    :ivar id: unique within a schedule
    :ivar senders: actors that hold the bytes, at least one
    :ivar receivers: actors that get them, at least one; each gets all ``nbytes``
    :ivar nbytes: bytes that leave a sender, and bytes that reach each receiver
    :ivar after: ids of tasks that must have finished first (a relay forwards what it received)
    :ivar payload: carried along untouched; takes part in equality
    :raises ScheduleError: for bytes that are negative or no whole number, and for actors or ids that are no sequence
    """

    id: int
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    nbytes: int
    after: tuple[int, ...] = ()
    payload: Hashable = None

    def __post_init__(self) -> None:
        # There may be a hundred thousand: one look at each where nothing is to be done.
        if not (
            type(self.senders) is type(self.receivers) is type(self.after) is tuple
            and type(self.nbytes) is int
            and self.nbytes >= 0
        ):
            self._settle()

    def _settle(self) -> None:
        if not hasattr(self.nbytes, "__index__"):
            raise ScheduleError(
                f"task {self.id} has {self.nbytes!r} bytes: it must have a whole number of them", tasks=(self.id,)
            )

        if self.nbytes < 0:
            raise ScheduleError(f"task {self.id} has {self.nbytes} bytes: it must have 0 or more", tasks=(self.id,))

        for name in ("senders", "receivers", "after"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple, range)):
                raise ScheduleError(f"task {self.id} has {name} {value!r}: give a tuple of integers", tasks=(self.id,))

            object.__setattr__(self, name, tuple(value))

    @property
    def members(self) -> tuple[int, ...]:
        """The actors that take part, each once, senders first."""
        return tuple(dict.fromkeys(self.senders + self.receivers))


def check_integers(tasks: Sequence[Task]) -> None:
    """
    Check that ids, actors and dependencies are integers, of whatever make.

    :raises ScheduleError: naming the task and the value that is none, or what is no task
    """
    # There may be a hundred thousand: types are gathered in bulk, and looked at one by one only if one is unusual.
    if set(map(type, tasks)) <= {Task}:
        kinds = set(map(type, [task.id for task in tasks]))
        kinds.update(map(type, chain.from_iterable([task.senders for task in tasks])))
        kinds.update(map(type, chain.from_iterable([task.receivers for task in tasks])))
        kinds.update(map(type, chain.from_iterable([task.after for task in tasks])))
        if kinds <= {int}:
            return

    for position, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise ScheduleError(f"number {position} of the tasks is {task!r}: it must be a Task")

        if not _is_integer(task.id):
            raise ScheduleError(f"number {position} of the tasks has id {task.id!r}: it must be an integer")

        for name in ("senders", "receivers", "after"):
            for value in getattr(task, name):
                if not _is_integer(value):
                    raise ScheduleError(
                        f"task {task.id} has {value!r} among its {name}: it must be an integer", tasks=(task.id,)
                    )


def _is_integer(value: object) -> bool:
    try:
        index(value)  # type: ignore[arg-type]
    except TypeError:
        return False

    return True
