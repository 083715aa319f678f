"""What a driver asks of actors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from wavecast.runtime.transfer.messages.wire import Brief
from wavecast.runtime.transfer.program import PackedProgram

__all__ = (
    "RunId",
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
    "Request",
)


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
