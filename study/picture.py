"""The picture of a study: held-out loss over the bytes that a worker's link has carried, one curve for each codec."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from study.kept import Training

__all__ = ["draw"]

# Told apart without colours, too.
_LOOKS = {
    "raw": ("#222222", "-", "o"),
    "bfloat16": ("#009E73", "-.", "^"),
    "int8": ("#0072B2", "--", "s"),
    "int4": ("#D55E00", ":", "D"),
}
_OTHER = ("#888888", "-", "x")


def draw(trainings: Sequence[Training], path: Path) -> None:
    """Writes one PNG: a panel for each task and schedule, means over the seeds of all codecs. Raises OSError."""
    panels = defaultdict[tuple[str, str, int], dict[str, list[Training]]](lambda: defaultdict(list))
    for each in trainings:
        panels[each.arm.task, each.arm.outer, each.arm.interval_steps][each.arm.codec].append(each)
    figure = Figure(figsize=(11, 4 * -(-len(panels) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for axes, ((task, outer, interval_steps), codecs) in zip(grid, panels.items(), strict=False):
        # Means of different seeds would differ by the seeds.
        common = set.intersection(*({each.arm.seed for each in each_codec} for each_codec in codecs.values()))
        for codec, found in codecs.items():
            seeds = [each for each in found if each.arm.seed in common]
            color, line, marker = _LOOKS.get(codec, _OTHER)
            points = list(zip(*(each.measured for each in seeds), strict=True))
            megabytes = [(at[0].up_bytes + at[0].down_bytes) / 1e6 for at in points]
            losses = [statistics.fmean(each.held_out_loss for each in at) for at in points]
            axes.plot(megabytes, losses, color=color, linestyle=line, marker=marker, markersize=4, label=codec)
        axes.set_title(f"{task}, a round every {interval_steps} steps: {outer.partition(':')[0]}", loc="left")
        axes.set_xscale("log")
        axes.set_xlabel("MB of one worker, up and down")
        axes.set_ylabel("held-out loss, nats")
        if task == "digits":
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)
