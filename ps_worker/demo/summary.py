"""What a run of the built-in workload comes to: the table at its end, and summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from modelaverage.commands.columns import size
from modelaverage.names import shown
from ps_worker.demo.digits_config import DigitsConfig

__all__ = ["Summary"]

# Of more workers than these a line has no room for the names.
_EACH_WORKER = 2


@dataclass(frozen=True)
class Summary:
    """Every number of the table. Seconds are from a process's start to its end, the imports included.

    Args:
        center_accuracy: the part (0 to 1) of the test images that the center classifies right.
        alone_accuracy: the same of the worker that trained alone for the same number of steps.
        all_accuracy: of one that trained alone for the same number of steps on all images; None: the only worker has
            them all anyway.
        rounds: completed.
        bytes_moved: fragment bytes that the parameter servers received and sent.
        bytes_received: by all servers.
        bytes_sent: by all servers.
        total_s: of the whole run.
        cluster_s: of the servers' workers.
        alone_s: of the lone worker.
        waited_s: seconds that each worker waited at the barrier.
        num_servers: with a shard of the center each.
        num_workers: in a round.
        restarts: of each worker that was started again.
        config: how they trained.
        files: what was written, in the run's directory.
    """

    center_accuracy: float
    alone_accuracy: float
    all_accuracy: float | None
    rounds: int
    bytes_moved: int
    bytes_received: int
    bytes_sent: int
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
        """The table: what, how much."""
        servers = "the server" if self.num_servers == 1 else f"{self.num_servers} servers"
        part = "all images" if self.num_workers == 1 else f"1/{self.num_workers} of the images"
        workers = "1 worker" if self.num_workers == 1 else f"{self.num_workers} workers"
        steps = f"{self.config.steps} steps"
        rows = [
            ("accuracy, averaged", f"{self.center_accuracy:.4f}  ({workers}, {steps} on {part})"),
            ("accuracy, alone", f"{self.alone_accuracy:.4f}  (1 worker, {steps} on {part})"),
        ]
        if self.all_accuracy is not None:
            rows.append(("accuracy, all data", f"{self.all_accuracy:.4f}  (1 worker, {steps} on all images)"))
        if self.restarts:
            rows.append(("started again", _each(self.restarts)))
        return [
            *rows,
            ("rounds", f"{self.rounds}"),
            (
                "bytes moved",
                f"{size(self.bytes_moved)}  ({size(self.bytes_received)} to {servers}, {size(self.bytes_sent)} back)",
            ),
            ("barrier wait", _waits(self.waited_s)),
            (
                "seconds",
                f"{self.total_s:.1f}  ({self.cluster_s:.1f} together, {self.alone_s:.1f} alone, with their start)",
            ),
        ]

    def write(self, path: Path) -> None:
        """Writes all of it as JSON. Raises OSError."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def _waits(waited_s: Mapping[str, float]) -> str:
    if len(waited_s) > _EACH_WORKER:
        return f"{min(waited_s.values()):.1f} to {max(waited_s.values()):.1f} s each"
    return _each({worker: f"{seconds:.1f} s" for worker, seconds in waited_s.items()})


def _each(of_workers: Mapping[str, object]) -> str:
    return ", ".join(f"{shown(worker)} {what}" for worker, what in of_workers.items())
