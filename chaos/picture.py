"""The picture of a run: global_step over time, and below it the faults of each process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from chaos.faults import Kind
from chaos.report import Report

__all__ = ["draw"]

# Distinguishable with any kind of colour vision.
_CURVE, _KILL = "#0072B2", "#222222"
_LASTING: dict[Kind, tuple[str, str]] = {
    "stop": ("stopped", "#E69F00"),
    "descriptors": ("out of descriptors", "#CC79A7"),
    "threads": ("out of threads", "#009E73"),
}


def draw(report: Report, path: Path) -> None:
    """Writes one PNG. Raises OSError."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    rows = len(report.processes)
    curve, marks = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 0.36 * rows))
    times_s = [0.0, *(each.at_s for each in report.course)]
    curve.step(times_s, [0, *(each.global_step for each in report.course)], where="post", color=_CURVE, linewidth=1.8)
    curve.set_ylabel("global_step")
    curve.set_ylim(0, report.rounds * 1.03)
    counts = Counter(fault.kind for fault in report.faults)
    squeezes = counts["descriptors"] + counts["threads"]
    curve.set_title(
        f"{report.workers} workers, seed {report.seed}: {report.global_step} rounds in {report.took_s:.0f} s, "
        f"{counts['kill']} kills, {counts['stop']} stops" + (f", {squeezes} squeezes" if squeezes else ""),
        loc="left",
    )
    for row, name in enumerate(report.processes):
        mine = [fault for fault in report.faults if fault.process == name]
        killed_s = [fault.at_s for fault in mine if fault.kind == "kill"]
        for kind, (_, color) in _LASTING.items():
            lasting = list[tuple[float, float]]()
            for fault in mine:
                if fault.kind == kind:  # until it is over, or another process takes its place
                    ends_s = [s for s in (fault.at_s + fault.lasts_s, report.took_s, *killed_s) if s > fault.at_s]
                    lasting.append((fault.at_s, min(ends_s) - fault.at_s))
            marks.broken_barh(lasting, (row - 0.28, 0.56), facecolors=color, linewidth=0)
        marks.plot(killed_s, [row] * len(killed_s), "x", color=_KILL, markersize=8, markeredgewidth=2)
    marks.set_yticks(range(rows), report.processes)
    marks.set_ylim(rows - 0.4, -0.6)
    marks.set_xlim(0, report.took_s * 1.01)
    marks.set_xlabel("seconds")
    marks.tick_params(axis="y", length=0)
    for axes in (curve, marks):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    curve.grid(axis="y", alpha=0.25)
    legend = [
        Line2D([], [], linestyle="none", marker="x", color=_KILL, markersize=8, markeredgewidth=2, label="killed"),
        *(Patch(color=color, label=label) for kind, (label, color) in _LASTING.items() if counts[kind]),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(path, dpi=120)
