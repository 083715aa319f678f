"""What CUDA says of memory that other processes have mapped."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from wavecast.runtime.transfer.cuda_memory import CopyBatch, Exporter, ensure_current, make_current, open_memory
from wavecast.runtime.transfer.mapped import Mapped

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ELEMENTS = 1 << 22


@pytest.mark.gpu
@needs_gpu
def test_memory_reloaded_to_where_it_was_is_known_from_what_others_have_mapped() -> None:
    tensor = torch.full((ELEMENTS,), 1.0, device="cuda")
    address = tensor.data_ptr()
    make_current(tensor.device.index)
    before, mapped = Exporter(), Mapped()
    number, offset = before.locate(address)
    mapped.note(before.ranges, tensor.device.index)
    assert mapped.changed() is None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    reader = context.Process(target=_read, args=(theirs,), daemon=True)
    reader.start()
    try:
        assert _ask(ours, before.handles[number], offset) == 1.0
        tensor.untyped_storage().resize_(0)
        torch.cuda.empty_cache()
        assert mapped.changed() is not None
        tensor.untyped_storage().resize_(ELEMENTS * 4)
        tensor.fill_(2.0)
        torch.cuda.synchronize()
        if tensor.data_ptr() == address:
            # All that tells it from a tensor that stayed.
            assert mapped.changed(mapped.holding([address])) is not None
            assert _ask(ours, before.handles[number], offset) == 1.0

        after = Exporter()
        number, offset = after.locate(tensor.data_ptr())
        assert after.handles[number] != before.handles[0]
        assert _ask(ours, after.handles[number], offset) == 2.0
    finally:
        reader.kill()
        reader.join()


def _ask(pipe: Connection, handle: bytes, offset: int) -> float:
    pipe.send((handle, offset))
    assert pipe.poll(60)
    found = pipe.recv()
    assert isinstance(found, float)
    return found


def _read(pipe: Connection) -> None:
    """Map what is asked for, for good, and say what the first element is."""
    found = torch.zeros(4, device="cuda")
    ensure_current(found.device.index)
    opened: dict[bytes, int] = {}
    while True:
        handle, offset = pipe.recv()
        if handle not in opened:
            opened[handle] = open_memory(handle)

        CopyBatch([(found.data_ptr(), opened[handle] + offset, 16)]).start(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        pipe.send(found[0].item())


def test_what_nobody_has_mapped_never_changes() -> None:
    """Without a call of CUDA's: there may be no GPU."""
    mapped = Mapped()
    assert mapped.holding([1 << 20]) == ()
    assert mapped.changed() is None
    assert mapped.changed(()) is None


def test_an_allocation_is_found_by_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {100: 7, 300: 8}
    monkeypatch.setattr("wavecast.runtime.transfer.mapped.identity_of", numbers.__getitem__)
    monkeypatch.setattr("wavecast.runtime.transfer.mapped.ensure_current", lambda index: None)
    mapped = Mapped()
    mapped.note([(300, 310), (100, 200)], 0)
    assert mapped.holding([99, 100, 199, 200, 309, 150, 310]) == (100, 300)
    numbers[300] = 9
    assert mapped.changed() == range(300, 310)
    assert mapped.changed([100]) is None
    mapped.note([(300, 320)], 0)
    assert mapped.changed() is None
    assert mapped.holding([319]) == (300,)
