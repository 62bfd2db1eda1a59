"""Types of flags that more than one command has."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Literal, NoReturn

from modelaverage.addresses import split
from modelaverage.commands.serve_flags import count, seconds

__all__ = [
    "Parser",
    "count",
    "fraction",
    "help_format",
    "positive",
    "ps_hosts",
    "script",
    "seconds",
    "task_index",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def help_format(prog: str) -> argparse.HelpFormatter:
    """Leaves examples as they are written."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)


def whole(text: str) -> int:
    """A whole number from 0 on."""
    return _whole_from(0, text)


def task_index(text: str) -> int | Literal["auto"]:
    """A whole number from 0 on, or "auto"."""
    if text == "auto":
        return "auto"
    try:
        return whole(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, and not 'auto'") from None


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def fraction(text: str) -> float:
    """A number from 0 on, below 1."""
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on and below 1")
    return value


def ps_hosts(text: str) -> tuple[str, ...]:
    """Addresses HOST:PORT, separated by commas."""
    try:
        return split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def script(text: str) -> Path:
    """A Python file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _whole_from(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
