"""What a finished study found: one row for each arm, from the trainings on disk. Page, pictures and JSON show these."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from study.compare import spread_of
from study.kept import Training
from study.plan import PlannedArm
from study.standing import ArmStanding, StudyStanding
from study.tuning import rate_at

__all__ = ["ArmResult", "CurvePoint", "cheapest_within", "results_of"]


@dataclass(frozen=True)
class CurvePoint:
    """Means over the seeds after a number of steps.

    Args:
        step: of each worker.
        held_out_loss: of the center, in nats.
        link_bytes: of one worker, up and down.
    """

    step: int
    held_out_loss: float
    link_bytes: int


@dataclass(frozen=True)
class ArmResult:
    """One arm, over the seeds.

    Args:
        planned: the arm.
        seeds: all of the plan.
        learning_rate: the tuned one.
        tuning: learning rate and held-out loss of each training with the tuning seed, by rate.
        held_out_losses: at the end, by seed; in nats.
        train_losses: mean of the last fifth of the run, by seed; in nats.
        differences_percent: of held-out loss from the reference with the same seed, by seed. 0 for a reference.
        beside_percent: difference from the usual arm of which this is a variation, by seed; empty: there is none.
        up_bytes, down_bytes: of one worker in the whole training, mean over the seeds.
        bytes_part: up and down, of those of the reference.
        missed_part: of all pushes of the plan, those that absent workers did not make, mean over the seeds.
        curve: over the run.
        took_s: of all trainings with these seeds, on machines that may have had other work.
    """

    planned: PlannedArm
    seeds: tuple[int, ...]
    learning_rate: float
    tuning: tuple[tuple[float, float], ...]
    held_out_losses: tuple[float, ...]
    train_losses: tuple[float, ...]
    differences_percent: tuple[float, ...]
    beside_percent: tuple[float, ...]
    up_bytes: int
    down_bytes: int
    bytes_part: float
    missed_part: float
    curve: tuple[CurvePoint, ...]
    took_s: float

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.planned.name

    @property
    def reference(self) -> str:
        """The name of the synchronous arm to compare with; for that arm its own name."""
        return self.planned.reference or self.planned.name

    @property
    def held_out_loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.held_out_losses)

    @property
    def held_out_spread(self) -> float | None:
        """Standard deviation over the seeds; None: one seed."""
        return spread_of(self.held_out_losses)

    @property
    def difference_percent(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.differences_percent)

    @property
    def difference_spread(self) -> float | None:
        """Standard deviation over the seeds; None: one seed."""
        return spread_of(self.differences_percent)


def results_of(
    standing: StudyStanding, earlier: Callable[[PlannedArm], ArmResult | None] = lambda _: None
) -> list[ArmResult]:
    """Of the arms that are finished and have a finished reference, in the plan's order.

    Args:
        standing: the trainings on disk.
        earlier: finds the result of an arm that is not finished here; None: there is none.

    Raises:
        ValueError: the first arm, with which the others are compared, is not finished.
    """
    found = dict[str, ArmResult]()
    for each in standing.arms:
        result = earlier(each.planned) if each.trainings_ahead else _trained(each)
        if result is not None:
            found[each.planned.name] = replace(result, planned=each.planned)
    if standing.arms[0].planned.name not in found:
        raise ValueError(
            f"{standing.trainings_ahead} trainings or more are missing, also of {standing.arms[0].planned.name!r}, the "
            "arm with which others are compared; `python -m study` makes them"
        )
    return [
        _compared(each, found[each.reference], found.get(each.planned.beside))
        for each in found.values()
        if each.reference in found
    ]


def cheapest_within(
    results: Sequence[ArmResult], percent: float, with_more_steps: bool, with_played_only: bool
) -> ArmResult | None:
    """The arm that is at most this much worse than synchronous training, on average, and has the fewest of its bytes.
    It has its task, as many workers, equal shards, and no worker was killed. None: there is no such arm.

    Args:
        results: of a study, its synchronous arm first.
        percent: the bound for the held-out loss.
        with_more_steps: whether it may have more steps.
        with_played_only: whether it may be an arm that no job can have today.
    """
    first = results[0].planned.template
    within = [
        each
        for each in results
        if (arm := each.planned.template).task == first.task
        and arm.num_workers == first.num_workers
        and (arm.steps == first.steps or (with_more_steps and arm.steps > first.steps))
        and (arm.variation.shards, arm.variation.absence) == (first.variation.shards, None)
        and arm.variation.method == "rounds"
        and (with_played_only or not arm.is_played_only)
        and each.difference_percent <= percent
    ]
    return min(within, key=lambda each: each.bytes_part, default=None)


def _trained(standing: ArmStanding) -> ArmResult:
    """An arm by itself, not compared yet."""
    assert standing.rung is not None
    arm = standing.planned.template
    trainings = [training for _, training in sorted(standing.finished.items())]
    up_bytes, down_bytes = (
        round(statistics.fmean(getattr(each.last, way) for each in trainings)) for way in ("up_bytes", "down_bytes")
    )
    pushes = len(arm.round_ends) * arm.num_workers
    missed = 1 - statistics.fmean(each.last.pushes for each in trainings) / pushes if arm.variation.absence else 0.0
    return ArmResult(
        standing.planned,
        tuple(sorted(standing.finished)),
        rate_at(standing.rung),
        tuple((rate_at(rung), each.last.held_out_loss) for rung, each in sorted(standing.tuning.items())),
        tuple(each.last.held_out_loss for each in trainings),
        tuple(each.train_loss for each in trainings),
        (),
        (),
        up_bytes,
        down_bytes,
        0.0,
        missed,
        _curve(trainings),
        sum(each.took_s for each in trainings),
    )


def _compared(each: ArmResult, reference: ArmResult, beside: ArmResult | None) -> ArmResult:
    there = reference.up_bytes + reference.down_bytes
    return replace(
        each,
        differences_percent=_percent_over(each, reference),
        beside_percent=() if beside is None else _percent_over(each, beside),
        bytes_part=(each.up_bytes + each.down_bytes) / there if there else 0.0,
    )


def _percent_over(result: ArmResult, other: ArmResult) -> tuple[float, ...]:
    """How much more the held-out loss is, by seed."""
    pairs = zip(result.held_out_losses, other.held_out_losses, strict=True)
    return tuple(100 * (loss / base - 1) for loss, base in pairs)


def _curve(trainings: Sequence[Training]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            at[0].step,
            statistics.fmean(each.held_out_loss for each in at),
            round(statistics.fmean(each.up_bytes + each.down_bytes for each in at)),
        )
        for at in zip(*(each.measured for each in trainings), strict=True)
    )
