"""JSON from hostile sources: values are bounded and of exactly the requested types. Pure: no I/O.

For any text, the functions raise only ValueError, with a readable message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["list_of", "map_of", "parse", "text", "whole_number", "whole_number_in_text"]

_T = TypeVar("_T")
# A few bytes of text may take a hundred in memory: a list of empty lists takes twenty times its size.
_MAX_BRACKETS = 1 << 20
_MAX_COMMAS = 1 << 22


def parse(content: str) -> Any:
    """The parsed value; names in an object must be distinct, and numbers finite."""
    if content.count("[") + content.count("{") > _MAX_BRACKETS or content.count(",") > _MAX_COMMAS:
        raise ValueError("it says more than any center needs")
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except MemoryError:
        raise ValueError("there is no memory for what it says") from None


def whole_number(value: Any, what: str, least: int, most: int) -> int:
    """The value, if it is an integer within these bounds; booleans and fractions are refused."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {_shown(value)} is not a whole number from {least} to {most}")
    return value


def whole_number_in_text(value: str, what: str, least: int, most: int) -> int:
    """The number written in ``value``: ASCII digits, without sign or leading zeros."""
    if not (value.isascii() and value.isdigit() and len(value) <= 20 and str(int(value)) == value):
        raise ValueError(f"{what} {_shown(value)} is not a whole number")
    return whole_number(int(value), what, least, most)


def text(value: Any, what: str) -> str:
    """The value, if it is text that UTF-8 can encode."""
    if type(value) is not str:
        raise ValueError(f"{what} {_shown(value)} is not a string")
    if not value.isascii():
        value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def list_of(value: Any, what: str, most: int, item: Callable[[Any], _T]) -> list[_T]:
    """The items of a list of at most ``most``, each converted by ``item``."""
    if type(value) is not list or len(value) > most:
        raise ValueError(f"{what} {_shown(value)} is not a list of at most {most}")
    return [item(each) for each in value]


def map_of(value: Any, what: str, most: int, item: Callable[[str, Any], _T]) -> dict[str, _T]:
    """The items of an object of at most ``most``, each converted by ``item`` from its name and value."""
    if type(value) is not dict or len(value) > most:
        raise ValueError(f"{what} {_shown(value)} is not an object of at most {most}")
    return {name: item(name, each) for name, each in value.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _shown(value: Any) -> str:
    if type(value) in (list, dict):
        return f"of {len(value)} items"
    shown = ascii(value) if type(value) in (str, int, float, bool) else type(value).__name__
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
