"""The directory of a run, and the files that are in it however the workers are trained."""

from __future__ import annotations

import time
from itertools import chain, count
from pathlib import Path

__all__ = ["CURVES", "ROUNDS", "new_run_directory"]

CURVES = "curves.png"
ROUNDS = "rounds"
"""The directory of the workers' round logs."""


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
