"""The arms of `python -m study`: which trainings are compared, the most important ones first.

The text of `study.tasks.text`, four workers unless a name says otherwise, 1,200 steps of each worker. Outer learning
rate and momentum are those that docs/training.md recommends for the interval; the inner learning rate of every arm is
tuned (`study.tuning`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from study.arm import Absence, Arm, Phase, Variation
from study.tasks.base import UNEQUAL

__all__ = ["AVERAGE", "FULL", "QUICK", "PlannedArm", "StudyPlan"]

AVERAGE = "average"
"""The outer optimizer that takes no step."""
_NEAR, _FAR = "sgd:lr=0.8,momentum=0.6,nesterov", "sgd:lr=1.0,momentum=0.6,nesterov"
"""Outer optimizers for intervals up to 10, and for longer ones."""
_ALONE, _SYNCHRONOUS = Variation(method="alone"), Variation(method="synchronous")
_THIRD_AWAY = Absence(part=1 / 3, rounds=2.0)
_INTERVALS = (50, 10, 25, 100, 5)
_FIRST_RUNGS = {1: 2, 5: 2, 10: 2, 25: 1, 50: 1, 100: 1}
"""Where tuning begins, by interval: see `study.tuning.rate_at`."""


@dataclass(frozen=True)
class PlannedArm:
    """An arm whose learning rate and seed are still to be filled in.

    Args:
        group: the heading under which the page shows it.
        name: unique.
        template: the arm; its learning rate and seed mean nothing.
        first_rung: where tuning begins: it tries this learning rate and its two neighbours.
        reference: the name of the synchronous arm that it is compared with; "" for that itself.
        beside: the name of the usual arm of which this is a variation; "": none.
    """

    group: str
    name: str
    template: Arm
    first_rung: int
    reference: str
    beside: str = ""

    def with_rate(self, learning_rate: float, seed: int) -> Arm:
        """One training."""
        return replace(self.template, learning_rate=learning_rate, seed=seed)


@dataclass(frozen=True)
class StudyPlan:
    """What is trained.

    Args:
        arms: of one task, in the order in which they are trained. The first is the synchronous one.
        seeds: of the trainings that are compared.
        tuning_seed: of those that find the learning rate; none of ``seeds``.
    """

    arms: tuple[PlannedArm, ...]
    seeds: tuple[int, ...]
    tuning_seed: int


def _planned(group: str, name: str, arm: Arm, beside: str = "") -> PlannedArm:
    synchronous = _synchronous_name(arm.num_workers)
    first_rung = _FIRST_RUNGS[arm.interval_steps]
    return PlannedArm(group, name, arm, first_rung, "" if name == synchronous else synchronous, beside)


def _synchronous_name(num_workers: int) -> str:
    return "synchronous" + ("" if num_workers == 4 else f", {num_workers} workers")


def _full_arms() -> Iterator[PlannedArm]:
    base = Arm("text", "raw", AVERAGE, 1, 0.0, 0, steps=1200, measure_every_steps=100)

    def arm(outer: str, interval_steps: int, codec: str, **others: object) -> Arm:
        return replace(base, outer=outer, interval_steps=interval_steps, codec=codec, **others)  # type: ignore[arg-type]

    group = "Both ends"
    yield _planned(group, "synchronous", replace(base, variation=_SYNCHRONOUS))
    yield _planned(group, "alone", replace(base, variation=_ALONE))

    group = "Intervals and codecs"
    for interval in _INTERVALS:
        outer = _NEAR if interval <= 10 else _FAR
        yield _planned(group, f"outer step every {interval}, int4", arm(outer, interval, "int4"))
        yield _planned(group, f"outer step every {interval}", arm(outer, interval, "raw"))
        yield _planned(group, f"average every {interval}", arm(AVERAGE, interval, "raw"))
    yield _planned(group, "average every 5, int4", arm(AVERAGE, 5, "int4"))
    yield _planned(group, "outer step every 50, int8", arm(_FAR, 50, "int8"))

    usual = "outer step every {}, int4"
    group = "Workers that are killed"
    varied = Variation(absence=_THIRD_AWAY)
    yield _planned(group, "a third killed, every 50, int4", arm(_FAR, 50, "int4", variation=varied), usual.format(50))
    longer = arm(_FAR, 50, "int4", variation=varied, steps=1400)
    yield _planned(group, "a third killed, every 50, int4, 1,400 steps", longer, usual.format(50))

    group = "Rounds that change over the run"
    tries = {
        "every 5, from a tenth on every 50": (5, _NEAR, Variation(later=(Phase(0.1, 50, _FAR),))),
        "every 50, in the last fifth every 10": (50, _FAR, Variation(later=(Phase(0.8, 10, _NEAR),))),
        "every 10, from a tenth on every 50, in the last fifth every 10": (
            10,
            _NEAR,
            Variation(later=(Phase(0.1, 50, _FAR), Phase(0.8, 10, _NEAR))),
        ),
        "every 25, momentum 0.3, 0.6, 0.8": (25, _momentum(0.3), _thirds(25, _momentum(0.6), _momentum(0.8))),
        "every 25, half the inner first moment": (25, _FAR, Variation(first_moment=0.5)),
    }
    for name, (interval, outer, variation) in tries.items():
        varied_arm = arm(outer, interval, "int4", variation=variation)
        yield _planned(group, f"{name}, int4", varied_arm, usual.format(25 if interval == 25 else 50))

    group = "Late centers"
    yield _planned(group, "10 steps late, every 50, int4", arm(_FAR, 50, "int4", late_steps=10), usual.format(50))

    group = "Unequal shards"
    unequal = Variation(shards=UNEQUAL)
    for interval in (10, 50):
        outer = _NEAR if interval <= 10 else _FAR
        varied_arm = arm(outer, interval, "int4", variation=unequal)
        yield _planned(group, f"unequal, every {interval}, int4", varied_arm, usual.format(interval))

    group = "Other numbers of workers"
    for count in (2, 8):
        synchronous = replace(base, variation=_SYNCHRONOUS, num_workers=count)
        yield _planned(group, _synchronous_name(count), synchronous)
        yield _planned(group, f"outer step every 50, int4, {count} workers", arm(_FAR, 50, "int4", num_workers=count))


def _momentum(value: float) -> str:
    return f"sgd:lr=1.0,momentum={value},nesterov"


def _thirds(interval_steps: int, *outers: str) -> Variation:
    return Variation(later=tuple(Phase(n / 3, interval_steps, outer) for n, outer in enumerate(outers, start=1)))


def _quick_arms() -> Iterator[PlannedArm]:
    base = Arm("text", "raw", AVERAGE, 1, 0.0, 0, steps=60, num_workers=2, measure_every_steps=20)
    group = "Both ends"
    yield PlannedArm(group, "synchronous", replace(base, variation=_SYNCHRONOUS), 2, "")
    yield PlannedArm(group, "alone", replace(base, variation=_ALONE), 2, "synchronous")
    group = "Intervals and codecs"
    for interval in (5, 10):
        averaged, stepped = (replace(base, interval_steps=interval, outer=outer) for outer in (AVERAGE, _NEAR))
        yield PlannedArm(group, f"average every {interval}", averaged, 2, "synchronous")
        coded = replace(stepped, codec="int4")
        yield PlannedArm(group, f"outer step every {interval}, int4", coded, 2, "synchronous")


FULL = StudyPlan(tuple(_full_arms()), seeds=(0, 1, 2), tuning_seed=100)
QUICK = StudyPlan(tuple(_quick_arms()), seeds=(0,), tuning_seed=100)
