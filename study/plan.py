"""The arms of `python -m study`: which trainings are compared, the most important ones first.

Bytes of `study.tasks.text_muon`, four workers unless a name says otherwise, 2,000 steps of each worker. Outer learning
rate and momentum are those that docs/training.md recommends for the interval; the inner learning rate of every arm is
tuned (`study.tuning`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from study.arm import Absence, Arm, Phase, Variation
from study.tasks.base import UNEQUAL

__all__ = ["AVERAGE", "EXTENDED", "FULL", "QUICK", "TIMED", "PlannedArm", "StudyPlan"]

AVERAGE = "average"
"""The outer optimizer that takes no step."""
_NEAR, _FAR = "sgd:lr=0.8,momentum=0.6,nesterov", "sgd:lr=1.0,momentum=0.6,nesterov"
"""Outer optimizers for intervals up to 10, and for longer ones."""
_TASK = "text-muon"
_ALONE, _SYNCHRONOUS = Variation(method="alone"), Variation(method="synchronous")
_THIRD_AWAY = Absence(part=1 / 3, rounds=2.0)
_KILLED_ONCE = Absence(part=1 / 24, rounds=2.0)
"""In 48 rounds, a worker is killed once on average, and misses two of them."""
_COUNTED = ("average every 50", "outer step every 50, int4")
"""Arms that are also trained with other numbers of workers."""
_FIRST_RUNG, _LONGER_RUNG, _IMAGES_RUNG = 2, 3, 5
"""Where tuning begins: see `study.tuning.rate_at`."""


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
        arms: in the order in which they are trained. The first is synchronous.
        seeds: of the trainings that are compared.
        tuning_seed: of those that find the learning rate; none of ``seeds``.
    """

    arms: tuple[PlannedArm, ...]
    seeds: tuple[int, ...]
    tuning_seed: int

    @property
    def tasks(self) -> list[str]:
        """Of the arms, each once."""
        return list(dict.fromkeys(each.template.task for each in self.arms))


def _planned(group: str, name: str, arm: Arm, beside: str = "", first_rung: int = _FIRST_RUNG) -> PlannedArm:
    return PlannedArm(group, name, arm, first_rung, "" if name == "synchronous" else "synchronous", beside)


def _full_arms() -> Iterator[PlannedArm]:
    base = Arm(_TASK, "raw", AVERAGE, 1, 0.0, 0, steps=2000, measure_every_steps=100)

    def arm(outer: str, interval_steps: int, codec: str, **others: object) -> Arm:
        every = max(base.measure_every_steps, interval_steps)
        changed = {"outer": outer, "interval_steps": interval_steps, "codec": codec, "measure_every_steps": every}
        return replace(base, **(changed | others))  # type: ignore[arg-type]

    ends, intervals, usual = "Both ends", "Intervals and codecs", "outer step every {}, int4"
    yield _planned(ends, "synchronous", replace(base, variation=_SYNCHRONOUS))
    averaged, longer, steps = "average every 12, int4", "More steps", ", 3,000 steps"
    yield _planned(longer, averaged + steps, arm(AVERAGE, 12, "int4", steps=3000), first_rung=_LONGER_RUNG)
    late = arm(AVERAGE, 12, "int4", steps=3000, late_steps=4)
    yield _planned(longer, f"{averaged}, 4 steps late{steps}", late, averaged + steps)
    stepped = arm(_FAR, 35, "int4", steps=3000)
    yield _planned(longer, usual.format(35) + steps, stepped)
    ends_near = Variation(later=(Phase(0.85, 25, AVERAGE),))
    changes, changing = "Rounds that change over the run", "every 70, in the last 15 % every 25, int4"
    yield _planned(changes, changing + steps, arm(_FAR, 70, "int4", variation=ends_near, steps=3000))
    yield _planned(intervals, usual.format(50), arm(_FAR, 50, "int4"))
    yield _planned(intervals, "average every 6, int4", arm(AVERAGE, 6, "int4"))
    yield _planned(intervals, averaged, arm(AVERAGE, 12, "int4"))
    yield _planned(intervals, usual.format(55), arm(_FAR, 55, "int4"))
    killed = "Workers that are killed"
    for name, absence in (("a third away", _THIRD_AWAY), ("each killed once", _KILLED_ONCE)):
        template = arm(_FAR, 50, "int4", variation=Variation(absence=absence), steps=2400)
        yield _planned(killed, f"{name}, every 50, int4, 2,400 steps", template, usual.format(50))
    yield _planned(ends, "alone", replace(base, variation=_ALONE))
    yield _planned(intervals, "average every 50", arm(AVERAGE, 50, "raw"))
    yield _planned(intervals, usual.format(25), arm(_FAR, 25, "int4"))


