"""A line for a person who waits: it is printed only if something takes long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["SLOW_AFTER_S", "says_if_slow"]

SLOW_AFTER_S = 2.0


@contextmanager
def says_if_slow(
    say: Callable[[str], object], text: str, is_needed: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """A context; if it lasts longer than `SLOW_AFTER_S`, says the text once, from another thread.

    Args:
        say: prints a line.
        text: what goes on.
        is_needed: asked then; False: it says nothing.
    """

    def tell() -> None:
        if is_needed():
            say(f"{text} ({SLOW_AFTER_S:g} s so far)")

    timer = threading.Timer(SLOW_AFTER_S, tell)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no threads are left: wait in silence
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
