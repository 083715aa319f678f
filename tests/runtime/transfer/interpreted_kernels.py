"""Run by test_kernels.py in a process of its own, under TRITON_INTERPRET=1: the real kernels over host memory."""

from __future__ import annotations

import random
import sys

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from tests.runtime.transfer.host_device import signed, weighed_sum
from wavecast.runtime.transfer import tables
from wavecast.runtime.transfer.memory import strided
from wavecast.runtime.transfer.segments import Segment, pair_segments

CPU = torch.device("cpu")


def mend_interpreter() -> None:
    """numpy makes no int of an array of one element any more, which the interpreter's ranges rely on."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


def random_bytes(nbytes: int, seed: int, *, skip: int = 0) -> torch.Tensor:
    """Bytes that start ``skip`` after a multiple of 16."""
    data = torch.frombuffer(bytearray(random.Random(seed).randbytes(nbytes + 32)), dtype=torch.uint8)
    start = -data.data_ptr() % 16 + skip
    return data[start : start + nbytes]


def contiguous(nbytes: int, skip: int, wire: int) -> tuple[torch.Tensor, torch.Tensor, list[Segment]]:
    source, target = random_bytes(nbytes, 1, skip=skip), random_bytes(nbytes, 2, skip=skip)
    return source, target, [Segment(source.data_ptr(), target.data_ptr(), 1, nbytes, 0, 0, wire)]


def rows(
    count: int, nbytes: int, pitches: tuple[int, int], skip: int, wire: int
) -> tuple[torch.Tensor, torch.Tensor, list[Segment]]:
    first, second = (random_bytes(count * pitch, seed, skip=skip) for seed, pitch in enumerate(pitches, 3))
    source = first.as_strided((count, nbytes), (pitches[0], 1))
    target = second.as_strided((count, nbytes), (pitches[1], 1))
    return source, target, list(pair_segments((count, nbytes), 1, strided(source), strided(target), wire=wire))


def transposed() -> tuple[torch.Tensor, torch.Tensor, list[Segment]]:
    source = random_bytes(60 * 70 * 2, 5).view(torch.int16).view(70, 60).t()
    target = random_bytes(60 * 70 * 2, 6).view(torch.int16).view(60, 70)
    return source, target, list(pair_segments((60, 70), 2, strided(source), strided(target), wire=48))


CASES = {
    "16 bytes": lambda: contiguous(16, 0, 0),
    "several tiles of 8": lambda: contiguous(300_000, 0, 1 << 33),
    "several tiles of 4": lambda: contiguous(200_004, 4, 4),
    "several tiles of 2": lambda: contiguous(100_002, 2, 10),
    "several tiles of 1": lambda: contiguous(50_001, 1, 3),
    "rows of 8": lambda: rows(700, 208, (224, 272), 0, 32),
    "rows of 4": lambda: rows(300, 100, (104, 140), 4, 16),
    "rows of 2": lambda: rows(300, 90, (102, 94), 2, 6),
    "rows of 1": lambda: rows(33, 29, (30, 31), 5, 7),
    "transposed": transposed,
}


def check(name: str) -> None:
    source, target, segments = CASES[name]()
    before = target.clone()
    wire = bytes(source.contiguous().view(-1).view(torch.uint8).tolist())
    first = segments[0].wire
    built = tables.build_tables(segments, CPU)
    assert sum(int(table.rows[:, 2] @ table.rows[:, 3]) * table.unit for table in built) == len(wire)

    def totals(launch: object, *arguments: object) -> int:
        total = torch.zeros(1, dtype=torch.int64)
        for table in built:
            launch(table, total, *arguments)  # type: ignore[operator]

        return int(total)

    expected = signed(weighed_sum(wire, first))
    old = signed(weighed_sum(bytes(before.contiguous().view(-1).view(torch.uint8).tolist()), first))
    assert totals(tables.sum_source) == expected, f"{name}: sum of what is read"
    assert totals(tables.sum_target) == old, f"{name}: sum of what is written, before"
    assert torch.equal(target, before), f"{name}: a sum wrote"
    for table in built:
        tables.copy_table(table)

    assert torch.equal(target, source), f"{name}: copy"
    assert totals(tables.sum_target) == expected, f"{name}: sum of what was written"
    target.copy_(before)
    assert totals(tables.stage_and_sum_table) == expected, f"{name}: sum beside a copy"
    assert torch.equal(target, source), f"{name}: copy beside a sum"
    # Addresses may be given from a base on.
    base = segments[0].target
    moved = [each._replace(target=each.target - base) for each in segments]
    target.copy_(before)
    for table in tables.build_tables(moved, CPU):
        tables.copy_table(table, target_base=base)

    assert torch.equal(target, source), f"{name}: copy to a base"


if __name__ == "__main__":
    mend_interpreter()
    tables._multiprocessors = lambda device: 3  # type: ignore[assignment]
    for name in CASES:
        check(name)

    sys.stdout.write(f"all {len(CASES)} cases\n")
