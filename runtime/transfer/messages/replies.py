"""What actors answer."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place
from wavecast.runtime.layout.sharing import NOT_SHARED, Sharing
from wavecast.runtime.transfer.messages.wire import Brief

__all__ = (
    "Standing",
    "Began",
    "Addresses",
    "Described",
    "StoreAddress",
    "Connected",
    "Exported",
    "StepDone",
    "Finished",
    "Excerpt",
    "HookDone",
    "Committed",
    "Done",
    "Failure",
    "Reply",
)

#: Pieces a part: a few milliseconds to unpickle.
_PART_PIECES = 1024


@dataclass(frozen=True, slots=True)
class Standing(Brief):
    """
    Where an actor stands between two runs.

    :ivar version: last committed version, ``None`` before the first
    :ivar torn: a run began to write and never committed
    :ivar writing: the version last on its way when it is torn, else ``None``
    """

    version: int | None
    torn: bool
    writing: int | None


@dataclass(frozen=True, slots=True)
class Began(Brief):
    """
    :ivar digest: of the layout now held, its place left out: replicas have equal ones
    :ivar place: node and device of the shards
    :ivar nan: names of tensors with NaN elements and how many, when scanned
    :ivar standing: before this run
    :ivar addresses: changes when shards have moved in memory
    :ivar unshared: why other processes of the node could not map the shards' memory; empty when they can
    :ivar kernels: the actor can run the fused kernels
    :ivar hooks: names of those the user has written
    :ivar hook_seconds: what ``before_sync`` took
    :ivar shadow_bytes: of the second copy of the shards
    """

    digest: str
    place: Place
    nan: tuple[tuple[str, int], ...]
    standing: Standing
    addresses: int = 0
    unshared: str = "not asked"
    kernels: bool = False
    hooks: tuple[str, ...] = ()
    hook_seconds: float = 0.0
    shadow_bytes: int = 0

    @property
    def version(self) -> int | None:
        """The last committed version, ``None`` before the first."""
        return self.standing.version

    @property
    def torn(self) -> bool:
        """Whether a run began to write and never committed."""
        return self.standing.torn


@dataclass(frozen=True, slots=True)
class Addresses(Brief):
    """
    Where an actor's cuts lie that others pull, and its board, for other processes of its node.

    :ivar handles: of its allocations
    :ivar steps: by task id: for each cut the number of its handle, its offset there and its strides, as int64 bytes
    :ivar board: the number of a handle, the offset there of its :class:`~wavecast.runtime.transfer.board.Board`, and
        for how many steps that has room
    :ivar places: by task id: the step's position in the actor's program, and so its sum's on the board
    """

    handles: tuple[bytes, ...]
    steps: dict[int, bytes]
    board: tuple[int, int, int]
    places: dict[int, int]


@dataclass(frozen=True, slots=True)
class Described(Brief):
    """
    What the actor holds; its place is left out.

    :ivar parts: pickled lists of pieces' fields, in order: unpickling a large layout at once would hold up the driver's
        loop, and dataclasses are unpickled at a third of the speed
    :ivar frozen: as :attr:`Layout.frozen`
    :ivar computed: as :attr:`Layout.computed`
    :ivar sharing: as :attr:`Layout.sharing`
    """

    parts: tuple[bytes, ...]
    frozen: tuple[str, ...]
    computed: tuple[str, ...] = ()
    sharing: Sharing = NOT_SHARED

    @classmethod
    def of(cls, layout: Layout) -> Described:
        """Return the message that says ``layout``."""
        rows = [
            (piece.tensor, piece.box.offset, piece.box.extent, piece.global_shape, piece.dtype)
            for piece in layout.pieces
        ]
        return cls(
            tuple(
                pickle.dumps(rows[start : start + _PART_PIECES], protocol=pickle.HIGHEST_PROTOCOL)
                for start in range(0, len(rows), _PART_PIECES)
            ),
            layout.frozen,
            layout.computed,
            layout.sharing,
        )

    def layout(self) -> Layout:
        """Return what it says."""
        pieces = tuple(
            Piece(tensor, Box(offset, extent), global_shape, dtype)
            for part in self.parts
            for tensor, offset, extent, global_shape, dtype in pickle.loads(part)
        )
        return Layout(pieces, frozen=self.frozen, computed=self.computed, sharing=self.sharing)


@dataclass(frozen=True, slots=True)
class StoreAddress(Brief):
    """Where the rendezvous listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Connected(Brief):
    """:ivar communicator_bytes: device memory that the connection took"""

    seconds: float
    communicator_bytes: int


@dataclass(frozen=True, slots=True)
class Exported(Brief):
    """:ivar addresses: where the cuts lie that others pull from the actor"""

    addresses: Addresses


@dataclass(frozen=True, slots=True)
class StepDone(Brief):
    """
    The step's bytes have left, or arrived.

    :ivar finished: with the last step of the actor's program, once everything is in place
    :ivar closed: the run is over on this actor, as :attr:`Begin.close` said
    """

    finished: Finished | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Finished(Brief):
    """
    :ivar checksums: for each step of the program, of the bytes sent, or of those found in the destination's memory
        afterwards; empty when checksums are off
    :ivar staging_bytes: extra memory held for staging
    :ivar host_seconds: what the actor's own threads spent on the run, its begin included and waits left out
    """

    checksums: tuple[int, ...]
    staging_bytes: int
    host_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Excerpt(Brief):
    """:ivar data: the packed bytes of a step, in the destination's dtypes"""

    data: bytes


@dataclass(frozen=True, slots=True)
class HookDone(Brief):
    """:ivar seconds: what the hook took"""

    seconds: float


@dataclass(frozen=True, slots=True)
class Committed(Brief):
    """:ivar flip_seconds: to copy the second copy of the shards over the weights; 0 where there is none"""

    flip_seconds: float


@dataclass(frozen=True, slots=True)
class Done(Brief):
    """Nothing to tell but that it is done. ``differing`` names what a comparison found, if it was one."""

    differing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure(Brief):
    """
    An exception on the actor, as a value.

    :ivar kind: name of a class in :mod:`wavecast.runtime.errors`
    :ivar detail: the traceback's text, for the driver's own traceback
    """

    kind: str
    message: str
    detail: str = ""
    tensor: str = ""


Reply = (
    Standing
    | Began
    | Described
    | StoreAddress
    | Connected
    | Exported
    | StepDone
    | Excerpt
    | HookDone
    | Committed
    | Done
    | Failure
)
