"""What others published of the same comparison, for the page: facts and figures, with their sources.

Held-out losses in nats; perplexities are turned into losses (their logarithms). Tasks, models and budgets differ from
ours by orders of magnitude, so only the shape can be compared: how far the arms lie from synchronous training, and
whether the distance grows with the number of workers and with the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PUBLISHED", "PublishedTable"]


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper.

    Args:
        source: authors, number, table.
        setting: model, data, workers, interval.
        rows: an arm's name, its value as it was published, and its distance from synchronous training in percent of
            that value's loss (of accuracy: in percentage points); None: it is the reference.
    """

    source: str
    setting: str
    rows: tuple[tuple[str, str, float | None], ...]


def _perplexities(reference: float, arms: dict[str, float]) -> tuple[tuple[str, str, float | None], ...]:
    there = math.log(reference)
    rows = [(name, f"perplexity {value:g}", 100 * (math.log(value) / there - 1)) for name, value in arms.items()]
    return (("synchronous, 8 x batch", f"perplexity {reference:g}", None), *rows)


def _losses(arms: dict[str, float]) -> tuple[tuple[str, str, float | None], ...]:
    (first, there), *others = arms.items()
    return ((first, f"loss {there:g}", None), *((name, f"loss {v:g}", 100 * (v / there - 1)) for name, v in others))


PUBLISHED = (
    PublishedTable(
        "DiLoCo, arXiv:2311.08105, Table 2",
        "150 M parameters, C4, 8 workers, every 500 steps, 24,000 + 64,000 steps",
        _perplexities(15.30, {"one worker": 16.23, "DiLoCo": 15.02, "8 x steps": 14.72}),
    ),
    PublishedTable(
        "DiLoCo, arXiv:2311.08105, Table 3",
        "the same by number of workers (equal shards)",
        _perplexities(15.30, {"1 worker": 16.23, "4 workers": 15.23, "8 workers": 15.08, "16 workers": 15.02}),
    ),
    PublishedTable(
        "Scaling laws of DiLoCo, arXiv:2503.09799, Table 4",
        "35 M parameters, C4, every 30 steps",
        _losses({"synchronous": 3.485, "1 worker": 3.482, "2 workers": 3.508, "4 workers": 3.554, "8 workers": 3.621}),
    ),
    PublishedTable(
        "Scaling laws of DiLoCo, arXiv:2503.09799, Table 4",
        "335 M parameters, C4, every 30 steps",
        _losses({"synchronous": 2.784, "1 worker": 2.777, "2 workers": 2.788, "4 workers": 2.808, "8 workers": 2.841}),
    ),
    PublishedTable(
        "SlowMo, arXiv:1910.00643, Table 1",
        "ResNet-18, CIFAR-10, 32 nodes, every 12 steps",
        (
            ("synchronous", "accuracy 92.66 %", None),
            ("averages", "accuracy 91.73 %", 91.73 - 92.66),
            ("averages with SlowMo's outer momentum", "accuracy 93.20 %", 93.20 - 92.66),
        ),
    ),
)
