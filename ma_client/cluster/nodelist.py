"""Slurm's short form of a list of nodes: node[01-03,07],gpu5."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

__all__ = ["nodes"]

# Single characters and whole brackets: with longer pieces, the match could backtrack exponentially before it fails.
_NODE = r"(?:[^\[\],\s]|\[[^\[\]]*\])+"
_LIST = re.compile(f"{_NODE}(?:,{_NODE})*")
_PIECE = re.compile(r"\[(?P<ranges>[^\[\]]*)\]|[^\[\]]+")
_RANGE = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")
# Slurm's own limit; a typing error must not exhaust the memory.
_MAX_RANGE = 65536


def nodes(text: str) -> Iterator[str]:
    """The names, in order.

    A name may have several brackets (all combinations; the last one changes fastest) and text after them. The first
    number of a range sets the width of its numbers: [08-10] is 08, 09, 10.

    Raises:
        ValueError: the list is malformed. Raised by the call, before the first name.
    """
    if _LIST.fullmatch(text) is None:
        raise ValueError("it is not a list of nodes, such as node[01-03,07],gpu5")
    pieces = [[_choices(piece) for piece in _PIECE.finditer(node.group())] for node in re.finditer(_NODE, text)]
    return ("".join(parts) for node in pieces for parts in product(*node))


def _choices(piece: re.Match[str]) -> list[str]:
    ranges = piece["ranges"]
    if ranges is None:
        return [piece.group()]
    return [number for part in ranges.split(",") for number in _numbers(part)]


def _numbers(text: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} in brackets is not a number or a range of numbers, such as 01-03")
    first, last = int(match["first"]), int(match["last"] or match["first"])
    if not 0 <= last - first < _MAX_RANGE:
        raise ValueError(f"{text!r} is not a range of 1 to {_MAX_RANGE} numbers")
    return [f"{number:0{len(match['first'])}d}" for number in range(first, last + 1)]
