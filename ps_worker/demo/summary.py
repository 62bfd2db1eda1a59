"""The result of a run of the built-in workload: the table at its end, and summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from modelaverage.chosen import NO_COMPRESSION
from modelaverage.commands.columns import size
from modelaverage.names import shown
from modelaverage.outer import AVERAGE, text_of
from ps_worker.demo.digits_config import DigitsConfig
from ps_worker.demo.record import Score

__all__ = ["Summary"]

# With more workers than this, a line has no room for their names.
_EACH_WORKER = 2
_SCORES = ("center", "plain", "alone", "all_images")


@dataclass(frozen=True)
class Summary:
    """Every number of the table. Seconds run from a process's start to its end, and include its imports.

    Args:
        center: the score of the center.
        plain: of a center of plain averages without compression; None: the run's own was one.
        alone: of a worker that trained alone for the same number of steps.
        all_images: of one that trained alone on all images; None: the run had one worker, which has them.
        rounds: completed.
        bytes_moved: fragment bytes that the parameter servers received and sent.
        bytes_received: by all servers.
        bytes_sent: by all servers.
        bytes_received_raw: what ``bytes_received`` would be without compression.
        bytes_sent_raw: what ``bytes_sent`` would be.
        total_s: of the whole run.
        cluster_s: of the servers' workers.
        alone_s: of the lone worker.
        waited_s: seconds that each worker waited at the barrier.
        num_servers: parameter servers, each with a shard of the center.
        num_workers: in a round.
        restarts: by worker, for those that were restarted.
        config: the training's settings.
        files: names of the files in the run's directory.
    """

    center: Score
    plain: Score | None
    alone: Score
    all_images: Score | None
    rounds: int
    bytes_moved: int
    bytes_received: int
    bytes_sent: int
    bytes_received_raw: int
    bytes_sent_raw: int
    total_s: float
    cluster_s: float
    alone_s: float
    waited_s: dict[str, float]
    num_servers: int
    num_workers: int
    restarts: dict[str, int]
    config: DigitsConfig
    files: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """The table: titles and values."""
        servers = "the server" if self.num_servers == 1 else f"{self.num_servers} servers"
        part = "all images" if self.num_workers == 1 else f"1/{self.num_workers} of the images"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        each = "" if self.num_workers == 1 else " each"
        rows = [("center", f"{self.center}  ({workers}, {part}{each})")]
        if self.plain is not None:
            rows.append(("plain average", f"{self.plain}  (the same without {self._without()})"))
        rows.append(("alone", f"{self.alone}  (1 worker, {part})"))
        if self.all_images is not None:
            rows.append(("alone, all images", f"{self.all_images}  (1 worker, all images)"))
        rows.append(("outer optimizer", self.config.outer))
        if self.config.compression != NO_COMPRESSION:
            rows.append(("compression", self.config.compression))
        if self.restarts:
            rows.append(("started again", _each(self.restarts)))
        steps, interval_steps = self.config.steps, self.config.interval_steps
        rows.append(("rounds", f"{self.rounds}  ({steps} steps, a round every {interval_steps})"))

        def moved(received: int, sent: int) -> str:
            return f"{size(received + sent)}  ({size(received)} to {servers}, {size(sent)} back)"

        rows.append(("bytes moved", moved(self.bytes_received, self.bytes_sent)))
        if self.config.compression != NO_COMPRESSION:
            rows.append(("before coding", moved(self.bytes_received_raw, self.bytes_sent_raw)))
        return [
            *rows,
            ("barrier wait", _waits(self.waited_s)),
            (
                "seconds",
                f"{self.total_s:.1f}  ({self.cluster_s:.1f} together, {self.alone_s:.1f} alone, with their start)",
            ),
        ]

    def _without(self) -> str:
        """What the center has and the plain average has not."""
        config = self.config
        return " and ".join(
            what
            for what, is_there in (
                ("outer steps", config.outer != text_of(AVERAGE)),
                ("compression", config.compression != NO_COMPRESSION),
            )
            if is_there
        )

    def write(self, path: Path) -> None:
        """Writes all of it as JSON, each score as two numbers. Raises OSError."""
        scores = {"center": self.center, "plain": self.plain, "alone": self.alone, "all": self.all_images}
        numbers = dict[str, object]()
        for name, score in scores.items():
            numbers[f"{name}_accuracy"] = None if score is None else score.accuracy
            numbers[f"{name}_loss"] = None if score is None else score.loss
        rest = {name: value for name, value in asdict(self).items() if name not in _SCORES}
        path.write_text(json.dumps({**numbers, **rest}, indent=2) + "\n", encoding="utf-8")


def _waits(waited_s: Mapping[str, float]) -> str:
    if len(waited_s) > _EACH_WORKER:
        return f"{min(waited_s.values()):.1f} to {max(waited_s.values()):.1f} s each"
    return _each({worker: f"{seconds:.1f} s" for worker, seconds in waited_s.items()})


def _each(of_workers: Mapping[str, object]) -> str:
    return ", ".join(f"{shown(worker)} {what}" for worker, what in of_workers.items())
