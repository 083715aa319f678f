"""What one actor has to do, in order: sent once, run many times."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.naming import Renames
from wavecast.runtime.plan.route import Route
from wavecast.runtime.plan.tasks import task_ends, task_routes
from wavecast.scheduler import Schedule

__all__ = (
    "ALIGNMENT",
    "Cut",
    "Step",
    "Program",
    "PackedProgram",
    "Bucket",
    "Placed",
    "compile_programs",
    "padded",
    "pack_programs",
    "fill_buckets",
)

#: Every cut starts at a multiple of this many bytes of its bucket, so that it can be viewed in its own dtype.
ALIGNMENT = 16
#: Of what is too large for the rest of a bucket no less goes in there.
_LEAST_PIECE_NBYTES = 1 << 20
#: Of more than so many buckets the first and the last have this part of the others' bytes. Packing is three times as
#: fast as a link: the second one is packed by the time the first is through.
_MANY = 4
_TAPER = 3


class Cut(NamedTuple):
    """A box of a logical tensor and the dtype in which it travels. A named tuple: programs hold very many."""

    tensor: str
    offset: tuple[int, ...]
    extent: tuple[int, ...]
    dtype: str

    @property
    def box(self) -> Box:
        """The cut's place in the logical tensor."""
        return Box(self.offset, self.extent)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the wire."""
        return self.box.numel * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """
    One task as its members see it; they all hold an equal step.

    :ivar task: the task's id
    :ivar sender: the actor whose memory is read
    :ivar receivers: the actors whose memory is written
    :ivar cuts: what travels, in wire order
    :ivar pull: the receiver fetches the cuts out of the sender's memory; otherwise they are packed, moved and unpacked
    :ivar near: sender and receiver share a GPU
    :ivar through: members that are neither, and own the port of a GPU that what is moved goes through
    """

    task: int
    sender: int
    receivers: tuple[int, ...]
    cuts: tuple[Cut, ...]
    pull: bool = False
    near: bool = False
    through: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """
    All steps of one actor, in wave order.

    :ivar digest: of the plan and schedule it was made from: equal on all actors
    :ivar actor: whose program it is
    :ivar bucket_bytes: bytes that travel at once; two buckets are held, one being filled while one travels
    :ivar checksum: whether both ends of a step sum up its bytes
    :ivar kernels: packing, unpacking and summing up are done by fused kernels, on all actors or on none: the two ways
        have sums of their own
    :ivar renames: the actor's own names of which cuts have others; names that are missing here are the cuts' own
    """

    digest: str
    actor: int
    bucket_bytes: int
    checksum: bool
    kernels: bool
    steps: tuple[Step, ...]
    renames: Renames = ()


@dataclass(frozen=True, slots=True)
class PackedProgram:
    """
    A program ready to be sent: a step is pickled once for all its members, and off the event loop.

    :ivar steps: each a pickled :class:`Step`, so that no single piece of work is long
    """

    digest: str
    actor: int
    bucket_bytes: int
    checksum: bool
    kernels: bool
    steps: tuple[bytes, ...]
    renames: Renames = ()

    def unpack(self) -> Program:
        """Return the program."""
        steps = tuple(pickle.loads(step) for step in self.steps)
        return Program(self.digest, self.actor, self.bucket_bytes, self.checksum, self.kernels, steps, self.renames)


class Placed(NamedTuple):
    """A cut and the byte at which it starts in its bucket."""

    cut: Cut
    start: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """
    What travels at once.

    :ivar nbytes: alignment included
    :ivar first: bytes of the step's buckets before this one
    """

    items: tuple[Placed, ...]
    nbytes: int
    first: int = 0


def compile_programs(
    schedule: Schedule,
    *,
    actors: int,
    digest: str,
    bucket_bytes: int,
    checksum: bool,
    kernels: bool = False,
    pulled: Callable[[Route], bool] | None = None,
    near: Callable[[Route], bool] | None = None,
    renames: Sequence[Renames] = (),
) -> tuple[Program, ...]:
    """
    Return the program of each actor: its own steps, in wave order. Tasks carry their routes as payload.

    :param pulled: tells whether a route is pulled; all routes of a task alike. Left out, none is
    :param near: tells whether the members of a pulled route share a GPU. Left out, none do
    :param renames: one an actor, or none at all
    """
    steps: list[list[Step]] = [[] for _ in range(actors)]
    for wave in schedule.waves:
        for task in wave.tasks:
            routes = task_routes(task)
            pull = pulled is not None and bool(routes) and pulled(routes[0])
            beside = pull and near is not None and near(routes[0])
            sender, receivers = task_ends(task)
            through = tuple(member for member in task.members if member != sender and member not in receivers)
            step = Step(task.id, sender, receivers, _cuts(routes), pull, beside, through)
            for member in task.members:
                steps[member].append(step)

    return tuple(
        Program(digest, actor, bucket_bytes, checksum, kernels, tuple(own), renames[actor] if renames else ())
        for actor, own in enumerate(steps)
    )


def pack_programs(programs: Iterable[Program]) -> tuple[PackedProgram, ...]:
    """Return ``programs`` ready to be sent."""
    pickled: dict[int, bytes] = {}
    packed: list[PackedProgram] = []
    for program in programs:
        for step in program.steps:
            if step.task not in pickled:
                pickled[step.task] = pickle.dumps(step, protocol=pickle.HIGHEST_PROTOCOL)

        steps = tuple(pickled[step.task] for step in program.steps)
        packed.append(
            PackedProgram(
                program.digest,
                program.actor,
                program.bucket_bytes,
                program.checksum,
                program.kernels,
                steps,
                program.renames,
            )
        )

    return tuple(packed)


def fill_buckets(cuts: Iterable[Cut], *, bucket_bytes: int) -> tuple[Bucket, ...]:
    """
    Lay ``cuts`` out in buckets of at most ``bucket_bytes``, in order. Sender and receivers find the same.

    What does not fit in the rest of a bucket is cut into boxes of whole rows, or of parts of one row where that is too
    large itself, unless little would go in there. Of many buckets the first and the last are small: nothing travels
    while the one is packed and the other is unpacked.

    :raises ValueError: when an element may not fit in a bucket
    """
    # Padding must not lead over the edge.
    room = bucket_bytes // ALIGNMENT * ALIGNMENT
    if room == 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, it must be at least {ALIGNMENT}")

    held = [cut for cut in cuts if cut.nbytes]
    rooms = _rooms(sum(padded(cut.nbytes) for cut in held), room)
    filling = _Filling(next(rooms))
    for cut in held:
        pending = [cut]
        while pending:
            piece = pending.pop()
            if piece.nbytes <= filling.left:
                filling.add(piece)
                continue

            dim, row_nbytes = _rows_of(piece)
            count = filling.left // row_nbytes
            if filling.items and count * row_nbytes < _LEAST_PIECE_NBYTES:
                filling.close(next(rooms))
                pending.append(piece)
            else:
                # The first of them comes next; not even one row may fit, which is cut then.
                pending += reversed(_cut_rows(piece, max(count, 1), dim))

    return filling.buckets()


class _Filling:
    """Buckets, and the one that is being filled."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._used = 0
        self._before = 0
        self._closed: list[Bucket] = []
        self.items: list[Placed] = []

    @property
    def left(self) -> int:
        return self._room - self._used

    def add(self, cut: Cut) -> None:
        self.items.append(Placed(cut, self._used))
        self._used += padded(cut.nbytes)

    def close(self, room: int) -> None:
        """Begin another one of ``room`` bytes."""
        self._closed.append(Bucket(tuple(self.items), self._used, self._before))
        self._before += self._used
        self._room, self._used, self.items = room, 0, []

    def buckets(self) -> tuple[Bucket, ...]:
        last = (Bucket(tuple(self.items), self._used, self._before),) if self.items else ()
        return (*self._closed, *last)


