"""Types of the commands' flags. Each takes the text of one flag, and raises argparse.ArgumentTypeError."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from modelaverage.addresses import split

__all__ = ["count", "existing_file", "fraction", "or_auto", "positive", "ps_hosts", "seconds", "whole"]

_MAX_SECONDS = 1e9
_T = TypeVar("_T")


def whole(text: str) -> int:
    """A whole number from 0 up."""
    return _whole_from(0, text)


def count(text: str) -> int:
    """A whole number from 1 up."""
    return _whole_from(1, text)


def seconds(text: str) -> float:
    """A positive number of seconds, below a billion."""
    value = _number(text)
    if not 0 < value < _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up and below 1")
    return value


def or_auto(kind: Callable[[str], _T]) -> Callable[[str], _T | Literal["auto"]]:
    """The type ``kind``, or the word "auto"."""

    def read(text: str) -> _T | Literal["auto"]:
        if text == "auto":
            return "auto"
        try:
            return kind(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error} or 'auto'") from None

    return read


def ps_hosts(text: str) -> tuple[str, ...]:
    """Addresses HOST:PORT, separated by commas."""
    try:
        return split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def existing_file(text: str) -> Path:
    """A file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def _whole_from(least: int, text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
