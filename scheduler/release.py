"""Which tasks a completion sets free: the executor's decisions, without the waiting."""

from __future__ import annotations

from wavecast.scheduler.order import PortOrder

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

    :param order: of the schedule to run
    :param lookahead: waves past the oldest unfinished one that may start; ``None`` for no limit
    :param in_flight: unfinished tasks a port may have
    :raises ValueError: for a ``lookahead`` that is not ``None`` or a whole number from 0, or an ``in_flight`` that is
        not a whole number from 1
    """

    def __init__(self, order: PortOrder, *, lookahead: int | None = None, in_flight: int = 1) -> None:
        if lookahead is not None and not (isinstance(lookahead, int) and lookahead >= 0):
            raise ValueError(f"lookahead is {lookahead!r}: it must be None, or 0 or more waves")

        if not (isinstance(in_flight, int) and in_flight >= 1):
            raise ValueError(f"in_flight is {in_flight!r}: it must be 1 or more tasks")

        self._order = order
        self._lookahead = lookahead
        self._in_flight = in_flight
        self.unfinished = len(order.waves)  #: tasks without a completion
        self._next = [0] * len(order.queues)  # per port: index in its queue of the first task not released
        self._load = [0] * len(order.queues)  # per port: released and unfinished
        self._left = [stop - start for start, stop in zip(order.first, order.first[1:], strict=False)]
        self._oldest = 0
        self._open = 0  # waves below this one are within the lookahead, if there is one
        extra = 0 if lookahead is None else 1
        self._blocked = [count + extra for count in order.conditions]  # per task: conditions still false

    def start(self) -> list[int]:
        """Return the tasks that can go at once, lowest wave first. To be called once, before anything finishes."""
        free: list[int] = []
        for queue in self._order.queues:
            self._unblock(queue[0], free)

        self._move_window(free)
        free.sort()
        return self._release(free)

    def finish(self, position: int) -> list[int]:
        """Note that a released task has finished, and return the tasks this releases, each port's in wave order."""
        free: list[int] = []
        queues = self._order.queues
        self.unfinished -= 1
        for port in self._order.ports[position]:
            load = self._load[port] = self._load[port] - 1
            if load == self._in_flight - 1 and self._next[port] < len(queues[port]):
                self._unblock(queues[port][self._next[port]], free)

        for follower in self._order.followers[position]:
            self._unblock(follower, free)

        if self._lookahead is not None:
            self._left[self._order.waves[position]] -= 1
            self._move_window(free)

        return self._release(free) if free else free

    def _unblock(self, position: int, free: list[int]) -> None:
        self._blocked[position] -= 1
        if self._blocked[position] == 0:
            free.append(position)

    def _release(self, free: list[int]) -> list[int]:
        queues = self._order.queues
        for position in free:  # grows while it is walked
            for port in self._order.ports[position]:
                self._next[port] += 1
                self._load[port] += 1
                if self._load[port] < self._in_flight and self._next[port] < len(queues[port]):
                    self._unblock(queues[port][self._next[port]], free)

        return free

    def _move_window(self, free: list[int]) -> None:
        if self._lookahead is None:
            return

        while self._oldest < len(self._left) and self._left[self._oldest] == 0:
            self._oldest += 1

        stop = max(self._open, min(self._oldest + self._lookahead + 1, len(self._left)))
        for position in range(self._order.first[self._open], self._order.first[stop]):
            self._unblock(position, free)

        self._open = stop
