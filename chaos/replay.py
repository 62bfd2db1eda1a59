"""Whether what the workers pushed explains every center that they received. Pure.

A round is summed in the order in which fragments come, so every element has to be, bit for bit, one of the averages
that some order gives. With two workers there is one, with four there are twelve. An outer optimizer is replayed, too,
with its state. The order in which an element was summed is not always certain, so this works with two workers only.

With a codec, a fragment of a push comes coded or raw (from a worker that has lost the base, or in shared memory), so
both are tried; the center is what the codec makes of it, relative to the center before.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from chaos.coding import Coding
from chaos.log import Push, Received, Values
from modelaverage.outer import AVERAGE, OuterOptimizer

__all__ = ["MAX_WORKERS", "Replay", "replay"]

MAX_WORKERS = 4
"""More would have too many orders."""


@dataclass
class Replay:
    """The result of a replay.

    Attributes:
        problems: what is wrong; empty if nothing is.
        rounds_explained: rounds whose center is the average of one push of each worker.
        rounds_with_a_choice: of those, rounds for which a worker had logged several pushes that differ.
        pushes_not_counted: pushes that were logged and are in no center.
    """

    problems: list[str] = field(default_factory=list)
    rounds_explained: int = 0
    rounds_with_a_choice: int = 0
    pushes_not_counted: int = 0


def replay(
    pushes: Sequence[Push],
    received: Sequence[Received],
    workers: Sequence[str],
    rounds: int,
    outer: OuterOptimizer = AVERAGE,
    coding: Coding | None = None,
) -> Replay:
    """Replays the rounds 1 to ``rounds`` of a strict server.

    Args:
        pushes: all that the workers logged.
        received: likewise.
        workers: the workers that must be in every round.
        rounds: the planned `global_step`.
        outer: the outer optimizer of the run; `average` unless there are two workers and no codec.
        coding: the codec of the run; None: none.
    """
    assert outer == AVERAGE or (len(workers) == 2 and coding is None)
    result = Replay()
    pushes_from, centers_of = defaultdict[int, list[Push]](list), defaultdict[int, list[Received]](list)
    for push in pushes:
        pushes_from[push.base_step].append(push)
    for center in received:
        centers_of[center.global_step].append(center)
    for step in sorted({*pushes_from, *(step - 1 for step in centers_of)}):
        if step >= rounds:
            result.problems.append(f"round {step + 1}: only {rounds} were planned")
    if len(_distinct(center.values for center in centers_of[0])) != 1:
        result.problems.append("not every worker began with the same center")
    outer_step = _OuterStep(outer, [center.values for center in centers_of[0]])
    for step in range(rounds):
        made = _Made(outer_step, coding, [center.values for center in centers_of[step]])
        problems = _replay_round(result, pushes_from[step], centers_of[step + 1], sorted(workers), made)
        result.problems += [f"round {step + 1}: {problem}" for problem in problems]
    return result


class _OuterStep:
    """The outer optimizer with the center and the state of the round before."""

    def __init__(self, outer: OuterOptimizer, centers: Sequence[Values]) -> None:
        self._outer = outer
        self._center = centers[0] if centers else np.zeros(0, np.float32)
        self._state = outer.init(self._center)

    def after(self, average: Values) -> Values:
        """The next center."""
        if self._outer == AVERAGE:
            return average
        return np.asarray(self._outer.update(self._center, average, self._state, 0)[0])

    def advance(self, average: Values) -> None:
        """The round has been made."""
        if self._outer != AVERAGE:
            self._center, self._state = self._outer.update(self._center, average, self._state, 0)


class _Made:
    """The centers that a round may make of pushes."""

    def __init__(self, outer: _OuterStep, coding: Coding | None, before: Sequence[Values]) -> None:
        self._outer = outer
        self._coding = coding if before else None
        self._base = before[0] if before else np.zeros(0, np.float32)
        self._decoded = dict[int, tuple[Values, ...]]()

    def of(self, choice: Sequence[Values]) -> Iterator[Values]:
        """The next center, for every way in which the pushes may have come and been summed."""
        for given in itertools.product(*map(self._ways, choice)):
            for average in _averages(given):
                made = self._outer.after(average)
                yield made if self._coding is None else self._coding.through(made, self._base)

    def advance(self, choice: Sequence[Values]) -> None:
        """The round has been made of these pushes."""
        self._outer.advance(_averages(choice)[0])

    def _ways(self, pushed: Values) -> tuple[Values, ...]:
        """A push as it may have come: coded, raw."""
        if self._coding is None:
            return (pushed,)
        if id(pushed) not in self._decoded:  # the caller keeps the pushes of a round
            self._decoded[id(pushed)] = self._coding.through(pushed, self._base), pushed
        return self._decoded[id(pushed)]


def _replay_round(
    result: Replay, pushes: list[Push], centers: list[Received], workers: list[str], made: _Made
) -> Iterator[str]:
    """The problems of one round; counts it in ``result``."""
    yield from _check_contributors(centers, workers)
    values = _distinct(center.values for center in centers)
    if len(values) != 1:
        yield f"workers received {len(values)} different centers" if values else "nobody received its center"
        return
    candidates = [_distinct(push.values for push in pushes if push.worker == worker) for worker in workers]
    choices = list(itertools.product(*candidates))
    explaining = [choice for choice in choices if _explains(choice, values[0], made)]
    if len(explaining) != 1:
        if explaining:
            yield f"{len(explaining)} choices of one push of each worker explain the center"
        elif choices:
            closest = min(float(np.abs(next(made.of(choice)) - values[0]).max()) for choice in choices)
            yield (
                f"none of {len(choices)} choices of one push of each worker explains the center; the closest is off by "
                f"{closest:.3g}"
            )
        else:
            missing = [worker for worker, found in zip(workers, candidates, strict=True) if not found]
            yield f"it has a center, but no push of {', '.join(missing)} was logged"
        return
    made.advance(explaining[0])
    result.rounds_explained += 1
    result.rounds_with_a_choice += len(choices) > 1
    for worker, counted in zip(workers, explaining[0], strict=True):
        yield from _check_told(worker, [push for push in pushes if push.worker == worker], counted)
    result.pushes_not_counted += len(pushes) - len(workers)


def _check_contributors(centers: list[Received], workers: list[str]) -> Iterator[str]:
    told = {center.contributors for center in centers if center.contributors is not None}
    if centers and not told:
        yield "nobody was told who contributed"
    for contributors in sorted(told - {tuple(workers)}):
        yield f"its contributors are {', '.join(contributors)}"


def _check_told(worker: str, pushes: list[Push], counted: Values) -> Iterator[str]:
    """Whether what a worker was told about its pushes agrees with the push that counted."""
    committed = [push for push in pushes if push.told == "COMMITTED"]
    if len(committed) > 1:
        yield f"{worker} was told of {len(committed)} pushes that they were committed"
    if any(not _same(push.values, counted) for push in committed):
        yield f"{worker} was told that a push was committed, but another one counted"
    if all(push.told == "STALE" for push in pushes if _same(push.values, counted)):
        yield f"{worker} was told that a push was stale, but it counted"


def _explains(choice: Sequence[Values], center: Values, made: _Made) -> bool:
    wrong = np.ones(center.shape, bool)
    for possible in made.of(choice):
        wrong &= possible.view(np.uint32) != center.view(np.uint32)
        if not wrong.any():
            return True
    return False


def _averages(choice: Sequence[Values]) -> list[Values]:
    """The average in every order of summation, as the server computes it."""
    found = list[Values]()
    for order in itertools.permutations(range(len(choice))):
        if order[:2] == tuple(sorted(order[:2])):  # the first two commute
            total = choice[order[0]]
            for position in order[1:]:
                total = np.add(total, choice[position])
            found.append(np.divide(total, np.float32(len(choice))))
    return found


def _distinct(arrays: Iterator[Values]) -> list[Values]:
    return list({array.tobytes(): array for array in arrays}.values())


def _same(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return one.tobytes() == other.tobytes()