def _image_arms() -> Iterator[PlannedArm]:
    base = Arm("mnist", "raw", AVERAGE, 1, 0.0, 0, steps=400, measure_every_steps=50)
    stepped = replace(base, outer=_FAR, interval_steps=50, codec="int4")
    templates = {
        "synchronous": replace(base, variation=_SYNCHRONOUS),
        "alone": replace(base, variation=_ALONE),
        "average every 10": replace(base, interval_steps=10),
        "average every 50": replace(base, interval_steps=50),
        "average every 100": replace(base, interval_steps=100),
        "outer step every 10, int4": replace(stepped, interval_steps=10, outer=_NEAR),
        "outer step every 50, int8": replace(stepped, codec="int8"),
        "outer step every 50, int4": stepped,
        "outer step every 100, int4": replace(stepped, interval_steps=100),
        "10 steps late, outer step every 50, int4": replace(stepped, late_steps=10),
        "unequal, average every 50": replace(base, interval_steps=50, variation=Variation(shards=UNEQUAL)),
        "unequal, outer step every 50, int4": replace(stepped, variation=Variation(shards=UNEQUAL)),
    }
    for name, template in templates.items():
        reference = "" if name == "synchronous" else "images, synchronous"
        yield PlannedArm("Images", f"images, {name}", template, _IMAGES_RUNG, reference)
    for count in (2, 8):
        group, synchronous = "Images, other numbers of workers", f"images, synchronous, {count} workers"
        counted = {name: replace(templates[name], num_workers=count) for name in ("synchronous", *_COUNTED)}
        yield PlannedArm(group, synchronous, counted.pop("synchronous"), _IMAGES_RUNG, "")
        for name, template in counted.items():
            yield PlannedArm(group, f"images, {name}, {count} workers", template, _IMAGES_RUNG, synchronous)


def _quick_arms() -> Iterator[PlannedArm]:
    base = Arm(_TASK, "raw", AVERAGE, 1, 0.0, 0, steps=60, num_workers=2, measure_every_steps=20)
    group = "Both ends"
    yield PlannedArm(group, "synchronous", replace(base, variation=_SYNCHRONOUS), 2, "")
    yield PlannedArm(group, "alone", replace(base, variation=_ALONE), 2, "synchronous")
    group = "Intervals and codecs"
    for interval in (5, 10):
        averaged, stepped = (replace(base, interval_steps=interval, outer=outer) for outer in (AVERAGE, _NEAR))
        yield PlannedArm(group, f"average every {interval}", averaged, 2, "synchronous")
        coded = replace(stepped, codec="int4")
        yield PlannedArm(group, f"outer step every {interval}, int4", coded, 2, "synchronous")


_TEXT, _IMAGES = tuple(_full_arms()), tuple(_image_arms())
FULL = StudyPlan((*_TEXT[:-2], *_IMAGES), seeds=(0, 1, 2), tuning_seed=100)
EXTENDED = replace(FULL, arms=(*FULL.arms, *_TEXT[-2:]))
"""The full plan, and arms for which its two hours are too short."""
QUICK = StudyPlan(tuple(_quick_arms()), seeds=(0,), tuning_seed=100)

TIMED = (
    "synchronous",
    "average every 12, int4",
    "outer step every 50, int4",
    "average every 12, int4, 3,000 steps",
    "average every 12, int4, 4 steps late, 3,000 steps",
)
"""Arms of the full plan whose steps are timed over links."""
