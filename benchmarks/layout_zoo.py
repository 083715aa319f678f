"""
The layout zoo: which layouts go to which, each proved by moving real bytes, with what others say of the same pair.

Each case runs through what a sync does before and on the actors (plan, schedule, verification, programs, addressing of
memory), in one process and without a transport. Both sides are cut from whole tensors by rules of the zoo's own; every
byte of every destination, padding included, is compared with memory cut from the tensors that ought to arrive.

    python benchmarks/layout_zoo.py                          # a table
    python benchmarks/layout_zoo.py --write docs/layouts.md  # puts the table between the page's markers
    python benchmarks/layout_zoo.py --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from zoo_cases import CASES, Case
from zoo_sides import Actor, Tensors
from zoo_verdicts import m2n_says, seed_says

from wavecast.runtime import Layout, SyncOptions, describe
from wavecast.runtime.carriers import Carriers
from wavecast.runtime.errors import WavecastError
from wavecast.runtime.layout.hf import logical_tensors
from wavecast.runtime.layout.shard import Place
from wavecast.runtime.preparation import Preparation, prepare
from wavecast.runtime.transfer.memory import Memory, as_bits, dtype_of

__all__ = ("Row", "main", "run", "table")

_BEGIN, _END = "<!-- zoo: begin -->", "<!-- zoo: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """
    What became of one case.

    :ivar actors: how many, sources and destinations
    :ivar elements: elements of destinations that were compared, 0 where nothing could be moved
    :ivar result: ``"pass"``, or the refusal's class and words
    """

    name: str
    model: str
    source: str
    destination: str
    actors: str
    elements: int
    result: str
    seed: str
    m2n: str


def run(case: Case) -> Row:
    """
    Prove one case.

    :raises AssertionError: when an element is wrong, or the case is refused that should pass, or the other way round
    """
    tensors = _known_tensors(case)
    actors, elements, result, m2n = "", 0, "pass", case.m2n
    try:
        sources = case.source.build(tensors)
        expected = case.destination.build(case.truth(tensors))
        found = case.destination.build({name: _spoiled(tensor) for name, tensor in case.truth(tensors).items()})
        layouts = _describe(case, sources), _describe(case, found)
        actors = f"{len(sources)} to {len(found)}"
        m2n = m2n or m2n_says(*layouts, colocated=case.colocated)
        ready = prepare(*layouts, SyncOptions(chunk_bytes=1 << 13), None, Carriers("gloo"))
        _move(ready, sources, found)
        elements = _compare(case, found, expected)
    except WavecastError as error:
        result = f"{type(error).__name__}: {error}"

    if (case.refusal or "pass") != result.partition(":")[0]:
        raise AssertionError(f"{case.name}: expected {case.refusal or 'pass'}, got {result}")

    return Row(
        case.name,
        case.model,
        case.source.title,
        case.destination.title,
        actors,
        elements,
        result,
        case.seed or seed_says(case),
        m2n or "",
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    head = ("case", "model", "from", "to", "actors", "elements", "Wavecast", "seed", "NVIDIA M2N")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        result = row.result if row.result == "pass" else f"`{row.result}`"
        cells = (row.name, row.model, row.source, row.destination, row.actors, row.elements or "", result)
        lines.append("| " + " | ".join(map(str, (*cells, row.seed, row.m2n))) + " |")

    return "\n".join(lines)


def write(rows: Sequence[Row], path: Path) -> None:
    """
    Put the table between the markers of a Markdown file.

    :raises ValueError: when the file has no markers
    """
    head, tail = _around(path)
    path.write_text(f"{head}{_BEGIN}\n\n{_summary(rows)}\n\n{table(rows)}\n\n{_END}{tail}", encoding="utf-8")


def _around(path: Path) -> tuple[str, str]:
    head, begin, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{path} lacks the markers {_BEGIN} and {_END}")

    return head, tail


def _summary(rows: Sequence[Row]) -> str:
    passed = [row for row in rows if row.result == "pass"]
    return (
        f"{len(rows)} pairs: {len(passed)} pass, {sum(row.elements for row in passed)} elements compared; "
        f"{len(rows) - len(passed)} cannot be, and are refused by name."
    )


def _known_tensors(case: Case) -> Tensors:
    """Return every logical tensor, with random bits that follow from its name; no NaN, no infinity, of size about 1."""
    found: Tensors = {}
    for tensor in logical_tensors(case.config):
        seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        dtype = dtype_of(tensor.dtype) if tensor.dtype else case.dtype
        found[tensor.name] = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(dtype)

    return found


def _spoiled(tensor: torch.Tensor) -> torch.Tensor:
    """Return other bits in every element."""
    other = tensor.clone()
    bits = as_bits(other)
    bits.bitwise_xor_(0x55)
    return other


def _describe(case: Case, actors: Sequence[Actor]) -> list[Layout]:
    return [
        describe(actor.shards, place=Place("node", f"GPU-{index}") if case.colocated else None)
        for index, actor in enumerate(actors)
    ]


def _move(ready: Preparation, sources: Sequence[Actor], destinations: Sequence[Actor]) -> None:
    """Carry out every actor's program: each cut read, cast and written as the actors themselves address it."""
    memories = [Memory(actor.shards) for actor in (*sources, *destinations)]
    for wave in ready.schedule.waves:
        for task in wave.tasks:
            sender = task.senders[0]
            step = ready.programs[sender].steps[ready.step_of[sender][task.id]]
            for receiver in step.receivers:
                if ready.programs[receiver].steps[ready.step_of[receiver][task.id]] != step:
                    raise AssertionError(f"actors {sender} and {receiver} disagree on task {task.id}")

            for cut in step.cuts:
                value = as_bits(memories[sender].source(cut).to(dtype_of(cut.dtype)))
                for receiver in step.receivers:
                    for target in memories[receiver].targets(cut):
                        as_bits(target).copy_(value)


def _compare(case: Case, found: Sequence[Actor], expected: Sequence[Actor]) -> int:
    """Compare all memory of all destinations, bit for bit; return how many logical elements they hold."""
    for index, (own, wanted) in enumerate(zip(found, expected, strict=True)):
        for place, (a, b) in enumerate(zip(own.memory, wanted.memory, strict=True)):
            if a.dtype != b.dtype or not torch.equal(as_bits(a), as_bits(b)):
                raise AssertionError(f"{case.name}: tensor {place} of destination {index} is wrong")

    return sum(math.prod(shard.view.shape) for actor in found for shard in actor.shards)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the zoo and print or write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their names")
    parser.add_argument("--write", type=Path, metavar="PATH", help="put the table into a Markdown file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.only and options.write:
        parser.error("--write takes the whole zoo, --only a part of it")

    chosen = [case for case in CASES if options.only in case.name]
    if not chosen:
        parser.error(f"--only: no case has {options.only!r} in its name")

    if options.write:
        try:
            _around(options.write)
        except (OSError, ValueError) as error:
            parser.error(f"--write: cannot rewrite {options.write}: {error}")

    rows = [run(case) for case in chosen]
    if options.write:
        write(rows, options.write)

    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))
    elif not options.write:
        print(f"{_summary(rows)}\n\n{table(rows)}")

    return 0


if __name__ == "__main__":
    raise SystemExit(main())
