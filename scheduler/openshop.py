"""Preemptive open shop: matchings, each for some time, that finish all jobs as early as the busiest port allows."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ("open_shop",)


def open_shop(
    edges: Sequence[tuple[int, ...]], lengths: Sequence[int], *, n_ports: int
) -> list[tuple[int, tuple[int, ...]]]:
    """
    Cut jobs between ports into rounds whose lengths sum up to the busiest port's load.

    Gonzalez and Sahni 1976. A port is tight when its load is all the time that is left. Every round is a matching that
    covers all tight ports, which exists as the graph is bipartite (Mendelsohn and Dulmage 1958), and lasts until one of
    its jobs is over or another port gets tight. Hence at most one round for each job and each port. The matching of the
    round before is kept and repaired along alternating paths: O(edges) for each repair.

    :param edges: per job, its one or two ports; two-port jobs make a bipartite graph
    :param lengths: per job, its time, in whole units
    :param n_ports: number of ports
    :return: rounds, as their length and their jobs in rising order
    """
    # A job of one port gets a second one of its own.
    ends = [edge if len(edge) == 2 else (edge[0], n_ports + job) for job, edge in enumerate(edges)]
    shop = _Shop(ends, list(lengths), n_ports + len(ends))
    rounds: list[tuple[int, tuple[int, ...]]] = []
    while shop.time > 0:
        rounds.append(shop.step())

    return rounds


class _Shop:
    def __init__(self, ends: list[tuple[int, int]], left: list[int], n_ports: int) -> None:
        self.ends = ends
        self.left = left  # time each job still needs
        self.load = [0] * n_ports  # time each port still needs
        self.jobs: list[list[int]] = [[] for _ in range(n_ports)]
        self.mate = [-1] * n_ports  # job that the port does in this round
        for job, ports in enumerate(ends):
            for port in ports:
                self.load[port] += left[job]
                self.jobs[port].append(job)

        self.time = max(self.load, default=0)

    def step(self) -> tuple[int, tuple[int, ...]]:
        for port, load in enumerate(self.load):
            if load == self.time and self.mate[port] < 0:
                self._cover(port)

        length = self.time
        for port, load in enumerate(self.load):
            if load:
                job = self.mate[port]
                length = min(length, self.time - load if job < 0 else self.left[job])

        members = tuple(sorted({job for job in self.mate if job >= 0}))
        self.time -= length
        for job in members:
            self.left[job] -= length
            for port in self.ends[job]:
                self.load[port] -= length
                if self.left[job] == 0:
                    self.mate[port] = -1

        return length, members

    def _cover(self, root: int) -> None:
        """
        Give ``root`` a job, along a path that alternates between jobs outside and inside the matching.

        It ends at a port without a job, or takes away the job of a port that is not tight. Ports at odd distance keep
        or get a job, so that covering one side does not uncover the other.
        """
        came: dict[int, tuple[int, int]] = {root: (-1, -1)}  # per even port: the one before, and that one's new job
        reached = [root]
        for port in reached:  # grows while it is walked
            for job in self.jobs[port]:
                if self.left[job] == 0:
                    continue

                across = self._other(job, port)
                held = self.mate[across]
                if held < 0:
                    self._flip(came, port, job)
                    return

                beyond = self._other(held, across)
                if beyond in came:
                    continue

                came[beyond] = (port, job)
                if self.load[beyond] < self.time:
                    self.mate[beyond] = -1
                    self._flip(came, port, job)
                    return

                reached.append(beyond)

    def _flip(self, came: dict[int, tuple[int, int]], port: int, job: int) -> None:
        while port >= 0:
            self.mate[port] = job
            self.mate[self._other(job, port)] = job
            port, job = came[port]

    def _other(self, job: int, port: int) -> int:
        a, b = self.ends[job]
        return b if a == port else a
