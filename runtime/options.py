"""What a group may be told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from wavecast.runtime.errors import ConfigError
from wavecast.scheduler import STRATEGIES, FanOut, LinkCost

__all__ = ("SyncOptions", "Transport", "Staging")

Transport = Literal["auto", "nccl", "ipc", "gloo"]
Staging = Literal["in_place", "shadow"]

_ALIGNMENT = 16
_LEAST_BUDGET = 64 << 10
_CHOICES = {
    "staging": ("in_place", "shadow"),
    "when_busy": ("raise", "queue", "coalesce"),
    "on_lost_replica": ("raise", "drop"),
    "on_lost_trainer": ("raise", "replan"),
}
#: About a year; what is much longer no transport can be told.
_MOST_SECONDS = 3e7
_LINK = LinkCost()


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """
    How a group syncs.

    :ivar transport: ``"auto"``: receivers pull from senders on their node through CUDA IPC, the rest goes over NCCL
        where every actor has a GPU of its own or shares it with one that can serve it, over gloo where not; or
        ``"nccl"``, ``"ipc"``, ``"gloo"`` alone
    :ivar budget_bytes: extra memory an actor may hold for staging; two buckets of half of it take turns.
        Communicators are counted and reported apart
    :ivar chunk_bytes: the most bytes of a task; ``None`` chooses by the busiest actor's bytes
    :ivar strategy: a name in ``wavecast.scheduler.STRATEGIES``, or ``"auto"``
    :ivar ports: ``"half"``: an actor is in one task at a time; ``"full"``: it may send in one and receive in another
    :ivar fan_out: how tasks reach several receivers: ``"broadcast"``: one collective each; ``"chain"`` and ``"tree"``:
        receivers pass on what they got, in later waves; ``"auto"``: what takes the fewest seconds by ``link``
    :ivar link: what a task costs. With its ``branching`` at 0 a broadcast costs no more than a send, and
        ``fan_out="auto"`` stays with it; set it to 1 where every receiver costs the sender a copy
    :ivar lookahead: how many waves ahead of the oldest unfinished one a task may start; ``None``: any; 0: a barrier
        after each wave
    :ivar in_flight: tasks an actor may have been given at a time; it works them off in wave order. ``None``: 2, and all
        of them where everything is pulled
    :ivar deadline_seconds: when a sync is given none of its own
    :ivar staging: ``"in_place"``: destinations' weights are written as bytes arrive, a failed sync may leave replicas
        torn; ``"shadow"``: a second copy is written, and copied over them on the device at commit: replicas are whole
        at any time, for as much memory again
    :ivar task_allowance: a task may take so many times what ``link`` says, for each of ``in_flight``, but a second at
        least; then the sync fails without waiting for its deadline. ``None``: a task may take as long as the sync
    :ivar release_communicators: give the communicators' memory back after each sync; the next one makes them anew
    :ivar release_memory: let go, before each sync's commit, of all that keeps weights' memory from being freed: others'
        mappings of it, and references to the shards. For actors that offload their weights between syncs, in an
        ``after_commit`` hook for one; the next sync maps anew what is pulled
    :ivar checksum: sum up what is sent and what was written, and compare
    :ivar when_busy: what becomes of a call while another is under way: ``"raise"``: it is refused; ``"queue"``: it
        waits; ``"coalesce"``: it waits, and all that wait are served by one sync to the newest of their versions
    :ivar retries: how often a sync is made again, within its deadline, after a checksum that differs
    :ivar on_lost_replica: an actor of a replica died during a sync: ``"raise"``, or ``"drop"``: the replica leaves the
        group and the sync goes to the others
    :ivar on_lost_trainer: a trainer died during a sync: ``"raise"``, or ``"replan"``: the sync does without it where
        others hold what it held
    :ivar frequency: :meth:`~wavecast.runtime.ParameterSyncGroup.sync_if_due` syncs every so many steps; 0: never
    :ivar allow_missing: destination tensors that may stay as they are when no source has them
    :ivar aliases: sets of logical names that are one tensor where weights are tied, such as
        ``[("model.embed_tokens.weight", "lm_head.weight")]``: what no source holds is read from the one alias they do
    :raises ConfigError: for a value that cannot be
    """

    transport: Transport = "auto"
    budget_bytes: int = 1 << 30
    chunk_bytes: int | None = None
    strategy: str = "auto"
    ports: Literal["half", "full"] = "half"
    fan_out: FanOut = "auto"
    link: LinkCost = _LINK
    lookahead: int | None = None
    in_flight: int | None = None
    deadline_seconds: float = 300.0
    staging: Staging = "in_place"
    task_allowance: float | None = None
    release_communicators: bool = False
    release_memory: bool = False
    checksum: bool = True
    when_busy: Literal["raise", "queue", "coalesce"] = "raise"
    retries: int = 0
    on_lost_replica: Literal["raise", "drop"] = "raise"
    on_lost_trainer: Literal["raise", "replan"] = "raise"
    frequency: int = 1
    allow_missing: Collection[str] = ()
    aliases: Collection[Collection[str]] = ()

    def __post_init__(self) -> None:
        _require(_is_names(self.allow_missing), "allow_missing", self.allow_missing, "a collection of names")
        object.__setattr__(self, "allow_missing", frozenset(self.allow_missing))
        object.__setattr__(self, "aliases", _alias_sets(self.aliases))
        for name in ("budget_bytes", "chunk_bytes", "lookahead", "in_flight", "retries", "frequency"):
            value = getattr(self, name)
            optional = name in ("chunk_bytes", "lookahead", "in_flight")
            sound = isinstance(value, int) and not isinstance(value, bool)
            _require(sound or (optional and value is None), name, value, "an integer")

        for name in ("checksum", "release_communicators", "release_memory"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")

        _require(self.transport in get_args(Transport), "transport", self.transport, "auto, nccl, ipc or gloo")
        _require(self.budget_bytes >= _LEAST_BUDGET, "budget_bytes", self.budget_bytes, f"at least {_LEAST_BUDGET}")
        _require(
            self.chunk_bytes is None or self.chunk_bytes >= _ALIGNMENT, "chunk_bytes", self.chunk_bytes, "16 or more"
        )
        _require(
            isinstance(self.strategy, str) and (self.strategy == "auto" or self.strategy in STRATEGIES),
            "strategy",
            self.strategy,
            f"auto or one of {', '.join(sorted(STRATEGIES))}",
        )
        _require(self.ports in ("half", "full"), "ports", self.ports, "half or full")
        _require(self.fan_out in get_args(FanOut), "fan_out", self.fan_out, "auto, broadcast, chain or tree")
        _require(isinstance(self.link, LinkCost), "link", self.link, "a LinkCost")
        _require(self.lookahead is None or self.lookahead >= 0, "lookahead", self.lookahead, "None, 0 or more")
        _require(self.in_flight is None or self.in_flight >= 1, "in_flight", self.in_flight, "None, 1 or more")
        _require(
            _is_number(self.deadline_seconds) and 0 < self.deadline_seconds <= _MOST_SECONDS,
            "deadline_seconds",
            self.deadline_seconds,
            f"positive and at most {_MOST_SECONDS:.0f}",
        )
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))

        _require(self.retries >= 0, "retries", self.retries, "0 or more")
        _require(
            self.task_allowance is None
            or (_is_number(self.task_allowance) and 1 <= self.task_allowance <= _MOST_SECONDS),
            "task_allowance",
            self.task_allowance,
            f"None, or 1 to {_MOST_SECONDS:.0f}",
        )
        _require(self.frequency >= 0, "frequency", self.frequency, "0 or more")

    @property
    def bucket_bytes(self) -> int:
        """Bytes that travel at once: half of the budget, aligned."""
        return self.budget_bytes // 2 // _ALIGNMENT * _ALIGNMENT

    @property
    def relays(self) -> bool:
        """Whether engines may pass on what they received."""
        return self.fan_out in ("chain", "tree") or (self.fan_out == "auto" and bool(self.link.branching))


def _alias_sets(aliases: Collection[Collection[str]]) -> tuple[tuple[str, ...], ...]:
    wanted = "a collection of sets of two or more names, each name in one of them"
    _require(isinstance(aliases, Collection) and not isinstance(aliases, str), "aliases", aliases, wanted)
    for names in aliases:
        _require(_is_names(names) and len(set(names)) > 1, "aliases", aliases, wanted)

    every = [name for names in aliases for name in dict.fromkeys(names)]
    _require(len(set(every)) == len(every), "aliases", aliases, wanted)
    return tuple(sorted(tuple(sorted(set(names))) for names in aliases))


def _is_names(value: object) -> bool:
    """Tell whether ``value`` is a collection of names; a string is one too, of its letters, and is never meant."""
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"option {name} is {value!r}, it must be {wanted}")
