"""JSON from hostile sources: values are bounded, and of exactly the types that are asked for. Pure: no I/O.

Whatever the text says, every function raises ValueError, with a readable message, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["list_of", "map_of", "parse", "text", "whole_number", "whole_number_in_text"]

_T = TypeVar("_T")
# A few bytes of text may become a hundred in memory: a list of empty lists would take twenty times its own size.
_MAX_BRACKETS = 1 << 20
_MAX_COMMAS = 1 << 22


def parse(content: str) -> Any:
    """What the text says; names in one object are distinct, numbers finite."""
    if content.count("[") + content.count("{") > _MAX_BRACKETS or content.count(",") > _MAX_COMMAS:
        raise ValueError("it says more than any center needs")
    try:
        return json.loads(content, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except MemoryError:
        raise ValueError("there is no memory for what it says") from None


def whole_number(value: Any, what: str, least: int, most: int) -> int:
    """The value, if it is an integer in these bounds, and neither a truth value nor a fraction."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {_shown(value)} is not a whole number from {least} to {most}")
    return value


def whole_number_in_text(value: str, what: str, least: int, most: int) -> int:
    """The number that ``value`` is the usual text of: ASCII digits, no sign, no zeros before it."""
    if not (value.isascii() and value.isdigit() and len(value) <= 20 and str(int(value)) == value):
        raise ValueError(f"{what} {_shown(value)} is not a whole number")
    return whole_number(int(value), what, least, most)


def text(value: Any, what: str) -> str:
    """The value, if it is text that UTF-8 can say."""
    if type(value) is not str:
        raise ValueError(f"{what} {_shown(value)} is no text")
    if not value.isascii():
        value.encode()  # half of a surrogate pair: UnicodeEncodeError, which is a ValueError
    return value


def list_of(value: Any, what: str, most: int, item: Callable[[Any], _T]) -> list[_T]:
    """The items of a list that has ``most`` at most, each as ``item`` returns it."""
    if type(value) is not list or len(value) > most:
        raise ValueError(f"{what} {_shown(value)} is no list of at most {most}")
    return [item(each) for each in value]


def map_of(value: Any, what: str, most: int, item: Callable[[str, Any], _T]) -> dict[str, _T]:
    """The items of an object that has ``most`` at most, each as ``item`` returns it for its name and value."""
    if type(value) is not dict or len(value) > most:
        raise ValueError(f"{what} {_shown(value)} is no object of at most {most}")
    return {name: item(name, each) for name, each in value.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _shown(value: Any) -> str:
    if type(value) in (list, dict):
        return f"of {len(value)} items"
    shown = ascii(value) if type(value) in (str, int, float, bool) else type(value).__name__
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
