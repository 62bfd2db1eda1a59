"""Time to a loss over links: what a step takes (measured by `python -m bench.study_links`) times the steps that the
study's trainings needed. The numbers lie beside the trainings, in a file that is read and written here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from study.results import ArmResult, CurvePoint

__all__ = ["LinkTimes", "StepTime", "TimeToLoss", "link_times_path", "steps_to", "times_to_loss"]


@dataclass(frozen=True)
class StepTime:
    """What a local step took, rounds included.

    Args:
        arm: the name of the arm.
        rate_mbit: of every host's link, in each direction.
        step_s: of the slowest worker, mean over the run.
        link_bytes: at the busiest worker's link, a step, both directions, as the kernel counts them.
    """

    arm: str
    rate_mbit: float
    step_s: float
    link_bytes: float


@dataclass(frozen=True)
class LinkTimes:
    """All that one run of the measurement found.

    Args:
        batch_s: what every worker slept in a step instead of calculating.
        steps: one for each arm and rate.
        batch_was_measured: whether a batch takes as long on one processor there; False: the time was given.
    """

    batch_s: float
    steps: tuple[StepTime, ...]
    batch_was_measured: bool = True

    @classmethod
    def of(cls, read: Mapping[str, Any]) -> LinkTimes:
        """From `dataclasses.asdict` through JSON. Raises KeyError, TypeError and ValueError if it is something else."""
        steps = tuple(StepTime(**each) for each in read["steps"])
        return cls(float(read["batch_s"]), steps, bool(read.get("batch_was_measured", True)))

    @classmethod
    def load(cls, path: Path) -> LinkTimes:
        """Raises OSError, and ValueError if the file is not what `save` writes."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} has no times of steps ({error}); `python -m bench.study_links` writes it"
            ) from None

    def save(self, path: Path) -> None:
        """Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def computing_faster(self, times: float) -> LinkTimes:
        """Predicts the times with computation sped up by this factor. Communication takes as long as measured."""
        saved_s = self.batch_s * (1 - 1 / times)
        steps = tuple(replace(each, step_s=each.step_s - saved_s) for each in self.steps)
        return replace(self, batch_s=self.batch_s - saved_s, steps=steps)

    def at(self, arm: str, rate_mbit: float) -> StepTime | None:
        """Of one arm over one kind of link."""
        return next((each for each in self.steps if (each.arm, each.rate_mbit) == (arm, rate_mbit)), None)

    @property
    def rates_mbit(self) -> list[float]:
        """Fastest first."""
        return sorted({each.rate_mbit for each in self.steps}, reverse=True)


@dataclass(frozen=True)
class TimeToLoss:
    """How long an arm trains until its center is as good as synchronous training's last one.

    Args:
        arm: the name of the arm.
        rate_mbit: of the links.
        step_s: a local step with its part of a round.
        steps: that are needed; None: the arm never gets there.
        of_synchronous: the time, as a part of synchronous training's; None: the arm never gets there.
    """

    arm: str
    rate_mbit: float
    step_s: float
    steps: float | None
    of_synchronous: float | None

    @property
    def seconds(self) -> float | None:
        """The time."""
        return None if self.steps is None else self.steps * self.step_s


def link_times_path(runs: Path) -> Path:
    """Beside the trainings."""
    return runs / "links.json"


def steps_to(loss: float, curve: Sequence[CurvePoint]) -> float | None:
    """After how many steps a curve first is at ``loss`` or below, on straight lines between its points; None: never."""
    before: CurvePoint | None = None
    for point in curve:
        if point.held_out_loss <= loss:
            if before is None:
                return float(point.step)
            part = (before.held_out_loss - loss) / (before.held_out_loss - point.held_out_loss)
            return before.step + part * (point.step - before.step)
        before = point
    return None


def times_to_loss(results: Sequence[ArmResult], times: LinkTimes) -> list[TimeToLoss]:
    """For every arm and rate that was measured, fastest links first.

    The loss to reach is the mean of the synchronous arm, the first of ``results``, at its end.
    """
    synchronous, target = results[0].name, results[0].held_out_loss
    found = list[TimeToLoss]()
    for rate_mbit in times.rates_mbit:
        first = times.at(synchronous, rate_mbit)
        there = None if first is None else first.step_s * results[0].planned.template.steps
        for each in results:
            measured = times.at(each.name, rate_mbit)
            if measured is None:
                continue
            steps = float(each.planned.template.steps) if each is results[0] else steps_to(target, each.curve)
            part = None if steps is None or there is None else steps * measured.step_s / there
            found.append(TimeToLoss(each.name, rate_mbit, measured.step_s, steps, part))
    return found
