"""docs/study.md, its pictures and its numbers, written from the results of a study and the times of its steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from modelaverage.codecs import CODECS, RAW
from study.arm import Arm, Variation
from study.compare import spread_of
from study.links import LinkTimes, TimeToLoss, times_to_loss
from study.numbers import StudyNumbers
from study.pictures import draw_bytes, draw_intervals, draw_kills, draw_steps, draw_times
from study.plan import AVERAGE
from study.published import PUBLISHED
from study.results import ArmResult, cheapest_within

__all__ = ["write_page"]

_FASTER = 10
_SHOWN = (
    "alone",
    "average every 50",
    "outer step every 50, int4",
    "outer step every 25, int4",
    "average every 12, int4",
    "average every 6, int4",
    "outer step every 35, int4, 3,000 steps",
    "synchronous",
)
"""Arms of the first two pictures, as far as the study has them."""
_BEGINNING = """# Loss and bytes beside synchronous training

`python -m study --page` has written this page from the trainings that `python -m study` made: do not edit it. The
numbers are in [study.json](study/study.json).

One process plays all workers and the server, with the averages, outer steps and codecs of this project. Each worker
trains a byte-level transformer (120,576 parameters; Muon for matrices, AdamW for the rest, clipping, warm-up and
cosine) with batches of 8 sequences of 64 bytes; a tenth of the files is held out. Where a row says nothing else, there
are {workers} workers with equal shares, and each makes {steps} steps: all arms see equally many bytes, except *alone*
(a part of them) and those with more steps.

Data: {source} (Python Software Foundation License Version 2).

- *Synchronous*: every step takes the mean gradient of all workers' batches. *Alone*: one worker with its share of the
  data.
- *Average*: plain averages. *Outer step*: Nesterov's momentum on the server, with learning rate 0.8 and momentum 0.6
  for intervals up to 10, and with 1.0 and 0.6 for longer ones.
- *Killed once*: at random, on average once in the run, and then away for two rounds on average. *A third away*: the
  same, but so often that in the long run workers miss a third of all rounds. A killed worker loses its steps since the
  last round and comes back after a round, with its center and a new inner optimizer; rounds go on with those that are
  there, as with a quorum of one.
- *Images*: a convolutional network (20,490 parameters; SGD with momentum, cosine, batches of 32, 400 steps) on 5,000
  images of MNIST, a fifth held out. *Unequal*: each worker has other digits.
- *Steps late*: workers train on for this many steps while a round is made (`overlap_steps`).
- *Only played*: a job has one interval and one outer optimizer, and leaves the inner optimizer alone. Arms that change
  these exist only here.

Losses are those of the center, in nats: mean and standard deviation over the seeds {seeds}. The difference is from
synchronous training with the same seed and number of workers. Bytes are the encoded values of one worker, up and down;
for synchronous training, a gradient and its mean in every step. Train loss is the mean of the last fifth of the run."""
_BOUNDS_PERCENT = (1, 2, 3, 5)


def write_page(numbers: StudyNumbers, directory: Path, earlier: Sequence[str] = ()) -> list[Path]:
    """Writes ``study.md`` into a directory, and its pictures and JSON into ``study/`` there.

    Args:
        numbers: of a study, references first.
        directory: made if it is missing.
        earlier: names of arms whose numbers the page had before.

    Returns:
        The files.

    Raises:
        OSError: one cannot be written.
    """
    beside = directory / "study"
    beside.mkdir(parents=True, exist_ok=True)
    page, told, results = directory / "study.md", beside / "study.json", numbers.arms
    shown = [each for name in _SHOWN for each in results if each.name == name]
    pictures = [beside / f"{name}.svg" for name, _ in _PICTURES]
    draw_steps(shown, pictures[0])
    draw_bytes(shown, pictures[1])
    draw_intervals(_series(results), pictures[2])
    draw_kills(_killed(results), pictures[3])
    if numbers.to_loss:
        pictures.append(beside / "links.svg")
        draw_times(numbers.to_loss, results[0].name, pictures[-1])
    numbers.save(told)
    page.write_text("\n".join(_lines(numbers, earlier)) + "\n", encoding="utf-8")
    return [page, told, *pictures]


def _lines(numbers: StudyNumbers, earlier: Sequence[str]) -> Iterator[str]:
    results = numbers.arms
    first = results[0]
    yield from _BEGINNING.format(
        steps=f"{first.planned.template.steps:,}",
        source=numbers.sources[first.planned.template.task],
        workers=first.planned.template.num_workers,
        seeds=", ".join(map(str, first.seeds)),
    ).splitlines()
    for what, names in (
        ("Trained in an earlier run of the command", earlier),
        ("Not finished when this page was written", numbers.unfinished),
    ):
        if names:
            yield ""
            yield f"{what}: {'; '.join(names)}."
    yield ""
    yield "| at most this much over synchronous | fewest of its bytes | with more steps | with those only played |"
    yield "|---|---|---|---|"
    for percent in _BOUNDS_PERCENT:
        found = [cheapest_within(results, percent, *wider) for wider in ((False, False), (True, False), (True, True))]
        written = [_cheapest(found[0])]
        written += ["the same" if one is before else _cheapest(one) for before, one in pairwise(found)]
        yield f"| {percent} % | {' | '.join(written)} |"
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
    if numbers.links is not None:
        yield from _links(numbers.links, numbers.to_loss, results)
    yield from _published()
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
    ("kills", "Held-out loss over the steps with workers that are killed, and without"),
)


def _links(times: LinkTimes, to_loss: Sequence[TimeToLoss], results: Sequence[ArmResult]) -> Iterator[str]:
    """The chapter about time."""
    first = results[0]
    batch_ms, workers = times.batch_s * 1e3, first.planned.template.num_workers
    why = "which a batch took on one free processor" if times.batch_was_measured else "a time that was given"
    yield from f"""
