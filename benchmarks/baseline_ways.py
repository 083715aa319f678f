"""
Three ways of others to move a plan's bytes, written anew from their descriptions, one process a GPU.

- ``seed``: ChatLearn's synchroniser: buckets of 100 MB are concatenated, sent and copied out, synchronising after each;
  a communicator for each set of members; waves by first fit with a barrier after each.
- ``packed_broadcast``: vLLM's packed weight transfer: trainers gather whole tensors at the first of them, which packs
  them into two buffers of 1 GiB in turn, the next while the last is broadcast to every engine rank; those cut their
  part out.
- ``per_tensor``: PyTorch's ``batch_isend_irecv``, a message a tensor, 64 routes a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from processes import Member

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Shard
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import group_routes
from wavecast.runtime.transfer.memory import dtype_of
from wavecast.scheduler import Task, plan_waves

__all__ = ("Flow", "Held", "WAYS", "Way")

SEED_BUCKET_BYTES = 100_000_000
PACKED_BUFFER_BYTES = 1 << 30
PACKED_BUFFERS = 2
ROUTES_A_BATCH = 64


@dataclass(frozen=True, slots=True)
class Flow:
    """
    What has to go where, whichever the way. Actors are ranks: trainers first, then engines.

    :ivar routes: from trainers to engines
    :ivar gather: from all trainers to the first one, every tensor whole; the receiver is numbered ``sources``
    :ivar bucket_bytes: overrides the ways' own sizes, for models that are smaller than these
    """

    routes: tuple[Route, ...]
    gather: tuple[Route, ...]
    sources: int
    actors: int
    bucket_bytes: int | None = None


class Held:
    """A rank's shards, found by name and box."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._by_name: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        for shard in shards:
            if isinstance(shard.view, torch.Tensor):
                self._by_name.setdefault(shard.name, []).append((shard.box, shard.view))

    def view(self, route: Route) -> torch.Tensor:
        """Return what holds all of ``route``."""
        box, view = next(held for held in self._by_name[route.tensor] if held[0].contains(route.box))
        return _part(view, box, route.box)

    def parts(self, name: str) -> list[tuple[Box, torch.Tensor]]:
        """Return every shard of a tensor with its box."""
        return self._by_name.get(name, [])


class Way(Protocol):
    """Makes, on every rank at once, what moves all bytes once; communicators are made in here too."""

    def __call__(self, member: Member, flow: Flow, held: Held) -> Callable[[], None]: ...


def seed(member: Member, flow: Flow, held: Held) -> Callable[[], None]:
    """ChatLearn's way."""
    sets = group_routes(flow.routes)
    tasks = [
        Task(number, (sender,), receivers, sum(route.nbytes for route in routes), payload=routes)
        for number, ((sender, receivers), routes) in enumerate(sets.items())
    ]
    schedule = plan_waves(tasks, strategy="first_fit")
    groups = {task.id: member.group(task.members) for task in tasks}
    limit = flow.bucket_bytes or SEED_BUCKET_BYTES
    # What each rank does in each wave; views are looked up now, as a synchroniser that caches names does.
    waves = [
        [
            (task, [(bucket, [held.view(route) for route in bucket]) for bucket in _buckets(task.payload, limit)])
            for task in wave.tasks
            if member.rank in task.members
        ]
        for wave in schedule.waves
    ]

    def work() -> None:
        for wave in waves:
            for task, buckets in wave:
                for bucket, views in buckets:
                    _send_bucket(member, task, groups[task.id], bucket, views)
                    member.finish()

            dist.barrier()

    return work


def _send_bucket(
    member: Member, task: Task, group: dist.ProcessGroup, bucket: Sequence[Route], views: Sequence[torch.Tensor]
) -> None:
    sender = task.senders[0]
    if member.rank == sender:
        buffer = torch.cat([_flat(view) for view in views])
    else:
        buffer = torch.empty(sum(route.nbytes for route in bucket), dtype=torch.uint8, device=member.device)

    if len(task.receivers) > 1:
        dist.broadcast(buffer, sender, group=group)
    else:
        _exchange([(sender, task.receivers[0], buffer)], member, group)

    if member.rank != sender:
        at = 0
        for view, route in zip(views, bucket, strict=True):
            view.copy_(_shaped(buffer[at : at + route.nbytes], route.dtype, route.extent))
            at += route.nbytes


def packed_broadcast(member: Member, flow: Flow, held: Held) -> Callable[[], None]:
    """vLLM's way."""
    to_engines = member.group((0, *range(flow.sources, flow.actors)))
    among_trainers = member.group(range(flow.sources)) if flow.sources > 1 else None
    wholes: dict[str, list[Route]] = {}
    for route in flow.gather:
        wholes.setdefault(route.tensor, []).append(route)

    buckets = list(
        _buckets(list(wholes.values()), flow.bucket_bytes or PACKED_BUFFER_BYTES, nbytes=_nbytes, dtype=_dtype)
    )
    streams = _streams(member)

    def work() -> None:
        for number, bucket in enumerate(buckets):
            stream = streams[number % PACKED_BUFFERS]
            with _on(stream):
                if stream is not None:
                    # The buffer before last was made on this stream: it is free when the stream is done.
                    stream.synchronize()

                if member.rank < flow.sources:
                    tensors = [_gathered(member, among_trainers, parts, held) for parts in bucket]
                    if member.rank == 0:
                        dist.broadcast(torch.cat(tensors), 0, group=to_engines)
                else:
                    _take_bucket(member, to_engines, bucket, held)

    return work


