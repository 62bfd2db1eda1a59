"""How far a study is: what is on disk for each arm of the plan, and which trainings are next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study.arm import Arm
from study.kept import KeptArms, Training
from study.plan import PlannedArm, StudyPlan
from study.tuning import best_rung, rate_at, rungs_to_try

__all__ = ["ArmStanding", "StudyStanding", "standing_of"]

_USUAL_TUNING = 3
"""Trainings that tuning takes at least."""


@dataclass(frozen=True)
class ArmStanding:
    """One arm.

    Args:
        planned: the arm.
        tuning: trainings with the tuning seed, by rung.
        finished: trainings with the tuned rate, by seed.
        rung: of the tuned rate; None: not tuned yet.
        missing: trainings that can begin now.
        trainings_ahead: how many are missing at least, with those that can begin only after others.
    """

    planned: PlannedArm
    tuning: Mapping[int, Training]
    finished: Mapping[int, Training]
    rung: int | None
    missing: tuple[Arm, ...]
    trainings_ahead: int


@dataclass(frozen=True)
class StudyStanding:
    """All arms, in the plan's order."""

    arms: tuple[ArmStanding, ...]

    @property
    def missing(self) -> list[Arm]:
        """Trainings that can begin now, in the plan's order."""
        return [arm for each in self.arms for arm in each.missing]

    @property
    def trainings_done(self) -> int:
        """That are on disk."""
        return sum(len(each.tuning) + len(each.finished) for each in self.arms)

    @property
    def trainings_ahead(self) -> int:
        """That are missing at least."""
        return sum(each.trainings_ahead for each in self.arms)

    @property
    def batches_ahead(self) -> int:
        """What these have to compute."""
        return sum(each.trainings_ahead * each.planned.template.batches_trained for each in self.arms)

    @property
    def batch_s(self) -> float | None:
        """How long a batch took on one processor, in the mean of what is on disk; None: nothing is."""
        found = [training for each in self.arms for training in (*each.tuning.values(), *each.finished.values())]
        batches = sum(training.arm.batches_trained for training in found)
        return sum(training.took_s for training in found) / batches if batches else None


def standing_of(plan: StudyPlan, kept: KeptArms, sources: Mapping[str, str]) -> StudyStanding:
    """Reads what is kept, of just these data: sources by task. Raises ValueError: an arm cannot be tuned."""
    return StudyStanding(
        tuple(_arm_standing(planned, plan, kept, sources[planned.template.task]) for planned in plan.arms)
    )


def _arm_standing(planned: PlannedArm, plan: StudyPlan, kept: KeptArms, source: str) -> ArmStanding:
    tuning = dict[int, Training]()
    while True:
        try:
            rungs = rungs_to_try({rung: each.last.held_out_loss for rung, each in tuning.items()}, planned.first_rung)
        except ValueError as error:
            raise ValueError(f"{planned.name}: {error}") from None
        found = {rung: kept.load(planned.with_rate(rate_at(rung), plan.tuning_seed), source) for rung in rungs}
        tuning |= {rung: training for rung, training in found.items() if training is not None}
        if not rungs or None in found.values():
            break
    if rungs:
        missing = tuple(
            planned.with_rate(rate_at(rung), plan.tuning_seed) for rung, training in found.items() if training is None
        )
        ahead = max(len(missing), _USUAL_TUNING - len(tuning)) + len(plan.seeds)
        return ArmStanding(planned, tuning, {}, None, missing, ahead)
    rung = best_rung({rung: each.last.held_out_loss for rung, each in tuning.items()})
    arms = {seed: planned.with_rate(rate_at(rung), seed) for seed in plan.seeds}
    loaded = {seed: kept.load(arm, source) for seed, arm in arms.items()}
    missing = tuple(arms[seed] for seed, training in loaded.items() if training is None)
    finished = {seed: training for seed, training in loaded.items() if training is not None}
    return ArmStanding(planned, tuning, finished, rung, missing, len(missing))