## Time over links

How long until the center is as good as that of synchronous training at its end ({first.held_out_loss:.4f} nats)? The
steps that this takes are those of the trainings above. What a step takes was measured by `python -m bench.study_links`:
{workers} workers in network namespaces, each with a server beside it and behind a link of its own, with real messages
(gloo's all-reduce of the gradient for synchronous training, pushes and averages for the other arms). **Computation is
not real there: each worker sleeps {batch_ms:.1f} ms a step**, {why}. Links have no delay but their queues.

![Time to the loss of synchronous training, by the rate of the links](study/links.svg)
""".splitlines()
    yield ""
    yield from _link_table(times.rates_mbit, to_loss)
    yield ""
    faster = times.computing_faster(_FASTER)
    yield f"With {faster.batch_s * 1e3:.1f} ms of computation a step, as on a processor {_FASTER} times as fast"
    yield "(computed from the times above; communication takes as long as measured):"
    yield ""
    yield from _link_table(times.rates_mbit, times_to_loss(results, faster))


def _link_table(rates_mbit: Sequence[float], to_loss: Sequence[TimeToLoss]) -> Iterator[str]:
    yield f"| arm | steps | {' | '.join(f'{rate:g} Mbit/s: ms a step, time' for rate in rates_mbit)} |"
    yield f"|---|---|{'---|' * len(rates_mbit)}"
    for arm in dict.fromkeys(each.arm for each in to_loss):
        found = {each.rate_mbit: each for each in to_loss if each.arm == arm}
        steps = next(iter(found.values())).steps
        cells = [_time(found[rate]) if rate in found else "" for rate in rates_mbit]
        yield f"| {arm} | {'not reached' if steps is None else f'{steps:,.0f}'} | {' | '.join(cells)} |"


def _time(each: TimeToLoss) -> str:
    text = f"{each.step_s * 1e3:.1f}"
    if each.seconds is None or each.of_synchronous is None:
        return text
    if each.of_synchronous == 1:
        part = ""
    elif each.of_synchronous < 1:
        part = f", **1/{1 / each.of_synchronous:.1f}**"
    else:
        part = f", {each.of_synchronous:.1f} x"
    return f"{text}, {each.seconds:.0f} s{part}"


def _published() -> Iterator[str]:
    """The chapter about others' tables."""
    yield from """
## What others published

Held-out losses of larger models beside synchronous training with the same global batch, for the shape: the distance
grows with the number of workers and with the interval, and shrinks with the size of the model. Percentages are of the
loss, those of perplexities of their logarithm; those of accuracies are points (more is better).

| source | setting | arm | published | from synchronous |
|---|---|---|---|---|""".splitlines()
    for table in PUBLISHED:
        for arm, published, percent in table.rows:
            away = "" if percent is None else f"{percent:+.1f} {'points' if 'accuracy' in published else '%'}"
            yield f"| {table.source} | {table.setting} | {arm} | {published} | {away} |"


def _killed(results: Sequence[ArmResult]) -> list[ArmResult]:
    """Arms whose workers are killed, after the usual ones beside which they stand."""
    killed = [each for each in results if each.planned.template.variation.absence is not None]
    usual = {each.planned.beside for each in killed}
    return [*(each for each in results if each.name in usual), *killed]


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
