"""Which tasks a completion sets free: the executor's decisions, without the waiting."""

from __future__ import annotations

from wavecast.scheduler.errors import ScheduleError
from wavecast.scheduler.ports import task_ports
from wavecast.scheduler.schedule import Schedule

__all__ = ("ReleaseState",)


class ReleaseState:
    """
    Release tasks of a schedule as others finish. Synchronous, and O(ports of the task) per completion.

    A task is released once, for each of its ports, all tasks before it on the port are released and fewer than
    ``in_flight`` of them are unfinished; its dependencies have finished; and its wave is at most ``lookahead`` waves
    past the oldest unfinished one. Tasks of one port are released in wave order.

    Each of these conditions, once true, stays true until the task is released, so counting them down is enough. The
    task with the lowest wave among those not released only waits for released ones: it is freed when they finish, hence
    no wait can be endless.

    Tasks are known by position: their index in ``schedule.tasks``.

    :param lookahead: waves past the oldest unfinished one that may start; ``None`` for no limit
    :param in_flight: unfinished tasks a port may have
    :raises ScheduleError: when a task comes after one that is in no earlier wave
    """

    def __init__(self, schedule: Schedule, *, lookahead: int | None = None, in_flight: int = 1) -> None:
        self._lookahead = lookahead
        self._in_flight = in_flight
        self.waves: list[int] = []  #: wave of each task
        self.unfinished = 0  #: tasks without a completion
        self._first: list[int] = [0]  # position of each wave's first task, and one past the end
        self.ports: list[tuple[int, ...]] = []  #: dense ports of each task
        self._queues: list[list[int]] = []  # per port: positions in wave order
        dense: dict[tuple[int, int], int] = {}
        for index, wave in enumerate(schedule.waves):
            for task in wave.tasks:
                ports = tuple(dense.setdefault(port, len(dense)) for port in task_ports(task, schedule.ports))
                while len(self._queues) < len(dense):
                    self._queues.append([])

                for port in ports:
                    self._queues[port].append(self.unfinished)

                self.ports.append(ports)
                self.waves.append(index)
                self.unfinished += 1

            self._first.append(self.unfinished)

        self._blocked = [len(ports) for ports in self.ports]  # conditions still false, per task
        self._followers: dict[int, list[int]] = {}
        self._link(schedule)
        self._next = [0] * len(self._queues)  # per port: index in its queue of the first task not released
        self._load = [0] * len(self._queues)  # per port: released and unfinished
        self._left = [stop - start for start, stop in zip(self._first, self._first[1:], strict=False)]
        self._oldest = 0
        self._open = len(self._left)  # waves below this one are within the lookahead
        if lookahead is not None:
            self._open = 0
            for position in range(self.unfinished):
                self._blocked[position] += 1

    @property
    def n_ports(self) -> int:
        """How many ports the schedule uses."""
        return len(self._queues)

    def _link(self, schedule: Schedule) -> None:
        tasks = schedule.tasks
        positions = {task.id: position for position, task in enumerate(tasks)}
        for position, task in enumerate(tasks):
            for before in dict.fromkeys(task.after):
                earlier = positions.get(before)
                # Otherwise the run would wait for ever: a schedule made by hand need not be a sound one.
                if earlier is None or self.waves[earlier] >= self.waves[position]:
                    raise ScheduleError(
                        f"task {task.id} in wave {self.waves[position]} comes after task {before}, "
                        "which is in no earlier wave",
                        tasks=(task.id, before),
                    )

                self._followers.setdefault(earlier, []).append(position)
                self._blocked[position] += 1

    def start(self) -> list[int]:
        """Return the tasks that can go at once. To be called once, first."""
        free: list[int] = []
        for queue in self._queues:
            self._unblock(queue[0], free)

        self._move_window(free)
        free.sort()
        return self._release(free)

    def finish(self, position: int) -> list[int]:
        """Note that a released task has finished, and return the tasks this releases, each port's in wave order."""
        free: list[int] = []
        self.unfinished -= 1
        for port in self.ports[position]:
            load = self._load[port] = self._load[port] - 1
            if load == self._in_flight - 1 and self._next[port] < len(self._queues[port]):
                self._unblock(self._queues[port][self._next[port]], free)

        for follower in self._followers.get(position, ()):
            self._unblock(follower, free)

        if self._lookahead is not None:
            self._left[self.waves[position]] -= 1
            self._move_window(free)

        return self._release(free) if free else free

    def _unblock(self, position: int, free: list[int]) -> None:
        self._blocked[position] -= 1
        if self._blocked[position] == 0:
            free.append(position)

    def _release(self, free: list[int]) -> list[int]:
        for position in free:  # grows while it is walked
            for port in self.ports[position]:
                self._next[port] += 1
                self._load[port] += 1
                if self._load[port] < self._in_flight and self._next[port] < len(self._queues[port]):
                    self._unblock(self._queues[port][self._next[port]], free)

        return free

    def _move_window(self, free: list[int]) -> None:
        if self._lookahead is None:
            return

        while self._oldest < len(self._left) and self._left[self._oldest] == 0:
            self._oldest += 1

        stop = min(self._oldest + self._lookahead + 1, len(self._left))
        for position in range(self._first[self._open], self._first[max(stop, self._open)]):
            self._unblock(position, free)

        self._open = max(stop, self._open)
