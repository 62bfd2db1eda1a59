"""The files that a run of the built-in workload writes, and their directory."""

from __future__ import annotations

import time
from itertools import chain, count
from pathlib import Path

__all__ = ["ALL", "CENTER", "CURVES", "METRICS", "SUMMARY", "TENSORBOARD", "new_run_directory", "remove_if_empty"]

CENTER = "center.safetensors"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
ALL = (CENTER, SUMMARY, METRICS, CURVES, TENSORBOARD)


def new_run_directory(parent: Path) -> Path:
    """Creates ``parent``/<time>, with a number appended if that exists. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in chain([""], (f"_{number}" for number in count(2))):
        directory = parent / f"{now}{suffix}"
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise AssertionError


def remove_if_empty(directory: Path) -> None:
    """Removes the directory of a run that ended before anything happened."""
    metrics = directory / METRICS
    if [path.name for path in directory.iterdir()] == [METRICS] and metrics.stat().st_size == 0:
        metrics.unlink()
        directory.rmdir()
