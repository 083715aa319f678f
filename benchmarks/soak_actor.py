"""An actor that says what its process holds, for the soak on real Ray: in a file that workers can import."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from tests.faults.ray_cells import FaultyPoolActor
from wavecast.runtime.transfer import comm_torch

__all__ = ("Footprint", "SoakActor")


@dataclass(frozen=True, slots=True)
class Footprint:
    """
    What one process holds.

    :ivar private_bytes: resident and its own: pages of Ray's object store that it has looked at are not counted
    :ivar heap_bytes: of these, what glibc's allocator has handed out and not been given back, mapped blocks included:
        growth here is held by somebody; growth of ``private_bytes`` alone lies free in the allocator or outside it
    :ivar process_groups: of torch's that somebody still holds
    """

    private_bytes: int
    heap_bytes: int
    open_files: int
    threads: int
    process_groups: int

    @classmethod
    def now(cls, process_groups: int = 0) -> Footprint:
        gc.collect()
        # What the demo's own large temporaries left free in the allocator's arenas is held by nobody.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return cls(
            private_bytes=1024 * int(status["RssAnon"].split()[0]),
            heap_bytes=_heap_bytes(),
            open_files=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            process_groups=process_groups,
        )


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _heap_bytes() -> int:
    """Return what is in use of all of glibc's arenas and of what it mapped apart."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = _MallInfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


class SoakActor(FaultyPoolActor):
    """Says what its process holds."""

    def __init__(self) -> None:
        super().__init__()
        # Communicators make their groups themselves: torch's own register knows of none.
        self._groups: weakref.WeakSet[object] = weakref.WeakSet()
        make = comm_torch._gloo_group

        def watched(*found: object) -> object:
            group = make(*found)
            self._groups.add(group)
            return group

        comm_torch._gloo_group = watched

    def footprint(self) -> Footprint:
        gc.collect()
        return Footprint.now(len(self._groups))

    def groups_seen(self) -> int:
        """Return how many process groups are held now."""
        return len(self._groups)
