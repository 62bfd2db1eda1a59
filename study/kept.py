"""Finished trainings on disk: one JSON file each, so that a study that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from study.arm import Arm, arm_from
from study.play import Measured

__all__ = ["KeptArms", "Training"]


@dataclass(frozen=True)
class Training:
    """A finished training.

    Args:
        arm: what decides it.
        source: of the task's data.
        took_s: how long it ran, on a machine that may have had other work.
        measured: in order.
    """

    arm: Arm
    source: str
    took_s: float
    measured: tuple[Measured, ...]

    @property
    def last(self) -> Measured:
        """After the last round."""
        return self.measured[-1]

    @property
    def train_loss(self) -> float:
        """The mean of the last fifth of the measurements: single ones depend on which batches came."""
        losses = [each.train_loss for each in self.measured[-max(1, len(self.measured) // 5) :]]
        return sum(losses) / len(losses)


@dataclass(frozen=True)
class KeptArms:
    """A directory of finished trainings. Several processes may use it at once.

    Args:
        directory: made when the first is kept.
    """

    directory: Path

    def load(self, arm: Arm, source: str) -> Training | None:
        """The training of just this arm on just this data, if it is there. A file of another arm, of other data, or
        that cannot be read counts as none, and `keep` replaces it."""
        try:
            read: dict[str, Any] = json.loads(self._path(arm).read_text(encoding="utf-8"))
            found = Training(
                arm_from(read["arm"]),
                read["source"],
                read["took_s"],
                tuple(Measured(**each) for each in read["measured"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if (found.arm, found.source) == (arm, source) and found.measured else None

    def keep(self, training: Training) -> None:
        """Writes it: the whole file or nothing. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(training.arm)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(training), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def all_of(self, arms: Sequence[Arm], source: str) -> list[Training]:
        """Those that are there."""
        return [found for arm in arms if (found := self.load(arm, source)) is not None]

    def _path(self, arm: Arm) -> Path:
        method = "" if arm.variation.method == "rounds" else f"-{arm.variation.method}"
        late = f"-late{arm.late_steps}-{arm.late_rule}" if arm.late_steps else ""
        digest = hashlib.sha256(json.dumps(_unusual(arm), sort_keys=True).encode()).hexdigest()[:10]
        name = f"{arm.task}{method}-{arm.interval_steps}-{arm.codec}{late}-rate{arm.learning_rate:g}-seed{arm.seed}"
        return self.directory / f"{name}-{digest}.json"


def _unusual(settings: Any) -> Any:
    """All fields of a dataclass except those with their default: a new field changes no file's name."""
    if isinstance(settings, tuple):
        return [_unusual(each) for each in settings]
    if not is_dataclass(settings):
        return settings
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    return {field.name: _unusual(value) for field, value in values.items() if value != field.default}
