"""What an actor tells others of its memory, so that they can read it."""

from __future__ import annotations

from array import array

from wavecast.runtime.errors import SyncError
from wavecast.runtime.transfer.board import Board, index_of
from wavecast.runtime.transfer.cuda_memory import Exporter, make_current
from wavecast.runtime.transfer.memory import Memory, strided
from wavecast.runtime.transfer.messages import Addresses
from wavecast.runtime.transfer.program import Program

__all__ = ("export_addresses", "why_not_shared")

#: Tensors whose allocations are tried, from all over, before an actor says that its memory can be shared.
_TRIED = 32


def why_not_shared(memory: Memory) -> str:
    """
    Return why other processes could not map the memory, or nothing when it seems that they can.

    A few allocations are tried: mostly all are of one kind, to try thousands takes 0.3 s, and one that cannot be
    shared is noticed at the latest when it is to be.
    """
    exporter = Exporter()
    make_current(index_of(memory.device))
    addresses = sorted({address for address in memory.addresses() if address})
    try:
        for address in addresses[:: max(len(addresses) // _TRIED, 1)]:
            exporter.locate(address)
    except SyncError as error:
        return str(error)

    return ""


def export_addresses(program: Program, memory: Memory, board: Board) -> Addresses:
    """
    Return where the cuts lie that others pull from this actor, and its board.

    :raises TransportUnavailable: when the memory cannot be shared
    """
    make_current(index_of(memory.device))
    exporter = Exporter()
    steps: dict[int, bytes] = {}
    for step in program.steps:
        if step.pull and step.sender == program.actor:
            numbers = array("q")
            for cut in step.cuts:
                place = strided(memory.source(cut))
                numbers.extend((*exporter.locate(place.address), *place.strides))

            steps[step.task] = numbers.tobytes()

    memory.mapped.note(exporter.ranges, index_of(memory.device))
    places = {step.task: place for place, step in enumerate(program.steps)}
    number, offset = exporter.locate(board.page.data_ptr())
    return Addresses(tuple(exporter.handles), steps, (number, offset, board.steps), places)
