"""How many steps a worker has made, and how many of them are in no round yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Counts of one worker's steps. "The last round" is the last time that the local variables and the center were
    equal: after a round, after a pull, or when the chief set the center to them.

    Attributes:
        local_step: all steps of this worker.
        touched: names of the parameters that have had a gradient since the last round.
        steps_since_round: steps since the last round.
        steps_pushed: how many of these were in the first push since the last round; None: there was no push.
    """

    def __init__(self) -> None:
        self.local_step = 0
        self.touched: set[str] = set()
        self.steps_since_round = 0
        self.steps_pushed: int | None = None

    def count_step(self) -> None:
        """A step was made, or skipped because its gradients were infinite."""
        self.local_step += 1
        self.steps_since_round += 1

    def count_push(self) -> int | None:
        """A push is about to be tried. Returns `steps_pushed` as it was before: None if this is the first push."""
        before = self.steps_pushed
        if before is None:
            self.steps_pushed = self.steps_since_round
        return before

    def center_installed(self, steps_later: int = 0) -> None:
        """The local variables were replaced by the center, and by this many steps that were made while it was away."""
        self.touched.clear()
        self.steps_since_round, self.steps_pushed = steps_later, None

    def state(self) -> dict[str, Any]:
        """What a state dict keeps."""
        return {
            "local_step": self.local_step,
            "touched": sorted(self.touched),
            "steps_since_round": self.steps_since_round,
        }

    def load(self, state: Mapping[str, Any], interval_steps: int) -> None:
        """Restores what `state` gave, also in an earlier version.

        Args:
            state: it may have further entries.
            interval_steps: where rounds were, if the state does not say how many steps there were since the last one.
        """
        touched: Iterable[str] = state["touched"]
        self.local_step, self.touched = state["local_step"], set(touched)
        self.steps_since_round = state.get("steps_since_round", self.local_step % interval_steps)
