"""
The cases of the sync benchmark by name: which model, who holds what of it, on which GPUs, and what it should reach.

A side is written as a mesh (``"tp=2,ep=2,etp=1"``), or as ``"fsdp2=2"`` (each parameter cut along its first dim, as
FSDP2 does), ``"flat=8"`` (the model laid end to end and cut into so many ranges, as FSDP1 does; actors share the ranges
out) or ``"vllm=2"`` (an engine's fused parameters under tensor parallelism).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from wavecast.runtime.demo_memory import DemoMemory, EngineMemory, FlatMemory, SeparateMemory
from wavecast.runtime.errors import ConfigError
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.config import ModelConfig
from wavecast.runtime.layout.dtypes import itemsize
from wavecast.runtime.layout.hf import layouts, logical_tensors
from wavecast.runtime.layout.mesh import MeshSpec, split_even
from wavecast.runtime.layout.shard import Layout, Piece
from wavecast.runtime.layout.vllm import EngineRank
from wavecast.runtime.model import resolve_model
from wavecast.runtime.options import SyncOptions
from wavecast.scheduler import STRATEGIES

__all__ = ("CASES", "SUITES", "Bar", "Case", "ad_hoc", "engine_memories", "find_cases", "memories", "trainer_memories")

MIB = 1 << 20
GIB = 1 << 30

#: Sides that are no mesh.
_KINDS = ("fsdp2", "flat", "vllm")
#: Actors of a case, and ranges of a flat model: all of them are on one machine.
_MOST = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """
    What a case should reach.

    :ivar share: of the port's ceiling, for the bytes that must cross from one GPU to another
    :ivar overhead_seconds: on top of the time that these bytes take at that share
    :ivar host_seconds: the most that an actor's host thread may be busy, where that is asked for
    :ivar pause_seconds: the most for which an engine's weights may not be read, where that is asked for: then the time
        of the whole sync is not
    """

    share: float = 1.0
    overhead_seconds: float = 0.0
    host_seconds: float | None = None
    pause_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """
    One benchmark of whole syncs.

    :ivar suite: ``"one"``, ``"two"`` and ``"four"`` name the GPUs needed (``"schedules"`` needs four), ``"cpu"`` runs
        anywhere
    :ivar layers: decoder layers, ``None`` for all of the preset's
    :ivar trainers: the GPU of each trainer
    :ivar engines: for each replica, the GPU of each engine rank
    :ivar transport: a name that ``SyncOptions`` knows
    :ivar bar: ``None`` where none was set
    :ivar options: further options of the group by name
    :ivar fixed: the actors promise that their tensors do not move
    :ivar apart: each GPU is taken for a node of its own, so that nothing is pulled from one by another
    """

    name: str
    suite: str
    title: str
    preset: str
    src: str
    dst: str
    trainers: tuple[int, ...]
    engines: tuple[tuple[int, ...], ...]
    layers: int | None = None
    dtype: str = "bfloat16"
    transport: str = "auto"
    budget_bytes: int = GIB
    bar: Bar | None = None
    options: tuple[tuple[str, object], ...] = ()
    apart: bool = False
    fixed: bool = False

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs that actors are on, each once, in order."""
        return tuple(sorted({*self.trainers, *itertools.chain.from_iterable(self.engines)}))

    @property
    def places(self) -> tuple[int, ...]:
        """The GPU of each actor: trainers first, then replica after replica."""
        return (*self.trainers, *itertools.chain.from_iterable(self.engines))

    @property
    def on_cpu(self) -> bool:
        """Whether the tensors are in host memory, whatever GPUs there are."""
        return self.suite == "cpu"

    def device(self, actor: int) -> str:
        """Return the device that actor number ``actor`` is told to use."""
        return "cpu" if self.on_cpu else f"cuda:{self.places[actor]}"

    def reason_to_skip(self, gpus: int) -> str | None:
        """Return why the case cannot run on a machine with ``gpus`` GPUs, or ``None``."""
        needed = max(self.gpus) + 1
        if self.on_cpu or gpus >= needed:
            return None

        return f"needs {needed} GPUs, {gpus} are here"

    def with_options(self, options: Mapping[str, object]) -> Case:
        """Return the case with other options of the group, by name."""
        own = {name: options[name] for name in ("transport", "budget_bytes") if name in options}
        others = {**dict(self.options), **{name: value for name, value in options.items() if name not in own}}
        return replace(self, options=tuple(others.items()), **own)  # type: ignore[arg-type]

    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return resolve_model(preset_name=self.preset, checkpoint=None, layers=self.layers)

    def sync_options(self) -> SyncOptions:
        """
        Return the group's options.

        :raises ConfigError: for a name or a value that this version does not know, or a transport that cannot serve
            where the tensors are
        """
        known = {field.name for field in fields(SyncOptions)}
        for name, value in self.options:
            if name not in known:
                raise ConfigError(f"the group has no option {name!r}, given as {value!r}")

        options = SyncOptions(transport=self.transport, budget_bytes=self.budget_bytes, **dict(self.options))  # type: ignore[arg-type]
        if self.on_cpu and options.transport in ("nccl", "ipc"):
            raise ConfigError(f"transport {options.transport!r} moves GPU memory, case {self.name!r} is in host memory")

        return options


