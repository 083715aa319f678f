"""What each wave is, and what the gap to the bound is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wavecast.scheduler.bounds import chain_nbytes, least_span, lower_bound, uncut_nbytes
from wavecast.scheduler.ports import build_graph
from wavecast.scheduler.schedule import Schedule

__all__ = ("WaveShare", "Explanation", "explain")


@dataclass(frozen=True, slots=True)
class WaveShare:
    """
    One wave.

    :ivar wave: its index
    :ivar tasks: how many tasks it has
    :ivar nbytes: sum of their bytes
    :ivar longest_task: id of its largest task
    :ivar longest_nbytes: bytes of that
    :ivar busiest_port: of the ports of its largest task, the one with the most bytes over all waves
    :ivar idle_share: share of the ports' time, all ports of the schedule counted, that is idle if all wait for the
        longest
    """

    wave: int
    tasks: int
    nbytes: int
    longest_task: int
    longest_nbytes: int
    busiest_port: str
    idle_share: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """
    A schedule, wave by wave, and its gap: the makespan is the sum of the five parts.

    :ivar waves: one entry a wave
    :ivar makespan_bytes: sum over the waves of the largest task
    :ivar bound_bytes: bytes through the busiest port
    :ivar size_bytes: what it takes more as tasks differ in size and are not cut, however they are coloured
    :ivar wave_bytes: what it takes more in the waves beyond the tasks on the busiest port, as many as any colouring
        needs (:func:`~wavecast.scheduler.bounds.lower_bound`): at least the smallest task in each
    :ivar order_bytes: what it takes more as tasks come after each other: the longest chain, in waves or in bytes
    :ivar conflict_bytes: what is left: waves that could not be filled with tasks alike in size, and waves above the
        bound
    """

    waves: tuple[WaveShare, ...]
    makespan_bytes: int
    bound_bytes: int
    size_bytes: int
    wave_bytes: int
    order_bytes: int
    conflict_bytes: int

    def lines(self, *, limit: int | None = None) -> tuple[str, ...]:
        """
        Return a table for a person, and a line on the gap.

        :param limit: waves to show at most, the first ones; ``None`` for all
        :raises ValueError: for a limit that is negative or no whole number
        """
        if limit is not None and not (isinstance(limit, int) and limit >= 0):
            raise ValueError(f"limit is {limit!r}: it must be None, or 0 or more waves")

        shown = self.waves if limit is None else self.waves[:limit]
        rows = [("wave", "tasks", "bytes", "longest task", "its bytes", "busiest port", "idle")]
        rows += [
            (
                str(share.wave),
                str(share.tasks),
                str(share.nbytes),
                str(share.longest_task),
                str(share.longest_nbytes),
                share.busiest_port,
                f"{share.idle_share:.1%}",
            )
            for share in shown
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if len(shown) < len(self.waves):
            lines.append(f"... and {len(self.waves) - len(shown)} more waves")

        over = self.makespan_bytes - self.bound_bytes
        lines.append(
            f"makespan {self.makespan_bytes} bytes: {self.bound_bytes} through the busiest port, and {over} more: "
            f"{self.size_bytes} for tasks of unlike size, {self.wave_bytes} for waves that any colouring needs, "
            f"{self.order_bytes} for their order, {self.conflict_bytes} for conflicts"
        )
        return tuple(lines)


def explain(schedule: Schedule) -> Explanation:
    """Explain ``schedule``. O(memberships) and a sort."""
    tasks = schedule.tasks
    graph = build_graph(tasks, schedule.ports)
    loads = graph.loads()
    shares: list[WaveShare] = []
    position = 0
    for index, wave in enumerate(schedule.waves):
        members = range(position, position + len(wave.tasks))
        position += len(wave.tasks)
        if not members:
            continue

        longest = max(members, key=lambda member: (graph.nbytes[member], -member))
        used = sum(graph.nbytes[member] * len(graph.ports[member]) for member in members)
        room = graph.nbytes[longest] * graph.n_ports
        shares.append(
            WaveShare(
                wave=index,
                tasks=len(members),
                nbytes=wave.nbytes,
                longest_task=tasks[longest].id,
                longest_nbytes=graph.nbytes[longest],
                busiest_port=graph.port_names[max(graph.ports[longest], key=loads.__getitem__)],
                idle_share=1 - used / room if room else 0.0,
            )
        )

    bound = max(loads, default=0)
    uncut = uncut_nbytes(graph)
    free = replace(graph, after=())
    needed = least_span(free, waves=lower_bound(free).waves)
    ordered = max(needed, least_span(graph, waves=lower_bound(graph).waves), chain_nbytes(graph))
    return Explanation(
        waves=tuple(shares),
        makespan_bytes=schedule.makespan_bytes,
        bound_bytes=bound,
        size_bytes=uncut - bound,
        wave_bytes=needed - uncut,
        order_bytes=ordered - needed,
        conflict_bytes=schedule.makespan_bytes - ordered,
    )
