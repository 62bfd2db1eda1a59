"""Names of workers as text. Clients choose them: any text of up to 128 bytes, and any number of names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

__all__ = ["MAX_NAMES", "file_name", "listed", "printable", "quoted", "shown"]

MAX_NAMES = 16
"""The most names in a message, a line of the log or a view; the others are only counted."""
# Names can be long: once a list has this many characters, the other names are only counted.
_MAX_CHARACTERS = 1000
# Needs no quotes: letters and digits of any script, and the characters of host names and paths.
_PLAIN = re.compile(r"[\w.:@/+~-]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}")
_FILE_CHARACTERS = re.compile(r"[A-Za-z0-9_-]")


def quoted(name: str) -> str:
    """A name in quotes, on one line, with escapes for unprintable characters."""
    return repr(name)


def shown(name: str) -> str:
    """A name in quotes only if it needs them."""
    return name if _PLAIN.fullmatch(name) and name.isprintable() else quoted(name)


def printable(text: str) -> str:
    """Untrusted text on one line, with escapes for unprintable characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def file_name(name: str) -> str:
    """A file name for a worker's name: the name itself if it is plain, otherwise one that is unique to it."""
    if _FILE_NAME.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return "".join(_FILE_CHARACTERS.findall(name))[:40] + f"~{digest}"


def listed(names: Sequence[str], omitted: int = 0, show: Callable[[str], str] = quoted) -> str:
    """The first names, and how many more there are: ``'a', 'b' and 11,984 more``; empty if there are none.

    Args:
        names: any number of them.
        omitted: how many more there are that are not in ``names``.
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