def trainer_memories(case: Case) -> tuple[DemoMemory, ...]:
    """Return what each trainer holds."""
    return memories(case.config(), case.src, actors=len(case.trainers), dtype=case.dtype)


def engine_memories(case: Case) -> tuple[tuple[DemoMemory, ...], ...]:
    """Return what each engine rank of each replica holds."""
    config = case.config()
    return tuple(memories(config, case.dst, actors=len(replica), dtype=case.dtype) for replica in case.engines)


def memories(config: ModelConfig, side: str, *, actors: int, dtype: str) -> tuple[DemoMemory, ...]:
    """
    Return what each of ``actors`` ranks of a side holds.

    :param side: see the top of this module
    :raises ConfigError: when the side does not have so many ranks
    """
    kind, size = _kind(side)
    if kind == "fsdp2":
        _require_actors(side, size, actors)
        return tuple(SeparateMemory(_first_dim(config, size, rank, dtype)) for rank in range(actors))

    if kind == "vllm":
        _require_actors(side, size, actors)
        return tuple(EngineMemory(config, EngineRank(tp_rank=rank, tp_size=size), dtype) for rank in range(actors))

    if kind == "flat":
        tensors = tuple((tensor.name, tensor.shape) for tensor in logical_tensors(config))
        ranges = _flat_ranges(sum(tensor.numel for tensor in logical_tensors(config)), size)
        each = [ranges[slice(*split_even(len(ranges), actors, rank))] for rank in range(actors)]
        return tuple(FlatMemory(tensors, mine, dtype) for mine in each)

    held = layouts(config, MeshSpec.parse(side), dtype=dtype)
    _require_actors(side, len(held), actors)
    return tuple(SeparateMemory(layout) for layout in held)


def _kind(side: str) -> tuple[str, int]:
    """
    Return the kind of a side and its size: ``"mesh"`` and how many actors that has, where it is none of :data:`_KINDS`.

    :raises ConfigError: naming the side and its value
    """
    kind, _, text = (part.strip() for part in side.partition("="))
    if kind not in _KINDS:
        return "mesh", MeshSpec.parse(side).world_size

    size = int(text) if text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST)) else 0
    if not 1 <= size <= _MOST:
        raise ConfigError(f"side {side!r}: {kind}={text!r} is not a whole number from 1 to {_MOST}")

    return kind, size


def _require_actors(side: str, ranks: int, actors: int) -> None:
    if ranks != actors:
        raise ConfigError(f"side {side!r} has {ranks} ranks and is placed on {actors} GPUs")


