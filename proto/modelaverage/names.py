"""Names of workers as text. They come from outside: any text of up to 128 bytes, and any number of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

__all__ = ["MAX_NAMES", "file_name", "listed", "printable", "quoted", "shown"]

MAX_NAMES = 16
"""How many names a message, a line of the log or a view carries at most; the rest is counted."""
# Names may be long: once a list has this many characters, the rest is counted, too.
_MAX_CHARACTERS = 1000
# What can stand among other words without quotes: letters and digits of any script, and what host names and paths have.
_PLAIN = re.compile(r"[\w.:@/+~-]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_FILE_CHARACTERS = re.compile(r"[A-Za-z0-9_-]")


def quoted(name: str) -> str:
    """A name in quotes, on one line, with escapes for whatever cannot be printed."""
    return repr(name)


def shown(name: str) -> str:
    """A name as people like to read it: without quotes unless it needs them."""
    return name if _PLAIN.fullmatch(name) and name.isprintable() else quoted(name)


def printable(text: str) -> str:
    """Words from outside on one line, with escapes for whatever cannot be printed."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def file_name(name: str) -> str:
    """A name as that of a file: itself if it is plain; another for every other one, in any directory."""
    if _FILE_NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return "".join(_FILE_CHARACTERS.findall(name))[:40] + f"~{digest}"


def listed(names: Sequence[str], omitted: int = 0, show: Callable[[str], str] = quoted) -> str:
    """The first names, and how many more there are: ``'a', 'b' and 11,984 more``; empty if there are none.

    Args:
        names: as many as there are.
        omitted: how many more there are besides.
        show: how each is written.
    """
    words, characters = list[str](), 0
    for name in names[:MAX_NAMES]:
        word = show(name)
        if words and characters + len(word) > _MAX_CHARACTERS:
            break
        words.append(word)
        characters += len(word)
    more = omitted + len(names) - len(words)
    rest = [f"{more:,} more"] if more else []
    return " and ".join(filter(None, [", ".join(words), *rest]))
