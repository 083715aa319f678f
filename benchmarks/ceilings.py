"""
What the wire can do: one message of the same bytes on every edge of a pattern, with nothing around it.

A ceiling is keyed by what travels where, and measured once a run: several cases share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from common import quantile
from processes import Member, Row, run_in_turn
from torch.multiprocessing.reductions import reduce_tensor

__all__ = ("Ceiling", "CeilingBook", "Edge", "best_rate", "local_rate")

Edge = tuple[int, int]

#: The busiest port's bytes: from about a gigabyte on the rate hardly changes with the size.
_PORT_BYTES = 8 << 30
_PORT_BYTES_ON_CPU = 64 << 20
_LARGE = 2_000_000_000
_REPEATS = 10


@dataclass(frozen=True, slots=True)
class Ceiling:
    """
    A pattern to measure.

    :ivar kind: ``"sendrecv"`` (all edges in one group call of NCCL, on CPUs gloo), ``"broadcast"`` (from the one source
        to all the others), ``"ipc"`` (receivers pull through CUDA IPC handles, one edge after the other, the receivers
        starting at different sources) or ``"copy"`` (within GPU 0)
    :ivar edges: source and destination GPU of each message
    :ivar nbytes: of each message
    :ivar device: ``"cuda"`` or ``"cpu"``
    """

    kind: str
    edges: tuple[Edge, ...]
    nbytes: int
    device: str

    @property
    def port_bytes(self) -> int:
        """Bytes through the busiest port, each GPU having one in and one out; a broadcast leaves its source once."""
        if self.kind == "broadcast":
            return self.nbytes

        return self.nbytes * _degree(self.edges)

    @property
    def name(self) -> str:
        """Kind and edges in words."""
        if self.kind == "copy":
            return "copy within a GPU"

        return f"{self.kind} {' '.join(f'{source}>{target}' for source, target in self.edges)}"


class CeilingBook:
    """
    The ceilings of one run, each measured when it is first asked for.

    :ivar rows: what was measured or failed, in order, as JSON values
    """

    def __init__(self, *, device: str, seconds: float) -> None:
        self.rows: list[Row] = []
        self._device = device
        self._seconds = seconds
        self._known: dict[Ceiling, Row] = {}

    def measure(self, *, edges: tuple[Edge, ...], port_bytes: int, broadcast: bool, local: bool) -> list[Row]:
        """
        Return the ceilings of a pattern: the best of them is the port's.

        :param port_bytes: of the case; patterns of many bytes are all measured with one size
        :param broadcast: the pattern is one source's, to all others the same
        :param local: measure copies within a GPU as well
        """
        wanted = self._wanted(edges, port_bytes, broadcast=broadcast, local=local)
        new = [ceiling for ceiling in wanted if ceiling not in self._known]
        if new:
            self._take(new)

        return [self._known[ceiling] for ceiling in wanted]

    def _wanted(self, edges: tuple[Edge, ...], port_bytes: int, *, broadcast: bool, local: bool) -> list[Ceiling]:
        on_gpu = self._device == "cuda"
        most = _PORT_BYTES if on_gpu else _PORT_BYTES_ON_CPU
        size = most if port_bytes > _LARGE else min(port_bytes, most)
        wanted = []
        if edges:
            each = max(size // (1 if broadcast else _degree(edges)) // 16 * 16, 16)
            kinds = ("broadcast",) if broadcast else ("sendrecv", "ipc") if on_gpu else ("sendrecv",)
            wanted = [Ceiling(kind, edges, each, self._device) for kind in kinds]

        return [*wanted, Ceiling("copy", (), most // 2, self._device)] if local else wanted

    def _take(self, ceilings: list[Ceiling]) -> None:
        world = max((gpu for ceiling in ceilings for edge in ceiling.edges for gpu in edge), default=0) + 1
        named = {ceiling.name: ceiling for ceiling in ceilings}
        found = run_in_turn(_measure, named, world=world, device=self._device, seconds=self._seconds)
        for name, ceiling in named.items():
            row: Row = {
                "pattern": ceiling.name,
                "kind": ceiling.kind,
                "edges": [list(edge) for edge in ceiling.edges],
                "nbytes": ceiling.nbytes,
                "port_bytes": ceiling.port_bytes,
            }
            if "seconds" in found[name]:
                seconds = found[name]["seconds"]
                middle = quantile(seconds, 0.5)  # type: ignore[arg-type]
                row |= {
                    "seconds": {"p50": middle, "min": min(seconds), "max": max(seconds)},  # type: ignore[call-overload]
                    "gigabytes_per_second": ceiling.port_bytes / middle / 1e9,
                }
            else:
                row["error"] = found[name]["error"]

            self._known[ceiling] = row
            self.rows.append(row)


def best_rate(rows: Iterable[Row]) -> float | None:
    """Return the highest rate across GPUs in GB/s, ``None`` where none was measured."""
    rates = [float(str(row["gigabytes_per_second"])) for row in rows if row["kind"] != "copy" and "error" not in row]
    return max(rates, default=None)


def local_rate(rows: Iterable[Row]) -> float | None:
    """Return the rate of copies within a GPU in GB/s, ``None`` where it was not measured."""
    rates = [float(str(row["gigabytes_per_second"])) for row in rows if row["kind"] == "copy" and "error" not in row]
    return max(rates, default=None)


def _degree(edges: Iterable[Edge]) -> int:
    """Return how many messages the busiest port sends or receives."""
    listed = list(edges)
    leaving = Counter(source for source, _ in listed)
    arriving = Counter(target for _, target in listed)
    return max([*leaving.values(), *arriving.values()], default=1)


def _measure(member: Member, ceilings: dict[str, Ceiling]) -> None:
    """Measure one after the other, in all processes at once."""
    for name, ceiling in ceilings.items():
        run = {"sendrecv": _sendrecv, "broadcast": _broadcast, "ipc": _ipc, "copy": _copy}[ceiling.kind]
        seconds = run(member, ceiling)
        if member.rank == 0:
            member.report({"name": name, "seconds": seconds})

        if member.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()


def _sendrecv(member: Member, ceiling: Ceiling) -> list[float]:
    group = member.group(range(member.world))
    outgoing, incoming = _buffers(member, ceiling)

    def work() -> None:
        operations = []
        for source, target in ceiling.edges:
            if member.rank == source:
                operations.append(dist.P2POp(dist.isend, outgoing, target, group))
            elif member.rank == target:
                operations.append(dist.P2POp(dist.irecv, incoming[source], source, group))

        for done in dist.batch_isend_irecv(operations) if operations else ():
            done.wait()

    return member.time(work, repeats=_REPEATS, warm=2)


def _broadcast(member: Member, ceiling: Ceiling) -> list[float]:
    root = ceiling.edges[0][0]
    ranks = sorted({root, *(target for _, target in ceiling.edges)})
    group = member.group(ranks)
    buffer = _filled(ceiling.nbytes if member.rank in ranks else 0, member)

    def work() -> None:
        if member.rank in ranks:
            dist.broadcast(buffer, root, group=group)

    return member.time(work, repeats=_REPEATS, warm=2)


def _ipc(member: Member, ceiling: Ceiling) -> list[float]:
    outgoing, incoming = _buffers(member, ceiling)
    # An empty tensor has no memory to export.
    handle = reduce_tensor(outgoing) if outgoing.numel() else None
    handles: list[object] = [None] * member.world
    dist.all_gather_object(handles, handle)
    remote: dict[int, torch.Tensor] = {}
    for source in _staggered(sorted(incoming), member.rank):
        rebuild, args = handles[source]  # type: ignore[misc]
        remote[source] = rebuild(*args)

    def work() -> None:
        for source, view in remote.items():
            incoming[source].copy_(view)

    seconds = member.time(work, repeats=_REPEATS, warm=2)
    remote.clear()
    # Sources keep what others have mapped until nobody does any more.
    dist.barrier()
    return seconds


def _copy(member: Member, ceiling: Ceiling) -> list[float]:
    mine = member.rank == 0
    source = _filled(ceiling.nbytes if mine else 0, member)
    target = torch.empty_like(source)
    return member.time(lambda: _fill(target, source), repeats=_REPEATS, warm=2)


def _fill(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _staggered(sources: list[int], rank: int) -> list[int]:
    """Turn the list so that receivers of the same sources begin at different ones."""
    turn = rank % len(sources) if sources else 0
    return sources[turn:] + sources[:turn]


def _buffers(member: Member, ceiling: Ceiling) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Return what this rank sends, empty if nothing, and where it receives from each source."""
    sends = any(source == member.rank for source, _ in ceiling.edges)
    incoming = {source: _filled(ceiling.nbytes, member) for source, target in ceiling.edges if target == member.rank}
    return _filled(ceiling.nbytes if sends else 0, member), incoming


def _filled(nbytes: int, member: Member) -> torch.Tensor:
    return torch.full((nbytes,), member.rank, dtype=torch.uint8, device=member.device)