def _first_dim(config: ModelConfig, size: int, rank: int, dtype: str) -> Layout:
    """Return one rank's rows of every parameter, in chunks of the same size but for the last ones, as FSDP2 cuts."""
    pieces = []
    for tensor in logical_tensors(config):
        rows = tensor.shape[0]
        each = -(-rows // size)
        start, stop = min(rank * each, rows), min((rank + 1) * each, rows)
        if stop > start:
            box = Box((0,) * len(tensor.shape), tensor.shape).rows(start, stop)
            pieces.append(Piece(tensor.name, box, tensor.shape, tensor.dtype or dtype))

    return Layout(tuple(pieces))


def _flat_ranges(numel: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Cut into ranges of one size but for the last, as FSDP1 pads to; not at the boundaries of rows."""
    each = -(-numel // parts)
    return tuple((min(part * each, numel), min((part + 1) * each, numel)) for part in range(parts))


def ad_hoc(
    *,
    preset: str,
    layers: int | None,
    src: str,
    dst: str,
    replicas: int,
    dtype: str,
    transport: str,
    budget_bytes: int,
    gpus: int,
    options: Iterable[tuple[str, object]],
) -> Case:
    """
    Return a case from the command's own words, its actors on the GPUs in order, several on one where they must.

    :param gpus: how many there are; 0 keeps the tensors in host memory
    :raises ConfigError: for a side that cannot be, less than one replica, or more actors than a machine may have
    """
    if replicas < 1:
        raise ConfigError(f"replicas is {replicas}, it must be at least 1")

    trainers, ranks = _ranks(src), _ranks(dst)
    total = trainers + replicas * ranks
    if total > _MOST:
        raise ConfigError(f"{src} to {dst} x {replicas} takes {total} actors, it may take at most {_MOST}")

    each = -(-total // gpus) if gpus else 1
    places = [actor // each for actor in range(total)]
    return Case(
        name="ad-hoc",
        suite="ad-hoc" if gpus else "cpu",
        title=f"{preset}, {src} to {dst} x {replicas}",
        preset=preset,
        layers=layers,
        src=src,
        dst=dst,
        trainers=tuple(places[:trainers]),
        engines=tuple(
            tuple(places[trainers + number * ranks : trainers + (number + 1) * ranks]) for number in range(replicas)
        ),
        dtype=dtype,
        transport=transport,
        budget_bytes=budget_bytes,
        options=tuple(options),
    )


def _ranks(side: str) -> int:
    """Return how many actors a side has when nobody says."""
    kind, size = _kind(side)
    return 1 if kind == "flat" else size


def find_cases(*, suite: str | None, names: Iterable[str]) -> tuple[Case, ...]:
    """
    Return the cases of a suite, or those named, in the order of :data:`CASES`.

    :raises ConfigError: for an unknown name
    """
    wanted = tuple(names)
    known = {case.name for case in CASES}
    for name in wanted:
        if name not in known:
            raise ConfigError(f"unknown case {name!r}; known: {', '.join(case.name for case in CASES)}")

    return tuple(
        case
        for case in CASES
        if (suite is None or case.suite == suite) and (not wanted or case.name in wanted) and (suite or wanted)
    )


_DENSE, _MOE, _SMALL = "qwen2.5-7b", "qwen3-30b-a3b", "qwen2.5-0.5b"
_EXPERTS = "tp=2,ep=2,etp=1"

_ACROSS = Case(
    name="across-7b",
    suite="two",
    title="7B dense, 1 to 1, a GPU each",
    preset=_DENSE,
    src="tp=1",
    dst="tp=1",
    trainers=(0,),
    engines=((1,),),
    bar=Bar(share=0.92),
)
_ACROSS_MOE = replace(
    _ACROSS,
    name="across-30b-moe",
    title="30B-A3B, 18,867 separate tensors, 1 to 1",
    preset=_MOE,
    bar=Bar(share=0.90, host_seconds=0.010),
)
_COLOCATED = replace(
    _ACROSS,
    name="colocated-7b",
    title="7B dense, TP2 and TP1 x 2 on the same 2 GPUs",
    src="tp=2",
    trainers=(0, 1),
    engines=((0,), (1,)),
    bar=Bar(share=0.80),
)
_TWO = (
    _ACROSS,
    replace(
        _ACROSS,
        name="across-7b-layouts",
        title="7B dense, flat ranges to fused qkv and gate-up",
        src="flat=8",
        dst="vllm=1",
        bar=Bar(share=0.85),
    ),
    _ACROSS_MOE,
    _COLOCATED,
    replace(
        _COLOCATED,
        name="colocated-30b-moe",
        title="30B-A3B, EP2 and TP2 on the same 2 GPUs",
        preset=_MOE,
        src=_EXPERTS,
        dst="tp=2",
        engines=((0, 1),),
    ),
    replace(
        _ACROSS,
        name="across-0.5b",
        title="0.5B dense, 1 to 1: the fixed cost",
        preset=_SMALL,
        bar=Bar(overhead_seconds=0.008),
    ),
    replace(
        _ACROSS,
        name="across-7b-256mib",
        title="7B dense, 1 to 1, budget 256 MiB",
        budget_bytes=256 * MIB,
        bar=Bar(share=0.80),
    ),
    replace(_ACROSS, name="across-7b-nccl", title="7B dense, 1 to 1, NCCL", transport="nccl", bar=Bar(share=0.85)),
    replace(
        _ACROSS,
        name="across-7b-shadow",
        title="7B dense, 1 to 1, in shadow: the engine's pause",
        bar=Bar(pause_seconds=0.020),
        options=(("staging", "shadow"),),
    ),
    replace(_ACROSS, name="across-7b-ipc", title="7B dense, 1 to 1, CUDA IPC", transport="ipc"),
    replace(
        _ACROSS_MOE,
        name="across-30b-moe-nccl",
        title="30B-A3B, separate tensors, NCCL",
        transport="nccl",
        bar=Bar(share=0.85, host_seconds=0.010),
    ),
    replace(
        _ACROSS_MOE,
        name="across-30b-moe-fixed",
        title="30B-A3B, separate tensors that are promised not to move",
        fixed=True,
    ),
    replace(
        _COLOCATED,
        name="nodes-7b",
        title="7B dense, TP2 and TP1 x 2 on 2 GPUs as if of two nodes: NCCL by way of one actor a GPU",
        bar=None,
        apart=True,
    ),
)

#: Trainer and engine share a GPU: what is left of a sync without a link.
_ONE = tuple(
    replace(case, name=name, suite="one", title=f"{title}, trainer and engine on one GPU", engines=((0,),), bar=None)
    for case, name, title in (
        (_ACROSS, "within-7b", "7B dense"),
        (replace(_ACROSS, preset=_SMALL), "within-0.5b", "0.5B dense"),
        (replace(_ACROSS, options=(("release_memory", True),)), "within-7b-released", "7B dense, memory released"),
        (_ACROSS_MOE, "within-30b-moe", "30B-A3B, 18,867 separate tensors"),
        (replace(_ACROSS_MOE, fixed=True), "within-30b-moe-fixed", "30B-A3B, promised not to move"),
    )
)

_PAIRS = replace(
    _ACROSS,
    name="a-tp2-to-tp2",
    suite="four",
    title="A. 7B dense, TP2 to TP2",
    src="tp=2",
    dst="tp=2",
    trainers=(0, 1),
    engines=((2, 3),),
)
_APART = replace(_PAIRS, bar=Bar(share=0.88))
_FOUR = (
    _PAIRS,
    replace(_PAIRS, name="b-whole-to-tp2", title="B. 7B whole to TP2", src="tp=1", trainers=(0,)),
    replace(
        _APART,
        name="tp2-to-2-replicas",
        title="7B dense, TP2 to TP1 x 2 replicas",
        dst="tp=1",
        engines=((2,), (3,)),
    ),
    replace(_APART, name="pp2-to-tp2", title="7B dense, PP2 to TP2", src="pp=2"),
    replace(_APART, name="fsdp2-to-tp2", title="7B dense, FSDP2 over 2 to TP2", src="fsdp2=2"),
    replace(
        _PAIRS,
        name="c1-ep2-to-ep2",
        title="C1. 30B-A3B, EP2 to EP2",
        preset=_MOE,
        src=_EXPERTS,
        dst=_EXPERTS,
        bar=Bar(share=0.90, host_seconds=0.010),
    ),
    replace(
        _PAIRS,
        name="c2-ep2-to-tp2",
        title="C2. 30B-A3B, EP2 to TP2",
        preset=_MOE,
        src=_EXPERTS,
        bar=Bar(share=0.85, host_seconds=0.010),
    ),
    replace(
        _ACROSS,
        name="d-fan-out-3",
        suite="four",
        title="D. 7B dense, 1 to 3 replicas",
        engines=((1,), (2,), (3,)),
    ),
    replace(
        _PAIRS,
        name="tp3-to-1",
        title="7B dense, TP3 to 1",
        src="tp=3",
        dst="tp=1",
        trainers=(0, 1, 2),
        engines=((3,),),
        bar=Bar(share=0.85),
    ),
    replace(
        _PAIRS,
        name="1-to-tp3",
        title="7B dense, 1 to TP3",
        src="tp=1",
        dst="tp=3",
        trainers=(0,),
        engines=((1, 2, 3),),
        bar=Bar(share=0.85),
    ),
    replace(
        _PAIRS,
        name="colocated-tp4",
        title="7B dense, TP4 and TP2 x 2 on the same 4 GPUs",
        src="tp=4",
        trainers=(0, 1, 2, 3),
        engines=((0, 1), (2, 3)),
        bar=Bar(share=0.80),
    ),
)


def _twin(case: Case, *, preset: str, layers: int) -> Case:
    """Return the same shape with a small model in host memory, through gloo."""
    return replace(
        case,
        name=f"cpu-{case.name}",
        suite="cpu",
        title=f"{case.title} (small, gloo)",
        preset=preset,
        layers=layers,
        transport="gloo",
        budget_bytes=min(case.budget_bytes, 64 * MIB),
        bar=None,
    )


_TWINS = tuple(
    _twin(case, preset="tiny-qwen3-moe", layers=2)
    if case.preset == _MOE
    else _twin(case, preset="tiny-qwen2", layers=4)
    for case in (*_TWO, *_FOUR)
    if case.transport == "auto" and case.preset != _SMALL and not (case.apart or case.fixed)
)

#: How much the schedule matters: one case, driven in other ways.
_SCHEDULES = tuple(
    replace(
        case,
        name=f"schedule-{name}",
        suite="schedules",
        title=f"7B dense, FSDP2 over 2 to TP2, {title}",
        bar=None,
        options=options,
    )
    for case in _FOUR
    if case.name == "fsdp2-to-tp2"
    for name, title, options in (
        ("barriers", "a barrier after each wave", (("lookahead", 0),)),
        ("lookahead-1", "one wave ahead", (("lookahead", 1),)),
        ("full-duplex", "full duplex ports", (("ports", "full"),)),
        *((strategy.replace("_", "-"), f"strategy {strategy}", (("strategy", strategy),)) for strategy in STRATEGIES),
    )
)

#: All of them, those for two GPUs first.
CASES: tuple[Case, ...] = (*_TWO, *_ONE, *_FOUR, *_SCHEDULES, *_TWINS)
SUITES = ("one", "two", "four", "schedules", "cpu")


def model_nbytes(case: Case) -> int:
    """Return the bytes of one whole model."""
    return sum(tensor.numel * itemsize(tensor.dtype or case.dtype) for tensor in logical_tensors(case.config()))
