"""docs/study.md, its pictures and its numbers, written from the results of a finished study."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from modelaverage.codecs import CODECS, RAW
from study.arm import Arm, Variation
from study.compare import spread_of
from study.pictures import draw_bytes, draw_intervals, draw_steps
from study.plan import AVERAGE
from study.results import ArmResult, cheapest_within

__all__ = ["page_of", "write_page"]

_SHOWN = (
    "alone",
    "average every 50",
    "outer step every 100, int4",
    "outer step every 25, int4",
    "outer step every 10, int4",
    "every 5, from a tenth on every 50, int4",
    "synchronous",
)
"""Arms of the first two pictures, as far as the study has them."""
_BEGINNING = """# Loss and bytes beside synchronous training

`python -m study --page` has written this page from the trainings that `python -m study` made: do not edit it. The
numbers are in [study.json](study/study.json).

One process plays all workers and the server, with the averages, outer steps and codecs of this project. Each worker
trains a byte-level transformer (120,576 parameters; AdamW, warm-up and cosine) with batches of 8 sequences of 64 bytes;
a tenth of the files is held out. Where a row says nothing else, there are {workers} workers with equal shares, and each
makes {steps} steps.

Data: {source} (Python Software Foundation License Version 2).

- *Synchronous*: every step takes the mean gradient of all workers' batches. *Alone*: one worker with its share of the
  data.
- *Outer step*: Nesterov's momentum on the server, with learning rate 0.8 and momentum 0.6 for intervals up to 10, and
  with 1.0 and 0.6 for longer ones.
- *Killed*: in the long run, workers miss a third of all rounds, two at a time in the mean. A killed worker loses its
  steps since the last round and comes back after a round, with its center and a new inner optimizer; rounds go on with
  those that are there, as with a quorum of one.
- *Unequal*: each worker has a stretch of the text in the order of the files' names, so that packages stay together.
- *Only played*: a job has one interval and one outer optimizer, and leaves the inner optimizer alone. Arms that change
  these exist only here.

Losses are those of the center, in nats: mean and standard deviation over the seeds {seeds}. The difference is from
synchronous training with the same seed and number of workers. Bytes are the encoded values of one worker, up and down;
for synchronous training, a gradient and its mean in every step. Train loss is the mean of the last fifth of the run."""
_BOUNDS_PERCENT = (1, 2, 3, 5)


def write_page(results: Sequence[ArmResult], source: str, directory: Path) -> list[Path]:
    """Writes ``study.md`` into a directory, and its pictures and JSON into ``study/`` there.

    Args:
        results: of a finished study, references first.
        source: of the data.
        directory: made if it is missing.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    beside = directory / "study"
    beside.mkdir(parents=True, exist_ok=True)
    page, numbers = directory / "study.md", beside / "study.json"
    pictures = beside / "steps.svg", beside / "bytes.svg", beside / "interval.svg"
    shown = [each for name in _SHOWN for each in results if each.name == name]
    draw_steps(shown, pictures[0])
    draw_bytes(shown, pictures[1])
    draw_intervals(_series(results), pictures[2])
    rows = [{**asdict(each), "held_out_loss": each.held_out_loss} for each in results]
    numbers.write_text(json.dumps({"source": source, "arms": rows}, indent=1) + "\n", encoding="utf-8")
    page.write_text(page_of(results, source), encoding="utf-8")
    return [page, numbers, *pictures]


def page_of(results: Sequence[ArmResult], source: str) -> str:
    """The page in Markdown."""
    return "\n".join(_lines(results, source)) + "\n"


