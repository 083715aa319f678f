"""The figures of the schedule benchmark as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ("around_tables", "tables", "write_docs")

_BEGIN, _END = "<!-- results: begin -->", "<!-- results: end -->"

Row = Mapping[str, object]


def tables(report: Mapping[str, object]) -> str:
    """Return all parts of ``report`` as Markdown."""
    parts = {
        "workloads": _workloads,
        "lookahead": _lookahead,
        "random": _random,
        "relay": _relay,
        "scale": _scale,
    }
    return "\n\n".join(make(report[name]) for name, make in parts.items() if name in report)  # type: ignore[arg-type]


def write_docs(report: Mapping[str, object], path: Path) -> None:
    """
    Put the tables between the markers of a Markdown file.

    :raises ValueError: when the file has no markers
    """
    head, tail = around_tables(path)
    path.write_text(f"{head}{_BEGIN}\n\n{_where(report)}\n\n{tables(report)}\n\n{_END}{tail}", encoding="utf-8")


def around_tables(path: Path) -> tuple[str, str]:
    """
    Return what a Markdown file has before and behind its tables.

    :raises ValueError: when the file has no markers
    """
    head, begin, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{path} lacks the markers {_BEGIN} and {_END}")

    return head, tail


def _where(report: Mapping[str, object]) -> str:
    environment = report["environment"]
    assert isinstance(environment, dict)
    hardware, versions = environment["hardware"], environment["versions"]
    return (
        f"Measured {environment['date']} on one core of {hardware['cores']} ({hardware['cpu']}), "
        f"Python {versions['python']}, wavecast {versions['wavecast'] or 'from its source'}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [" | ".join(head), " | ".join("---" if index == 0 else "---:" for index in range(len(head)))]
    lines += [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _by_workload(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    grouped: dict[str, dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault(str(row["workload"]), {})[str(row["way"])] = row

    return grouped


_WAYS = (
    "serial",
    "chatlearn",
    "chatlearn_chunks",
    "halving",
    "first_fit",
    "largest_first",
    "dsatur",
    "edge_coloring",
    "balanced",
    "auto",
    "cut",
)


def _workloads(rows: Sequence[Row]) -> str:
    grouped = _by_workload(rows)
    waves = _table(
        ("waves", "tasks", "bound", *_WAYS),
        [
            (name, ways["auto"]["tasks"], ways["auto"]["bound_waves"], *(_cell(ways, way, "waves") for way in _WAYS))
            for name, ways in grouped.items()
        ],
    )
    gaps = _table(
        ("makespan over bound", *_WAYS),
        [(name, *(_cell(ways, way, "gap", "{:.3f}") for way in _WAYS)) for name, ways in grouped.items()],
    )
    seconds = _table(
        (
            "simulated milliseconds",
            *(f"{way}, barriers" for way in ("serial", "chatlearn", "chatlearn_chunks", "halving")),
            "auto, barriers",
            "auto",
            "cut",
            "auto over its bound",
            "planning (core)",
        ),
        [
            (
                name,
                *(
                    _cell(ways, way, "barrier_seconds", "{:.2f}", 1e3)
                    for way in ("serial", "chatlearn", "chatlearn_chunks", "halving", "auto")
                ),
                _cell(ways, "auto", "lookahead_seconds", "{:.2f}", 1e3),
                _cell(ways, "cut", "lookahead_seconds", "{:.2f}", 1e3),
                _cell(ways, "auto", "gap", "{:.3f}"),
                _cell(ways, "auto", "plan_seconds", "{:.1f}", 1e3),
            )
            for name, ways in grouped.items()
        ],
    )
    return f"### Workloads\n\n{waves}\n\n{gaps}\n\n{seconds}"


def _cell(ways: Mapping[str, Row], way: str, key: str, form: str = "{}", factor: float = 1) -> str:
    if way not in ways:
        return ""

    value = ways[way][key]
    return form.format(value * factor if isinstance(value, float) else value)


def _lookahead(rows: Sequence[Row]) -> str:
    grouped: dict[str, dict[float, Row]] = {}
    for row in rows:
        grouped.setdefault(str(row["workload"]), {})[float(str(row["jitter"]))] = row

    jitters = sorted({float(str(row["jitter"])) for row in rows})

    columns = {
        "auto, 1 wave ahead": ("one_wave_ahead_seconds", "barrier_seconds"),
        "auto": ("lookahead_seconds", "barrier_seconds"),
        "first_fit": ("first_fit_lookahead_seconds", "first_fit_barrier_seconds"),
    }

    def saved(row: Row, key: str, barrier: str) -> str:
        return f"{1 - float(str(row[key])) / float(str(row[barrier])):.1%}"

    table = _table(
        ("time saved by lookahead", *(f"{name}, {jitter:.0%} noise" for jitter in jitters for name in columns)),
        [
            (name, *(saved(by_jitter[jitter], *keys) for jitter in jitters for keys in columns.values()))
            for name, by_jitter in grouped.items()
        ],
    )
    return f"### Lookahead instead of barriers\n\n{table}"


def _random(rows: Sequence[Row]) -> str:
    keys = (
        "plans",
        "most_actors",
        "worst_uncut_gap",
        "worst_gap",
        "worst_over_possible",
        "median_gap",
        "share_within_5_percent",
        "share_within_5_percent_of_possible",
        "worst_waves_over_bound",
        "pieces_per_task",
        "most_seconds",
    )
    table = _table(
        ("random plans, cut", *(key.replace("_", " ") for key in keys)),
        [(row["family"], *(row[key] for key in keys)) for row in rows],
    )
    return f"### Random plans\n\n{table}"


def _relay(report: Mapping[str, object]) -> str:
    rows, more = report["rows"], report["pairs_by_rounds_over_bound"]
    assert isinstance(rows, list)
    assert isinstance(more, dict)
    chunks = sorted({int(str(row["chunks"])) for row in rows})
    receivers = sorted({int(str(row["receivers"])) for row in rows})
    found = {(row["receivers"], row["chunks"]): row for row in rows}
    table = _table(
        ("rounds (lower bound) to receivers", *(f"{count} chunks" for count in chunks)),
        [
            (count, *(f"{found[count, k]['rounds']} ({found[count, k]['bound']})" for k in chunks))
            for count in receivers
        ],
    )
    counts = (
        f"Of all {report['pairs']:,} pairs of up to 128 receivers and up to 64 chunks, "
        + ", ".join(f"{count:,} take {over} more rounds than the lower bound" for over, count in more.items())
        + "."
    )
    return f"### Relays\n\n{table}\n\n{counts}"


def _scale(rows: Sequence[Row]) -> str:
    counts = sorted({int(str(row["tasks"])) for row in rows})
    kinds = list(dict.fromkeys((str(row["kind"]), str(row["strategy"])) for row in rows))
    found = {(row["kind"], row["strategy"], row["tasks"]): row for row in rows}
    table = _table(
        ("core seconds to plan on 1024 actors", *(f"{count:,} tasks" for count in counts)),
        [
            (f"{kind}: {strategy}", *(found.get((kind, strategy, count), {}).get("seconds", "") for count in counts))
            for kind, strategy in kinds
        ],
    )
    memory = _table(
        ("peak bytes a task, beyond the tasks themselves", *(f"{count:,} tasks" for count in counts)),
        [
            (f"{kind}: {strategy}", *(found[kind, strategy, count]["peak_nbytes_a_task"] for count in counts))
            for kind, strategy in kinds
            if found[kind, strategy, counts[0]]["peak_nbytes_a_task"] is not None
        ],
    )
    return f"### Scale\n\n{table}\n\n{memory}"
