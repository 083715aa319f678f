"""What driver and actors say to each other: plain values, pickled by the host's own channel."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import NamedTuple

from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Piece, Place
from wavecast.runtime.layout.sharing import NOT_SHARED, Sharing
from wavecast.runtime.transfer.program import PackedProgram

__all__ = (
    "Brief",
    "encode",
    "decode",
    "RunId",
    "Request",
    "Status",
    "Begin",
    "CloseRun",
    "Describe",
    "HostStore",
    "Connect",
    "Load",
    "RunStep",
    "Export",
    "Attach",
    "Disconnect",
    "Probe",
    "Compare",
    "RunHook",
    "Commit",
    "Abort",
    "Close",
    "Reply",
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
)


def encode(value: object) -> bytes:
    """Return a message as bytes: the host's channel carries those at least cost."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def decode(data: bytes) -> object:
    """Return the message. Only for bytes that came over the host's own channel: they are unpickled."""
    return pickle.loads(data)


class Brief:
    """
    What is pickled as its class and its fields' values: with their names, as slotted dataclasses do it by themselves, a
    request takes twice as long to write and to read.
    """

    __slots__: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), tuple([getattr(self, name) for name in self.__slots__])


#: Pieces a part: a few milliseconds to unpickle.
_PART_PIECES = 1024


class RunId(NamedTuple):
    """
    Names one sync.

    :ivar group: unguessable name of the group
    :ivar serial: larger than that of any earlier run, of any group
    """

    group: str
    serial: int


@dataclass(frozen=True, slots=True)
class Status(Brief):
    """Asks an actor which version it holds. Answered in any state, changes nothing, and calls no code of the user's."""


@dataclass(frozen=True, slots=True)
class Begin(Brief):
    """
    Opens a run: the actor reads its shards afresh and says what it holds.

    :ivar run: names the run; every later request of it carries it
    :ivar actor: the actor's number
    :ivar scan: count NaN elements in the shards
    :ivar version: the version on its way; ``None`` at an actor that only lends its weights to another replica, whose
        hooks are left alone
    :ivar shadow: write to a second copy of the shards, which the commit copies over them
    :ivar layout: digest of the layout that the run was planned for, where that is not to be told first: an actor that
        holds another one starts nothing, and says so to its peers
    :ivar ahead: the steps that the driver asks for at once: they start with the run, and their calls collect what came
        of them
    :ivar close: how the run ends without a further call, when all went well; ``None``: the driver commits it
    """

    run: RunId
    actor: int
    scan: bool = False
    version: int | None = None
    shadow: bool = False
    layout: str | None = None
    ahead: tuple[RunStep, ...] = ()
    close: CloseRun | None = None


@dataclass(frozen=True, slots=True)
class CloseRun(Brief):
    """
    Ends a run on an actor by itself, once its steps are through and, where it receives, its sums are its senders'.

    :ivar version: as :attr:`Commit.version`; ``None`` at a source
    :ivar newest: the newest version that the driver knows of: an actor that has a newer one leaves the end to it
    :ivar peers: the actors that must have found the same before it does
    """

    version: int | None
    newest: int | None
    peers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Describe(Brief):
    """Asks for the layout itself, where the driver does not know its digest yet."""

    run: RunId


@dataclass(frozen=True, slots=True)
class HostStore(Brief):
    """Asks one actor to host the rendezvous of a connection, on its node's own address."""

    run: RunId
    connection: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Connect(Brief):
    """
    Builds this actor's end of a connection; all its members get one at the same time.

    :ivar connection: name, also the prefix of all keys in the store
    :ivar secret: random bytes that only members of the connection have; seals what they say over the store
    :ivar transport: ``"gloo"``, ``"nccl"`` or ``"ipc"``
    :ivar rank: this actor's number, out of ``size``
    :ivar groups: actor sets (sorted, of three or more) that broadcast among themselves
    :ivar edges: sender and receiver of every one-to-one task, to be warmed up
    :ivar owners: for each actor the one through which its GPU's bytes go; empty: each has a GPU of its own
    """

    run: RunId
    connection: str
    transport: str
    host: str
    port: int
    rank: int
    size: int
    groups: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]
    seconds: float
    # In no log: a message's text may be shown.
    secret: bytes = field(repr=False)
    owners: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Load(Brief):
    """Hands over an actor's program, once a plan."""

    run: RunId
    program: PackedProgram


@dataclass(frozen=True, slots=True)
class RunStep(Brief):
    """
    Runs one step of the loaded program; steps are taken in program order whatever order requests arrive in.

    :ivar step: position in the actor's own program
    :ivar digest: of the program the driver means
    :ivar seconds: time left until the sync's deadline
    """

    run: RunId
    step: int
    digest: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Export(Brief):
    """Asks a sender where the cuts lie that others pull from it."""

    run: RunId


@dataclass(frozen=True, slots=True)
class Attach(Brief):
    """
    Tells a receiver where its senders' cuts lie; what they answered to :class:`Export` is attached, in order.

    :ivar senders: the actors whose addresses are new
    """

    run: RunId
    senders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Disconnect(Brief):
    """
    Asks an actor to give back what it keeps from sync to sync, until that is needed again.

    :ivar communicators: these, and staging memory
    :ivar memory: its mappings of others' memory, and, as the run ends, what keeps its own shards' memory
    """

    run: RunId
    communicators: bool = True
    memory: bool = False


@dataclass(frozen=True, slots=True)
class Probe(Brief):
    """Asks a sender for the bytes of one of its steps, packed on the host."""

    run: RunId
    step: int


@dataclass(frozen=True, slots=True)
class Compare(Brief):
    """Asks a receiver to compare, bit for bit, what it holds with the bytes in the request's attachment."""

    run: RunId
    step: int


@dataclass(frozen=True, slots=True)
class RunHook(Brief):
    """
    Calls a hook of the user's, on an actor that has said it has one.

    ``"before_commit"`` is the vote as well: what the actor answers says whether it can commit. Destinations that are
    staged in shadow are asked for it with or without a hook.

    :ivar hook: ``"before_commit"``, or what ends the run: ``"after_commit"``, ``"after_abort"``
    """

    run: RunId
    hook: str


@dataclass(frozen=True, slots=True)
class Commit(Brief):
    """
    Ends a run that went well.

    :ivar version: the actor's version from now on: all bytes have arrived and been verified. ``None``: it keeps the
        version it had, torn if it was torn: a source, a dry run, a part of the tensors on a replica not whole
    :ivar dry_run: nothing was moved
    """

    run: RunId
    version: int | None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Abort(Brief):
    """Gives up the run: nothing more is written, the connection is dropped."""

    run: RunId
    reason: str


@dataclass(frozen=True, slots=True)
class Close(Brief):
    """Drops the group's connection, program and staging memory."""

    group: str


Request = (
    Status
    | Begin
    | Describe
    | HostStore
    | Connect
    | Load
    | Export
    | Attach
    | Disconnect
    | RunStep
    | Probe
    | Compare
    | RunHook
    | Commit
    | Abort
    | Close
)


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
