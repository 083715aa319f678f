"""The results of the sync benchmark as lines of text, and as a table for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ("as_lines", "as_markdown", "one_line")

Row = Mapping[str, object]
_MIB = 1 << 20


def as_lines(report: Mapping[str, object]) -> list[str]:
    """Return a line each for ceilings, cases and baselines."""
    return [
        *("ceiling   " + one_line(row) for row in rows_of(report, "ceilings")),
        *("case      " + one_line(row) for row in rows_of(report, "cases")),
        *("baseline  " + one_line(row) for row in rows_of(report, "baselines")),
    ]


def one_line(row: Row) -> str:
    """Return the gist of a ceiling, a case or a baseline."""
    name = f"{row.get('case', '')} {row.get('name', row.get('pattern', ''))}".strip()
    if "error" in row:
        return f"{name}: FAILED: {str(row['error']).partition(chr(10))[0]}"

    if "reason" in row:
        return f"{name}: skipped: {row['reason']}"

    if "pattern" in row:
        return f"{name}: {float(str(row['gigabytes_per_second'])):.1f} GB/s"

    if "warm" not in row:
        return f"{name}: p50 {_milliseconds(row['seconds'])} ms{'' if row['verified'] else ', WRONG BYTES'}"

    warm = _mapping(row["warm"])
    whole = f"p50 {_milliseconds(warm['wall'])} ms, p95 {_milliseconds(warm['wall'], 'p95')} ms"
    bar = {True: ", meets its bar", False: ", BELOW ITS BAR"}.get(bool(row["meets_bar"]), "")
    wrong = "" if row["verified"] else ", WRONG BYTES"
    return f"{name}: {whole}, {_share(row)} of the ceiling{bar if row['meets_bar'] is not None else ''}{wrong}"


def as_markdown(report: Mapping[str, object]) -> str:
    """Return the cases, and what was run beside them, as one table."""
    lines = [
        "| case | p50 ms | p95 ms | GB/s a port | share of the ceiling | bar | first sync s | extra MiB | correct |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    beside = rows_of(report, "baselines")
    for row in rows_of(report, "cases"):
        lines.append(_case_cells(row))
        lines += [_baseline_cells(found) for found in beside if found.get("case") == row["name"]]

    return "\n".join(lines)


def rows_of(report: Mapping[str, object], name: str) -> list[Row]:
    """Return a report's rows of one kind."""
    rows = report.get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) else []


def _case_cells(row: Row) -> str:
    if row["status"] != "ok" and "warm" not in row:
        why = str(row.get("reason", row.get("error"))).partition("\n")[0].replace("|", "/")
        return _line([str(row["title"]), f"{row['status']}: {why}", *[""] * 7])

    warm, first = _mapping(row["warm"]), _mapping(row["first"])
    return _line(
        [
            str(row["title"]),
            _milliseconds(warm["wall"]),
            _milliseconds(warm["wall"], "p95"),
            f"{float(str(row['port_gigabytes_per_second'])):.4g}",
            _share(row),
            _bar(row),
            f"{float(str(first['wall'])):.2f}",
            f"{_mib(row['staging_bytes'])} + {_mib(row['communicator_bytes'])}",
            "yes" if row["verified"] else "NO",
        ]
    )


def _baseline_cells(row: Row) -> str:
    name = f"... {row['title']}"
    if "seconds" not in row:
        why = str(row.get("reason", row.get("error"))).partition("\n")[0].replace("|", "/")
        return _line([name, why, *[""] * 7])

    seconds = _mapping(row["seconds"])
    rate = float(str(row["port_bytes"])) / float(str(seconds["p50"])) / 1e9
    extra = row.get("extra_device_bytes")
    return _line(
        [
            name,
            _milliseconds(seconds),
            _milliseconds(seconds, "p95"),
            f"{rate:.4g}",
            _share(row),
            "",
            f"{float(str(row['first_seconds'])):.2f}",
            _mib(extra) if extra is not None else "",
            "yes" if row["verified"] else "NO",
        ]
    )


def _bar(row: Row) -> str:
    """Return a case's bar, and whether it was met."""
    if row.get("bar") is None:
        return ""

    bar = _mapping(row["bar"])
    text = f"{float(str(bar['share'])):.2f}"
    if bar["overhead_seconds"]:
        text = f"{_milliseconds({'p50': row['allowed_seconds']})} ms" if row["allowed_seconds"] else "not known"

    if bar.get("pause_seconds") is not None:
        text = f"pause {_milliseconds(row['pause_seconds'], 'p95')} of {float(str(bar['pause_seconds'])) * 1e3:.0f} ms"

    return f"{text}, {'met' if row['meets_bar'] else 'missed'}" if row["meets_bar"] is not None else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mapping(value: object) -> Row:
    return value if isinstance(value, Mapping) else {}


def _milliseconds(spread: object, key: str = "p50") -> str:
    return f"{float(str(_mapping(spread)[key])) * 1e3:.1f}"


def _share(row: Row) -> str:
    share = row.get("share_of_ceiling")
    return "?" if share is None else f"{float(str(share)):.2f}"


def _mib(nbytes: object) -> str:
    return f"{float(str(nbytes)) / _MIB:.0f}"
