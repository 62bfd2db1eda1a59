"""All that decides the result of a training, as values: what is kept on disk, compared, and put into file names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Absence", "Arm", "Phase", "Variation", "arm_from"]


@dataclass(frozen=True)
class Phase:
    """A later part of the run, with rounds of its own.

    Args:
        begins: after which part of the steps, above 0 and below 1.
        interval_steps: local steps from one round to the next.
        outer: text of the outer optimizer. The momentum of the phase before goes on; see `PlayedServer.use`.
    """

    begins: float
    interval_steps: int
    outer: str


@dataclass(frozen=True)
class Absence:
    """Workers are killed at random and come back; rounds go on without them, as with a quorum of one and no grace.

    A worker that is killed between two rounds has lost its steps since the first of them. It misses that round and
    perhaps more, and then goes on from the center of a round with a new inner optimizer. All begin alive. The number of
    rounds that a worker misses at a time is geometrically distributed.

    Args:
        part: of all pushes that are missed in the long run, above 0 and below 1.
        rounds: how many a worker misses at a time, in the mean; at least 1.

    Raises:
        ValueError: a number is out of range, or no chance of being killed makes so large a part.
    """

    part: float
    rounds: float

    def __post_init__(self) -> None:
        if not 0 < self.part < 1 or self.rounds < 1 or self.killed_chance > 1:
            raise ValueError(
                f"workers miss a part of {self.part:g} of all rounds, {self.rounds:g} at a time: the part must be "
                "above 0 and below 1, rounds at least 1 and at least part / (1 - part)"
            )

    @property
    def killed_chance(self) -> float:
        """With which a worker that took part in a round misses the next."""
        return self.part / ((1 - self.part) * self.rounds)


@dataclass(frozen=True)
class Variation:
    """How a training differs from the usual job, whose workers have equal shares and never stop.

    Args:
        method: a key of `study.methods.METHODS`.
        shards: "equal": shares are alike; "unequal": each worker has its own kind of data.
        absence: of workers; None: none is ever killed.
        later: phases with other rounds, in order.
        first_moment: factor for the first moment (or momentum) of the inner optimizer at each round; 1 keeps it.
    """

    method: str = "rounds"
    shards: str = "equal"
    absence: Absence | None = None
    later: tuple[Phase, ...] = ()
    first_moment: float = 1.0


@dataclass(frozen=True)
class Arm:
    """All that decides the result of a training.

    Args:
        task: a key of `study.tasks.TASKS`.
        codec: the job's codec.
        outer: text of the outer optimizer.
        interval_steps: local steps from one round to the next.
        learning_rate: of the workers' optimizers.
        seed: of initial values and batches. Arms that differ only in the codec have the same ones.
        steps: of each worker; a multiple of ``measure_every_steps``.
        num_workers: with a share of the data each.
        measure_every_steps: between two rounds, the center of the last one is measured.
        late_steps: how many steps a worker trains between a push and its center; below ``interval_steps``. After the
            last push it trains no more.
        late_rule: what it then does with that center: a key of `study.late.LATE_RULES`.
        variation: what is unusual.

    Raises:
        ValueError: ``steps`` is not such a multiple; an average would be later than the next push; phases are
            out of order, or late centers come together with phases or absent workers, which is not played.
    """

    task: str
    codec: str
    outer: str
    interval_steps: int
    learning_rate: float
    seed: int
    steps: int
    num_workers: int = 4
    measure_every_steps: int = 50
    late_steps: int = 0
    late_rule: str = "keep"
    variation: Variation = Variation()

    def __post_init__(self) -> None:
        later = self.variation.later
        if self.steps % self.measure_every_steps:
            raise ValueError(
                f"{self.steps} steps, measured every {self.measure_every_steps}: make steps a multiple of that"
            )
        if not 0 <= self.late_steps < self.interval_steps:
            raise ValueError(
                f"an average {self.late_steps} steps late, a round every {self.interval_steps}: "
                "it must come before the next push"
            )
        if self.late_steps and (later or self.variation.absence):
            raise ValueError("late centers are not played together with later phases or absent workers")
        begins = [0, *(round(phase.begins * self.steps) for phase in later), self.steps]
        if any(this >= following for this, following in itertools.pairwise(begins)):
            raise ValueError(f"phases begin at the steps {begins[:-1]} of {self.steps}; each must begin after the last")

    @property
    def round_ends(self) -> dict[int, str]:
        """The steps (from 1 on) after which a round is made, in order, with its outer optimizer. Every phase ends with
        a round, be the interval before it shorter."""
        phases = [Phase(0.0, self.interval_steps, self.outer), *self.variation.later]
        begins = [round(phase.begins * self.steps) for phase in phases]
        ends = dict[int, str]()
        for phase, begin, end in zip(phases, begins, [*begins[1:], self.steps], strict=True):
            ends |= dict.fromkeys([*range(begin + phase.interval_steps, end, phase.interval_steps), end], phase.outer)
        return ends

    @property
    def is_played_only(self) -> bool:
        """Whether no job can do this today: it has one interval and one outer optimizer, and leaves the inner alone."""
        return bool(self.variation.later) or self.variation.first_moment != 1.0

    @property
    def batches_trained(self) -> int:
        """By all workers together: what the training costs in computation."""
        return self.steps * (1 if self.variation.method == "alone" else self.num_workers)


def arm_from(read: Mapping[str, Any]) -> Arm:
    """The arm of which this is `dataclasses.asdict`, perhaps through JSON; fields with a default may be missing. Raises
    KeyError, TypeError and ValueError if it is none."""
    varied = dict(read.get("variation", {}))
    varied["later"] = tuple(Phase(**phase) for phase in varied.get("later", ()))
    absence = varied.get("absence")
    varied["absence"] = None if absence is None else Absence(**absence)
    return Arm(**{**read, "variation": Variation(**varied)})
