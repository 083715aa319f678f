"""
Draw the results of `bench_sync.py` as a bar chart, and print them as a table for docs/performance.md.

    python benchmarks/sync_chart.py benchmarks/results/sync.json --plot docs/images

The chart needs matplotlib (`pip install wavecast[plot]`); the table needs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sync_table import Row, as_markdown, rows_of

__all__ = ("PEERS", "bar_of", "bars_of", "main", "plot")

#: Best peer by case, as a share of the best flat transfer of the same bytes; measured on H200s of one host, library
#: calls alone: no Ray, no checksums.
PEERS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "across-7b": ("M2N, 8 communicators", 0.94),
        "across-30b-moe": ("vLLM packed, separate tensors", 0.74),
        "a-tp2-to-tp2": ("M2N, 8 communicators", 0.91),
        "b-whole-to-tp2": ("M2N, 8 communicators", 0.95),
        "c1-ep2-to-ep2": ("isend/irecv, separate tensors", 0.44),
        "c2-ep2-to-tp2": ("M2N, 8 communicators, stacked experts", 0.62),
        "d-fan-out-3": ("vLLM packed broadcast", 0.90),
    }
)

_OWN = "wavecast"
_COLOURS = {
    _OWN: "#4c72b0",
    "seed": "#c44e52",
    "packed_broadcast": "#dd8452",
    "per_tensor": "#8c8c8c",
    "object_store": "#937860",
}
_HEIGHT = 0.16


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and draw the chart where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="several go into one chart")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write sync_share.svg there")
    args = parser.parse_args(argv)
    reports = []
    for path in args.results:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"{path} holds no results: {error}")

        if not (isinstance(report, dict) and isinstance(report.get("cases"), list)):
            parser.error(f"{path} holds no results of bench_sync.py: there are no cases in it")

        reports.append(report)

    for report in reports:
        print(as_markdown(report))

    if args.plot is not None:
        try:
            plot(reports, args.plot)
        except ImportError:
            print("sync_chart: the chart needs matplotlib", file=sys.stderr)
            return 2
        except OSError as error:
            parser.error(f"--plot: cannot draw to {args.plot}: {error}")

    return 0


def bars_of(reports: Sequence[Mapping[str, object]]) -> list[tuple[Row, dict[str, float]]]:
    """Return each case that has figures, with shares of its ceiling by who reached them, the case's own first."""
    found: list[tuple[Row, dict[str, float]]] = []
    for report in reports:
        for row in rows_of(report, "cases"):
            if row.get("share_of_ceiling") is None:
                continue

            shares = {_OWN: float(str(row["share_of_ceiling"]))}
            for other in rows_of(report, "baselines"):
                if other.get("case") == row["name"] and other.get("share_of_ceiling") is not None:
                    shares[str(other["name"])] = float(str(other["share_of_ceiling"]))

            found.append((row, shares))

    return found


def bar_of(row: Row) -> float | None:
    """Return the share at which a case just meets its bar, with what it is allowed on top of the wire's time."""
    allowed, ceiling = row.get("allowed_seconds"), row.get("ceiling_gigabytes_per_second")
    if allowed is None or ceiling is None:
        return None

    return float(str(row["port_bytes"])) / float(str(allowed)) / 1e9 / float(str(ceiling))


def plot(reports: Sequence[Mapping[str, object]], directory: Path) -> Path:
    """
    Draw a group of bars a case into ``sync_share.svg`` in ``directory``, and return its path.

    :raises ImportError: without matplotlib
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "wavecast",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot

    bars = bars_of(reports)
    figure, axes = pyplot.subplots(figsize=(8, 0.75 * max(len(bars), 1) + 1.4))
    for place, (row, shares) in enumerate(bars):
        _draw_group(axes, place, row, shares)

    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [str(row["name"]) for row, _ in bars])
    axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("share of the port's ceiling: bytes that must cross, by the time of the whole sync")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        axes.legend(once.values(), once.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "sync_share.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path


def _draw_group(axes, place, row, shares):  # type: ignore[no-untyped-def]
    """Draw a case's bars around its place, its bar as a line across them and its best peer as a diamond."""
    first = place - _HEIGHT * (len(shares) - 1) / 2
    for number, (name, share) in enumerate(shares.items()):
        axes.barh(first + number * _HEIGHT, share, _HEIGHT * 0.9, color=_COLOURS.get(name, "#cccccc"), label=name)

    low, high = first - _HEIGHT, first + _HEIGHT * len(shares)
    bar = bar_of(row)
    if bar is not None:
        axes.plot([bar] * 2, [low, high], color="#55a868", linewidth=2, label="bar")

    if str(row["name"]) in PEERS:
        axes.plot([PEERS[str(row["name"])][1]], [place], "D", color="black", markersize=4, label="best peer")


if __name__ == "__main__":
    sys.exit(main())