def _cuts(routes: tuple[Route, ...]) -> tuple[Cut, ...]:
    return tuple(Cut(route.tensor, route.offset, route.extent, route.dtype) for route in routes)


def padded(nbytes: int) -> int:
    """Return the bytes that so many take on the wire, up to where the next cut may start."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _rooms(total: int, room: int) -> Iterator[int]:
    """Yield the bytes of one bucket after the other for ``total`` of them."""
    ends = room // _TAPER // ALIGNMENT * ALIGNMENT
    if total > _MANY * room and ends >= _LEAST_PIECE_NBYTES:
        yield ends
        between = -(-(total - 2 * ends) // room)
        yield from itertools.repeat(padded(-(-(total - 2 * ends) // between)), between)

    yield from itertools.repeat(room)


def _rows_of(cut: Cut) -> tuple[int, int]:
    """Return the dim along which a cut is cut first, and the bytes of an index of it; all of them for one element."""
    dim, size = next(((dim, size) for dim, size in enumerate(cut.extent) if size > 1), (0, 1))
    return dim, cut.nbytes // size


def _cut_rows(cut: Cut, count: int, dim: int) -> tuple[Cut, Cut]:
    boxes = cut.box.rows(0, count, dim=dim), cut.box.rows(count, cut.extent[dim], dim=dim)
    first, rest = (Cut(cut.tensor, box.offset, box.extent, cut.dtype) for box in boxes)
    return first, rest
