"""What an actor holds: the shards it was last asked for, and what drivers are told of them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence

import torch

from wavecast.runtime import errors
from wavecast.runtime.collector import collector_paused
from wavecast.runtime.layout.shard import FixedShards, Layout, Place, Shard, describe
from wavecast.runtime.transfer.host import Host
from wavecast.runtime.transfer.lending import why_not_shared
from wavecast.runtime.transfer.memory import Memory

__all__ = ("Holding",)


class Holding:
    """
    An actor's shards, as they were when a run last began.

    :param hook: the user's, which returns the shards
    :ivar memory: over them; ``None`` before the first run, and once they have been let go
    :ivar moves: changes when they have moved in memory
    :ivar unshared: why other processes of the node could not map their memory; empty when they can
    :ivar layout: what they are, and ``digest`` sums it up
    """

    def __init__(self, hook: Callable[[], Sequence[Shard]]) -> None:
        self._hook = hook
        self._place: tuple[torch.device, Place] | None = None
        self._signature: tuple[object, ...] | None = None
        self.memory: Memory | None = None
        self.moves = 0
        self.unshared = ""
        self.layout = Layout(())
        self.digest = ""

    def read(self, actor: int, *, in_haste: bool = False) -> Memory:
        """
        Ask the user's hook; what it returned the last time is taken as it was where it has not changed.

        :param in_haste: a sample will do here: what starts at once looks at each tensor before it touches it
        """
        # Read once: the end of another group's run may let it go meanwhile.
        shards, memory = _listed(self._hook()), self.memory
        if memory is not None and (memory.seems_still(shards) if in_haste else memory.holds_still(shards)):
            return memory

        for shard in shards:
            if not isinstance(shard, Shard):
                raise errors.LayoutError(
                    f"transfer_shards() must return Shard values, got {type(shard).__name__}", actors=(actor,)
                )

        with collector_paused():
            return Memory(shards)

    def take_on(self, live: Memory) -> None:
        """Hold what :meth:`read` returned from now on; work out what has changed with it."""
        if live is not self.memory:
            self.memory = live
            self.moves += 1
            self.unshared = why_not_shared(live) if live.device.type == "cuda" else "it is host memory"

        if live.signature != self._signature:
            self._signature = live.signature
            with collector_paused():
                self.layout = describe(live.shards, sharing=live.sharing)
                self.digest = _digest(self.layout)

    def let_go(self) -> None:
        """Keep no reference to the shards: whoever owns them may free them."""
        self.memory = None

    def locate(self, host: Host, device: torch.device) -> Place:
        """Return where the shards are; an actor never leaves its node, so only its device may change."""
        if self._place is None or self._place[0] != device:
            self._place = (device, Place(host.node(), _device_name(device)))

        return self._place[1]


def _listed(found: object) -> Sequence[Shard]:
    """Return what the user's hook returned, if it is a list of anything."""
    if inspect.iscoroutine(found):
        found.close()

    if not isinstance(found, Iterable):
        raise errors.LayoutError(f"transfer_shards() must return a list of Shard values, got {type(found).__name__}")

    return found if isinstance(found, FixedShards) else list(found)


def _digest(layout: Layout) -> str:
    summary = hashlib.sha256()
    for piece in layout.pieces:
        summary.update(repr(piece).encode())

    summary.update(repr((layout.frozen, layout.computed, layout.sharing)).encode())
    return summary.hexdigest()


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type

    return str(torch.cuda.get_device_properties(device).uuid)
