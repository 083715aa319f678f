"""The figures of the schedule benchmark as pictures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ("plot",)

Row = Mapping[str, object]
_SHOWN = {"chatlearn": "#c44e52", "halving": "#dd8452", "first_fit": "#8c8c8c", "cut": "#55a868", "auto": "#4c72b0"}


def plot(report: Mapping[str, object], directory: Path) -> bool:
    """Draw what ``report`` has into ``directory``, as SVG; return whether it has anything to draw."""
    if not {"workloads", "scale", "lookahead"} & report.keys():
        return False

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "wavecast",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if "workloads" in report:
        _gaps(report["workloads"], directory / "schedule_gap.svg")  # type: ignore[arg-type]

    if "scale" in report:
        _scale(report["scale"], directory / "schedule_scale.svg")  # type: ignore[arg-type]

    if "lookahead" in report:
        _lookahead(report["lookahead"], directory / "schedule_lookahead.svg")  # type: ignore[arg-type]

    return True


def _gaps(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(row["workload"]) for row in rows))
    found = {(row["workload"], row["way"]): float(str(row["gap"])) for row in rows}
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1.2))
    for way, colour in _SHOWN.items():
        places = [index for index, name in enumerate(names) if (name, way) in found]
        axes.plot(
            [found[names[place], way] for place in places],
            places,
            "o",
            color=colour,
            label=way,
            markersize=6,
            alpha=0.85,
        )

    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel("makespan over the busiest port's bytes (1 is optimal)")
    axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def _scale(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for kind in dict.fromkeys(str(row["kind"]) for row in rows):
        for strategy, style in (("first_fit", ":"), ("auto", "-")):
            points = [row for row in rows if row["kind"] == kind and row["strategy"] == strategy]
            axes.plot(
                [int(str(row["tasks"])) for row in points],
                [float(str(row["seconds"])) for row in points],
                style,
                marker="o",
                markersize=3,
                label=f"{kind}, {strategy}",
            )

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tasks on 1024 actors")
    axes.set_ylabel("core seconds to plan")
    axes.grid(linewidth=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _lookahead(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(str(row["workload"]) for row in rows))
    jitters = sorted({float(str(row["jitter"])) for row in rows})
    figure, axes = pyplot.subplots(figsize=(8, 0.3 * len(names) + 1.2))
    for jitter, colour in zip(jitters, ("#a6bddb", "#4c72b0", "#08306b"), strict=False):
        saved = {
            str(row["workload"]): 100 * (1 - float(str(row["lookahead_seconds"])) / float(str(row["barrier_seconds"])))
            for row in rows
            if float(str(row["jitter"])) == jitter
        }
        axes.plot([saved[name] for name in names], range(len(names)), "o", color=colour, label=f"{jitter:.0%} noise")

    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel("simulated time saved by lookahead, per cent of that with barriers")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})  # type: ignore[attr-defined]
