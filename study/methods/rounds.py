"""Local steps and rounds with a server: what this project does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import codec_named
from modelaverage.outer import outer_optimizer
from study.arm import Absence, Arm
from study.methods.base import Method
from study.server import PlayedServer, Variables
from study.tasks.base import LearningTask
from study.worker import PlayedWorker

__all__ = ["RoundsMethod", "absent_rounds"]

_ABSENCE = 0xAB5E
"""Keeps the chances of absences apart from those of batches."""


def absent_rounds(absence: Absence | None, seed: int, rounds: int, num_workers: int) -> NDArray[np.bool_]:
    """Which worker misses which round, [rounds, workers]; the same for equal arguments."""
    missed = np.zeros((rounds, num_workers), np.bool_)
    if absence is not None:
        chances = np.random.default_rng((seed, _ABSENCE)).random(missed.shape)
        away = np.zeros(num_workers, np.bool_)  # alive before the first round
        for index in range(rounds):
            away = np.where(away, chances[index] >= 1 / absence.rounds, chances[index] < absence.killed_chance)
            missed[index] = away
    return missed


class RoundsMethod(Method):
    """Workers train on their own, push after every interval, and go on from the next center.

    Raises:
        ValueError: there is no such outer optimizer, or one cannot go on from the one before.
        InvalidRequestError: there is no such codec.
    """

    def __init__(self, task: LearningTask, arm: Arm) -> None:
        self._workers = [PlayedWorker(task, arm, [index]) for index in range(arm.num_workers)]
        ends = arm.round_ends
        self._outers = {end: outer_optimizer(text) for end, text in ends.items()}
        self._installs = {end + arm.late_steps for end in ends}
        first = self._workers[0].variables
        self._server = PlayedServer(first, list(dict.fromkeys(self._outers.values())), codec_named(arm.codec))
        self._missed = iter(absent_rounds(arm.variation.absence, arm.seed, len(ends), arm.num_workers))
        self._away = next(self._missed)
        self._pushed, self._arrived = list[Variables](), list[Variables]()
        self._model_bytes = sum(values.nbytes for values in first.values())
        self._all_up_bytes = self._all_down_bytes = 0

    def step(self, steps_done: int) -> list[float]:
        """A local step of every worker that the coming round counts, and what follows from it."""
        losses = [worker.step(steps_done) for worker in self._present]
        step = steps_done + 1
        if step in self._outers:
            self._round(step)
        if step in self._installs:  # with late centers, only after the first round
            for worker, values, was in zip(self._present, self._arrived, self._pushed, strict=True):
                worker.install(values, was)
        if step in self._outers:
            self._come_and_go()
        return losses

    @property
    def center(self) -> Variables:
        """The server's."""
        return self._server.manifest.arrays(self._server.center)

    @property
    def _present(self) -> list[PlayedWorker]:
        return [worker for worker, away in zip(self._workers, self._away, strict=True) if not away]

    def _round(self, step: int) -> None:
        self._pushed = [worker.copy() for worker in self._present]
        self._arrived = [worker.copy() for worker in self._present]
        if not self._pushed:
            return  # nobody is there: the center stays
        self._server.use(self._outers[step])
        found = self._server.round(self._arrived)
        self.rounds = self._server.rounds
        self.pushes += len(self._pushed)
        self._all_up_bytes += found.up * len(self._pushed)
        self._all_down_bytes += found.down * len(self._pushed)
        self._count()

    def _come_and_go(self) -> None:
        """Those that missed this round and are there in the next pull the center, which no codec makes smaller."""
        before, self._away = self._away, next(self._missed, self._away)
        for worker, was_away, is_away in zip(self._workers, before, self._away, strict=True):
            if was_away and not is_away:
                worker.restart(self.center)
                self._all_down_bytes += self._model_bytes
        self._count()

    def _count(self) -> None:
        self.up_bytes = self._all_up_bytes // len(self._workers)
        self.down_bytes = self._all_down_bytes // len(self._workers)
