"""Every option that cannot be is refused when it is given, by name and value."""

from __future__ import annotations

import dataclasses
import math

import pytest

from wavecast.runtime.errors import ConfigError
from wavecast.runtime.options import SyncOptions
from wavecast.scheduler import STRATEGIES

IMPOSSIBLE: list[tuple[str, object, str]] = [
    ("transport", "ipc-or-so", "auto, nccl, ipc or gloo"),
    ("budget_bytes", 65_535, "at least 65536"),
    ("budget_bytes", 1e9, "an integer"),
    ("budget_bytes", None, "an integer"),
    ("chunk_bytes", 15, "16 or more"),
    ("chunk_bytes", -1, "16 or more"),
    ("chunk_bytes", 20.5, "an integer"),
    ("strategy", "fastest", "auto or one of"),
    ("ports", "both", "half or full"),
    ("fan_out", "flood", "auto, broadcast, chain or tree"),
    ("link", 1e9, "a LinkCost"),
    ("lookahead", -1, "None, 0 or more"),
    ("lookahead", 0.5, "an integer"),
    ("in_flight", 0, "None, 1 or more"),
    ("in_flight", "2", "an integer"),
    ("deadline_seconds", 0, "positive"),
    ("deadline_seconds", -1.0, "positive"),
    ("deadline_seconds", math.nan, "positive"),
    ("deadline_seconds", math.inf, "at most 30000000"),
    ("task_allowance", 0.5, "None, or 1 to"),
    ("task_allowance", math.nan, "None, or 1 to"),
    ("frequency", -1, "0 or more"),
    ("frequency", None, "an integer"),
    ("allow_missing", "lm_head.weight", "a collection of names"),
    ("allow_missing", 3, "a collection of names"),
    ("allow_missing", [3], "a collection of names"),
    ("allow_missing", len, "a collection of names"),
    ("aliases", 3, "a collection of sets of two or more names"),
    ("aliases", [3], "a collection of sets of two or more names"),
    ("aliases", [(["a"], "b")], "two or more names"),
    ("deadline_seconds", "3", "positive"),
    ("deadline_seconds", None, "positive"),
    ("deadline_seconds", True, "positive"),
    ("task_allowance", "x", "None, or 1 to"),
    ("strategy", [], "auto or one of"),
    ("transport", [], "auto, nccl, ipc or gloo"),
    ("checksum", "no", "True or False"),
    ("release_communicators", 1, "True or False"),
    ("in_flight", True, "an integer"),
    ("retries", True, "an integer"),
    ("aliases", "lm_head.weight", "a collection of sets of two or more names"),
    ("aliases", ["ab"], "a collection of sets of two or more names"),
    ("aliases", [("a",)], "two or more names"),
    ("aliases", [("a", "a")], "two or more names"),
    ("aliases", [("a", 1)], "two or more names"),
    ("aliases", [("a", "b"), ("b", "c")], "each name in one of them"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), IMPOSSIBLE)
def test_an_impossible_value_is_named(name: str, value: object, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SyncOptions(**{name: value})  # type: ignore[arg-type]

    message = str(caught.value)
    assert message.startswith(f"option {name} is {value!r}, it must be ")
    assert wanted in message
    assert "\n" not in message


def test_the_least_of_everything_is_possible() -> None:
    options = SyncOptions(
        budget_bytes=65_536,
        chunk_bytes=16,
        lookahead=0,
        in_flight=1,
        deadline_seconds=0.001,
        frequency=0,
        allow_missing=["b", "a", "b"],
        aliases=[{"d", "c"}, ["b", "a"]],
    )
    assert options.aliases == (("a", "b"), ("c", "d"))
    assert options.allow_missing == {"a", "b"}
    assert options.bucket_bytes == 32_768


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_every_strategy_of_the_scheduler_may_be_asked_for(strategy: str) -> None:
    assert SyncOptions(strategy=strategy).strategy == strategy


@pytest.mark.parametrize(
    ("budget", "bucket"), [(65_536, 32_768), (100_000, 50_000), (100_031, 50_000), (1 << 30, 1 << 29), (65_599, 32_784)]
)
def test_two_buckets_stay_within_the_budget_and_are_aligned(budget: int, bucket: int) -> None:
    assert SyncOptions(budget_bytes=budget).bucket_bytes == bucket
    assert bucket % 16 == 0
    assert 2 * bucket <= budget < 2 * (bucket + 16)


def test_options_are_values() -> None:
    assert SyncOptions(allow_missing=("a", "b")) == SyncOptions(allow_missing={"b", "a"})
    assert hash(SyncOptions(allow_missing=("a",))) == hash(SyncOptions(allow_missing=frozenset({"a"})))
    changed = dataclasses.replace(SyncOptions(), in_flight=7)
    assert changed != SyncOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.in_flight = 8  # type: ignore[misc]


def test_a_changed_copy_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="option frequency is -3"):
        dataclasses.replace(SyncOptions(), frequency=-3)
