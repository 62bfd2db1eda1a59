"""The codecs beside `raw`: mean and spread over seeds, and whether the difference is more than seeds make."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from modelaverage.codecs import RAW
from study.kept import Training

__all__ = ["CodecRow", "rows_of", "shown", "spread_of", "table_of"]


@dataclass(frozen=True)
class CodecRow:
    """One codec in one task and schedule, over the seeds.

    Args:
        task, outer, interval_steps, codec: as in `Arm`.
        seeds: those that were run.
        held_out_loss, train_loss: mean over the seeds.
        held_out_spread, train_spread: standard deviation over the seeds (of a sample); None: one seed.
        difference: from raw with the same seeds, of held-out loss: mean. 0 for raw.
        difference_spread: the standard deviation of this difference from seed to seed; None: one seed, or raw.
        raw_spread: `held_out_spread` of raw; None: one seed.
        up_bytes, down_bytes: of one worker in the whole training.
        raw_up_bytes, raw_down_bytes: the same with raw.
    """

    task: str
    outer: str
    interval_steps: int
    codec: str
    seeds: tuple[int, ...]
    held_out_loss: float
    held_out_spread: float | None
    train_loss: float
    train_spread: float | None
    difference: float
    difference_spread: float | None
    raw_spread: float | None
    up_bytes: int
    down_bytes: int
    raw_up_bytes: int
    raw_down_bytes: int

    @property
    def verdict(self) -> str:
        """Seed noise is the standard deviation of raw over the seeds: whether the mean differs by more than that."""
        if self.codec == RAW.name:
            return ""
        if not self.raw_spread:
            return "one seed: no noise known"
        parts = self.difference / self.raw_spread
        how = "within noise" if abs(parts) <= 1 else "worse" if parts > 0 else "better"
        return f"{how} ({parts:+.2f} of it)"


def rows_of(trainings: Sequence[Training]) -> list[CodecRow]:
    """One row for each task, schedule and codec, in the order in which they come. A codec counts only with seeds that
    raw was run with, too; without any, it has no row."""
    groups = dict[tuple[str, str, int], dict[str, dict[int, Training]]]()
    for each in trainings:
        arm = each.arm
        codecs = groups.setdefault((arm.task, arm.outer, arm.interval_steps), {})
        codecs.setdefault(arm.codec, {})[arm.seed] = each
    rows = list[CodecRow]()
    for (task, outer, interval_steps), codecs in groups.items():
        for codec, by_seed in codecs.items():
            seeds = tuple(sorted(by_seed.keys() & codecs.get(RAW.name, {}).keys()))
            if not seeds:
                continue
            ours, raws = [by_seed[seed] for seed in seeds], [codecs[RAW.name][seed] for seed in seeds]
            losses, raw_losses = _held_out(ours), _held_out(raws)
            differences = [loss - raw_loss for loss, raw_loss in zip(losses, raw_losses, strict=True)]
            rows.append(
                CodecRow(
                    task,
                    outer,
                    interval_steps,
                    codec,
                    seeds,
                    statistics.fmean(losses),
                    spread_of(losses),
                    statistics.fmean(each.train_loss for each in ours),
                    spread_of([each.train_loss for each in ours]),
                    statistics.fmean(differences),
                    None if codec == RAW.name else spread_of(differences),
                    spread_of(raw_losses),
                    ours[0].last.up_bytes,
                    ours[0].last.down_bytes,
                    raws[0].last.up_bytes,
                    raws[0].last.down_bytes,
                )
            )
    return rows


def table_of(rows: Sequence[CodecRow]) -> Table:
    """For a terminal; losses in nats, +- the standard deviation over the seeds."""
    table = Table(caption="noise: the standard deviation of raw's held-out loss over the seeds", caption_justify="left")
    for title in ("task, rounds", "codec", "seeds", "held-out loss", "train loss", "less raw", "against noise"):
        table.add_column(title, no_wrap=True, justify="right" if title == "seeds" else "left")
    table.add_column("MB up, down", justify="right", no_wrap=True)
    table.add_column("of raw", justify="right", no_wrap=True)
    before = None
    for row in rows:
        group = f"{row.task}, {row.outer.partition(':')[0]} / {row.interval_steps}"
        if before not in (None, group):
            table.add_section()
        part = (row.up_bytes + row.down_bytes) / (row.raw_up_bytes + row.raw_down_bytes)
        table.add_row(
            group if group != before else "",
            row.codec,
            str(len(row.seeds)),
            shown(row.held_out_loss, row.held_out_spread),
            shown(row.train_loss, row.train_spread),
            "" if row.codec == RAW.name else shown(row.difference, row.difference_spread, "+"),
            row.verdict,
            f"{row.up_bytes / 1e6:.2f}, {row.down_bytes / 1e6:.2f}",
            f"{part:.3f}",
        )
        before = group
    return table


def _held_out(trainings: Sequence[Training]) -> list[float]:
    return [each.last.held_out_loss for each in trainings]


def spread_of(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None: it is one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def shown(mean: float, spread: float | None, sign: str = "", digits: int = 4) -> str:
    """A loss for a terminal; ``sign`` "+": with its sign; ``digits`` behind the point."""
    text = f"{mean:{sign}.{digits}f}"
    return text if spread is None else f"{text} +- {spread:.{digits}f}"