def _gathered(member: Member, group: dist.ProcessGroup | None, parts: Sequence[Route], held: Held) -> torch.Tensor:
    """Return a whole tensor's bytes on rank 0; other trainers send what is theirs of it."""
    if len(parts) == 1 and parts[0].sender == 0:
        return _flat(held.view(parts[0])) if member.rank == 0 else torch.empty(0)

    whole = torch.empty(_whole(parts), dtype=dtype_of(parts[0].dtype), device=member.device)
    box = Box((0,) * whole.dim(), tuple(whole.shape))
    messages: list[tuple[int, int, torch.Tensor]] = []
    landed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in parts:
        target = _part(whole, box, part.box)
        if part.sender == 0 == member.rank:
            target.copy_(held.view(part))
        elif member.rank == part.sender:
            messages.append((part.sender, 0, _flat(held.view(part))))
        elif member.rank == 0:
            buffer = torch.empty(part.nbytes, dtype=torch.uint8, device=member.device)
            messages.append((part.sender, 0, buffer))
            landed.append((target, _shaped(buffer, part.dtype, part.extent)))

    _exchange(messages, member, group)
    for target, buffer in landed:
        target.copy_(buffer)

    return _flat(whole)


def _take_bucket(member: Member, group: dist.ProcessGroup, bucket: Sequence[Sequence[Route]], held: Held) -> None:
    buffer = torch.empty(sum(_nbytes(parts) for parts in bucket), dtype=torch.uint8, device=member.device)
    dist.broadcast(buffer, 0, group=group)
    at = 0
    for parts in bucket:
        shape = _whole(parts)
        whole = _shaped(buffer[at : at + _nbytes(parts)], parts[0].dtype, shape)
        at += _nbytes(parts)
        for box, view in held.parts(parts[0].tensor):
            view.copy_(_part(whole, Box((0,) * len(shape), shape), box))


def per_tensor(member: Member, flow: Flow, held: Held) -> Callable[[], None]:
    """PyTorch's way; a tensor that is wanted by several is sent to each."""
    group = member.group(range(flow.actors))
    # All ranks cut the same list: batches that differ between two ranks would wait for each other in a ring.
    batches = [
        [
            (route, held.view(route))
            for route in flow.routes[start : start + ROUTES_A_BATCH]
            if member.rank in (route.sender, *route.receivers)
        ]
        for start in range(0, len(flow.routes), ROUTES_A_BATCH)
    ]

    def work() -> None:
        for batch in batches:
            messages: list[tuple[int, int, torch.Tensor]] = []
            landed: list[tuple[torch.Tensor, torch.Tensor]] = []
            for route, view in batch:
                if member.rank == route.sender:
                    buffer = _flat(view)
                    messages += [(route.sender, receiver, buffer) for receiver in route.receivers]
                elif view.is_contiguous():
                    messages.append((route.sender, member.rank, _flat(view)))
                else:
                    buffer = torch.empty(route.nbytes, dtype=torch.uint8, device=member.device)
                    messages.append((route.sender, member.rank, buffer))
                    landed.append((view, _shaped(buffer, route.dtype, route.extent)))

            _exchange(messages, member, group)
            for view, buffer in landed:
                view.copy_(buffer)

    return work


WAYS: dict[str, Way] = {"seed": seed, "packed_broadcast": packed_broadcast, "per_tensor": per_tensor}

R = TypeVar("R")


def _route_nbytes(route: Route) -> int:
    return route.nbytes


def _route_dtype(route: Route) -> str:
    return route.dtype


def _nbytes(parts: Sequence[Route]) -> int:
    return sum(part.nbytes for part in parts)


def _dtype(parts: Sequence[Route]) -> str:
    return parts[0].dtype


def _whole(parts: Sequence[Route]) -> tuple[int, ...]:
    """Return the shape of the tensor that ``parts`` are all of."""
    return tuple(
        max(start + size for start, size in along)
        for along in zip(*(tuple(zip(part.offset, part.extent, strict=True)) for part in parts), strict=True)
    )


def _buckets(
    items: Sequence[R],
    limit: int,
    *,
    nbytes: Callable[[R], int] = _route_nbytes,  # type: ignore[assignment]
    dtype: Callable[[R], str] = _route_dtype,  # type: ignore[assignment]
) -> Iterator[list[R]]:
    """Yield runs of one dtype within ``limit`` bytes; an item that is larger comes alone."""
    bucket: list[R] = []
    size = 0
    for item in items:
        if bucket and (size + nbytes(item) > limit or dtype(item) != dtype(bucket[0])):
            yield bucket
            bucket, size = [], 0

        bucket.append(item)
        size += nbytes(item)

    if bucket:
        yield bucket


def _exchange(
    messages: Sequence[tuple[int, int, torch.Tensor]], member: Member, group: dist.ProcessGroup | None
) -> None:
    """Send and receive at once, in one group call, on the group's own communicator."""
    operations = [
        dist.P2POp(dist.isend, buffer, receiver, group)
        if member.rank == sender
        else dist.P2POp(dist.irecv, buffer, sender, group)
        for sender, receiver, buffer in messages
    ]
    for done in dist.batch_isend_irecv(operations) if operations else ():
        done.wait()


def _flat(view: torch.Tensor) -> torch.Tensor:
    """Return the view's bytes in row-major order; its own memory where that has them so."""
    return view.contiguous().view(-1).view(torch.uint8)


def _shaped(buffer: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer.view(dtype_of(dtype)).view(shape)


def _part(view: torch.Tensor, held: Box, wanted: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(wanted.offset, wanted.extent, strict=True)):
        if size != view.shape[dim]:
            view = view.narrow(dim, start - held.offset[dim], size)

    return view


def _streams(member: Member) -> list[torch.cuda.Stream | None]:
    on_gpu = member.device.type == "cuda"
    return [torch.cuda.Stream(member.device) if on_gpu else None for _ in range(PACKED_BUFFERS)]


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()
