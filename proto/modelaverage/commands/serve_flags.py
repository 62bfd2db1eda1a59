"""The flags of `ps-server serve` about rounds and checkpoints: one table for all commands that start a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelaverage.commands.flag_types import count, or_auto, seconds

__all__ = ["ServeFlags", "add_serve_flags"]


@dataclass(frozen=True)
class _Flag:
    """A flag, its type, and what its help says."""

    type: Callable[[str], Any]
    metavar: str
    help: str


# No flag has a default here: the server chooses the value of a flag that is not given.
_FLAGS = {
    "min_workers": _Flag(
        count,
        "M",
        "commit without the rest: once M pushes are whole, a round waits --grace-s for the others, then commits (N: "
        "it needs all)",
    ),
    "max_workers": _Flag(count, "X", "with --min-workers: how many may take part in one round (N)"),
    "grace_s": _Flag(
        or_auto(seconds),
        "SECONDS",
        "with --min-workers: how long to wait for late workers; auto: the median of how late they have been, plus 4 x "
        "its median absolute deviation (auto)",
    ),
    "round_timeout_s": _Flag(
        seconds,
        "SECONDS",
        "tell a worker that has waited this long which workers are missing; its push stays in the round (never)",
    ),
    "checkpoint_dir": _Flag(
        Path,
        "DIR",
        "save the center to this directory, and continue from its newest checkpoint after a restart (nowhere)",
    ),
    "checkpoint_every_rounds": _Flag(
        count, "K", "write a checkpoint after every K-th round; with 1, a server that is killed loses nothing (1)"
    ),
    "checkpoint_timeout_s": _Flag(
        seconds,
        "SECONDS",
        "how long a round waits for its checkpoint; after that its workers get their answer without it, and "
        "checkpoints pause until the disk responds again (no limit)",
    ),
}


@dataclass(frozen=True)
class ServeFlags:
    """The values of these flags; None: not given.

    Args:
        min_workers: how many workers a round needs at least.
        max_workers: how many workers one round admits.
        grace_s: how long a round waits for late workers, or "auto".
        round_timeout_s: after how long a waiting worker is told which workers are missing.
        checkpoint_dir: the directory of the checkpoints.
        checkpoint_every_rounds: the number of rounds from one checkpoint to the next.
        checkpoint_timeout_s: how long a round waits for its checkpoint.
    """

    min_workers: int | None = None
    max_workers: int | None = None
    grace_s: float | str | None = None
    round_timeout_s: float | None = None
    checkpoint_dir: Path | None = None
    checkpoint_every_rounds: int | None = None
    checkpoint_timeout_s: float | None = None

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ServeFlags:
        """Reads the flags that `add_serve_flags` added."""
        return cls(**{name: getattr(arguments, name, None) for name in _FLAGS})

    def check_workers(self, num_workers: int, num_workers_flag: str = "--num-workers") -> None:
        """Checks that the numbers of workers fit together.

        Args:
            num_workers: how many workers the job has.
            num_workers_flag: the flag that sets it, for the message.

        Raises:
            ValueError: they do not; the message names the flags.
        """
        min_workers = num_workers if self.min_workers is None else self.min_workers
        max_workers = num_workers if self.max_workers is None else self.max_workers
        if not min_workers <= num_workers <= max_workers:
            told = [("--min-workers", self.min_workers), (num_workers_flag, num_workers)]
            told.append(("--max-workers", self.max_workers))
            ascending = ", ".join(f"{flag} {value}" for flag, value in told if value is not None)
            raise ValueError(f"{ascending} have to ascend")
        for name in ("max_workers", "grace_s"):
            if min_workers == num_workers and getattr(self, name) is not None:
                raise ValueError(f"{_flag(name)} needs a --min-workers below {num_workers_flag} {num_workers}")

    def check_checkpoints(self) -> None:
        """Raises ValueError, naming the flags, if a flag about checkpoints is given without a directory."""
        for name in ("checkpoint_every_rounds", "checkpoint_timeout_s"):
            if self.checkpoint_dir is None and getattr(self, name) is not None:
                raise ValueError(f"{_flag(name)} needs a --checkpoint-dir")

    def to_argv(self) -> list[str]:
        """The flags with these values."""
        told = {name: getattr(self, name) for name in _FLAGS}
        return [f"{_flag(name)}={value}" for name, value in told.items() if value is not None]


def add_serve_flags(command: argparse._ActionsContainer, without: Collection[str] = ()) -> None:
    """Adds the flags that `ServeFlags.from_arguments` reads, except those of the fields ``without``."""
    for name, flag in _FLAGS.items():
        if name not in without:
            command.add_argument(_flag(name), type=flag.type, metavar=flag.metavar, help=flag.help)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