def _lines(results: Sequence[ArmResult], source: str) -> Iterator[str]:
    first = results[0]
    seeds = ", ".join(map(str, first.seeds))
    yield from _BEGINNING.format(
        steps=f"{first.planned.template.steps:,}",
        source=source,
        workers=first.planned.template.num_workers,
        seeds=seeds,
    ).splitlines()
    yield ""
    yield "| at most this much worse than synchronous | fewest of its bytes | with those that are only played |"
    yield "|---|---|---|"
    for percent in _BOUNDS_PERCENT:
        job, played = (cheapest_within(results, percent, with_played_only) for with_played_only in (False, True))
        yield f"| {percent} % | {_cheapest(job)} | {'the same' if played is job else _cheapest(played)} |"
    for name, alt in _PICTURES:
        yield ""
        yield f"![{alt}](study/{name}.svg)"
    groups = list(dict.fromkeys(each.planned.group for each in results))
    ordered = sorted(results, key=lambda each: (groups.index(each.planned.group), _place(each.planned.template)))
    for group in groups:
        yield ""
        yield f"## {group}"
        yield ""
        yield "| arm | held-out loss | from synchronous | MB up, down | of its bytes | train loss | learning rate |"
        yield "|---|---|---|---|---|---|---|"
        for each in ordered:
            if each.planned.group == group:
                yield _row(each)
        notes = [f"- {note}" for each in ordered if each.planned.group == group for note in _notes(each)]
        if notes:
            yield ""
            yield from notes
    yield ""
    yield "## Learning rates"
    yield ""
    yield "Held-out loss of one seed that is not among the above, by inner learning rate. Tuning goes on until the best"
    yield "(bold) has a worse one on either side."
    yield ""
    rates = sorted({rate for each in results for rate, _ in each.tuning})
    yield f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |"
    yield f"|---|{'---|' * len(rates)}"
    for each in ordered:
        tuning = dict(each.tuning)
        cells = (_tuned(tuning.get(rate), rate == each.learning_rate) for rate in rates)
        yield f"| {each.name} | {' | '.join(cells)} |"


_PICTURES = (
    ("steps", "Held-out loss over the steps of each worker"),
    ("bytes", "Held-out loss over the bytes of one worker, on a logarithmic axis"),
    ("interval", "Held-out loss over synchronous training, in percent, by interval"),
)


def _row(each: ArmResult) -> str:
    difference = "" if each.name == each.reference else _percent(each.difference_percent, each.difference_spread)
    cells = (
        each.name,
        _nats(each.held_out_loss, each.held_out_spread),
        difference,
        f"{each.up_bytes / 1e6:.2f}, {each.down_bytes / 1e6:.2f}",
        _part(each),
        f"{sum(each.train_losses) / len(each.train_losses):.3f}",
        f"{each.learning_rate:g}",
    )
    return f"| {' | '.join(cells)} |"


def _cheapest(found: ArmResult | None) -> str:
    if found is None:
        return "none that was tried"
    return f"{_part(found)}: {found.name}, {found.difference_percent:+.1f} %"


def _notes(each: ArmResult) -> Iterator[str]:
    """What stands below the table of its group."""
    if each.beside_percent:
        over = _percent(statistics.fmean(each.beside_percent), spread_of(each.beside_percent))
        yield f"*{each.name}*: {over} from *{each.planned.beside}*"
    if each.planned.template.is_played_only:
        yield f"*{each.name}*: only played"
    if each.missed_part:
        yield f"*{each.name}*: {100 * each.missed_part:.0f} % of all pushes were missed"


def _place(arm: Arm) -> tuple[bool, int, int]:
    """Where its row is among those of its group."""
    return arm.outer != AVERAGE, list(CODECS).index(arm.codec), arm.interval_steps


def _part(each: ArmResult) -> str:
    return f"1/{1 / each.bytes_part:.0f}" if each.bytes_part else "0"


def _nats(mean: float, spread: float | None) -> str:
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _percent(mean: float, spread: float | None) -> str:
    return f"{mean:+.2f} %" if spread is None else f"{mean:+.2f} ± {spread:.2f} %"


def _tuned(loss: float | None, is_best: bool) -> str:
    text = "" if loss is None else f"{loss:.4f}"
    return f"**{text}**" if is_best else text


def _series(results: Sequence[ArmResult]) -> list[tuple[str, list[ArmResult]]]:
    """The usual arms at several intervals, by outer optimizer and codec."""
    series = dict[str, list[ArmResult]]()
    first = results[0].planned.template
    for each in results:
        arm = each.planned.template
        others = {
            "outer": arm.outer,
            "interval_steps": arm.interval_steps,
            "codec": arm.codec,
            "variation": Variation(),
        }
        if arm.variation == Variation() and replace(first, **others) == arm:  # type: ignore[arg-type]
            kind = "average" if arm.outer == AVERAGE else "outer step"
            codec = "" if arm.codec == RAW.name else f", {arm.codec}"
            series.setdefault(kind + codec, []).append(each)
    return [(name, found) for name, found in series.items() if len(found) > 1]
