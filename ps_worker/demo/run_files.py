"""The files that a run of the built-in workload writes."""

from __future__ import annotations

from pathlib import Path

from ps_worker.curves.run_directory import CURVES

__all__ = ["ALL", "CENTER", "CURVES", "METRICS", "SUMMARY", "TENSORBOARD", "remove_if_empty"]

CENTER = "center.safetensors"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ALL = (CENTER, SUMMARY, METRICS, CURVES, TENSORBOARD)


def remove_if_empty(directory: Path) -> None:
    """Removes the directory of a run that ended before anything happened."""
    metrics = directory / METRICS
    if [path.name for path in directory.iterdir()] == [METRICS] and metrics.stat().st_size == 0:
        metrics.unlink()
        directory.rmdir()
