"""Text for a terminal of a given width: how many columns it takes, and what is left out to make it fit."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from modelaverage.names import MAX_NAMES

__all__ = ["fitted", "listed_within", "padded", "shortened", "size", "width"]

_ELLIPSIS = "…"


def width(text: str) -> int:
    """How many columns printable ``text`` takes: some letters take two, combining accents none."""
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def shortened(text: str, columns: int) -> str:
    """``text``, at most ``columns`` wide. If it is longer, … replaces its middle: names often differ at the end."""
    if width(text) <= columns:
        return text
    room = max(0, columns - 1)
    head = _within(text, room - room // 2)
    tail = _within(text[::-1], room // 2)[::-1]
    return f"{head}{_ELLIPSIS}{tail}"


def padded(text: str, columns: int, right: bool = False) -> str:
    """``text``, padded to ``columns`` with spaces after it (``right``: before it)."""
    spaces = " " * (columns - width(text))
    return spaces + text if right else text + spaces


def fitted(parts: Sequence[str], columns: int | None, separator: str = ", ") -> str:
    """The first ``parts`` that fit; at least the first one, shortened if need be. With ``columns`` None: all."""
    if columns is None:
        return separator.join(parts)
    text = shortened(parts[0], columns)
    for part in parts[1:]:
        longer = text + separator + part
        if width(longer) > columns:
            break
        text = longer
    return text


def listed_within(
    names: Sequence[str], omitted: int, show: Callable[[str], str], columns: int | None, widest: int | None = None
) -> str:
    """The first names that fit, and how many more there are: ``a, b and 12 more``; empty if there are none.

    Args:
        names: any number of them.
        omitted: how many more there are that are not in ``names``.
        show: how each is written.
        columns: for the whole text; None: any number.
        widest: columns of one name; None: any number.
    """
    words = [show(name) for name in names[:MAX_NAMES]]
    if widest is not None:
        words = [shortened(word, widest) for word in words]
    for count in range(len(words), 0, -1):
        more = omitted + len(names) - count
        rest = f" and {more:,} more" if more else ""
        text = ", ".join(words[:count]) + rest
        if columns is None or width(text) <= columns:
            return text
        if count == 1:  # at least one name, shortened to the room that there is
            return shortened(words[0], max(1, columns - len(rest))) + rest
    return f"{omitted:,} more" if omitted else ""


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _within(text: str, columns: int) -> str:
    taken = 0
    for at, character in enumerate(text):
        taken += _columns(character)
        if taken > columns:
            return text[:at]
    return text


def size(size_bytes: int) -> str:
    """A number of bytes for people, such as "1.5 MiB"."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
