"""A session is for one thread at a time: a second thread gets an exception instead of breaking the session."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from modelaverage.errors import SessionInUseError

__all__ = ["OneThread", "by_one_thread"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ONE_EACH = "a session is for one thread at a time; open another one for this thread, or hold a lock around every call"


class OneThread:
    """Admits the calls of one thread, also nested ones (from a signal handler), and refuses those of other threads
    meanwhile.

    Args:
        owner: the session's worker id, for the message.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.RLock()
        self._under_way = ("", "", "")  # the thread, its call, and what to do instead

    @contextmanager
    def doing(self, what: str, instead: str = _ONE_EACH) -> Iterator[None]:
        """Raises SessionInUseError if another thread is in a call.

        Args:
            what: the call.
            instead: what others should do that call meanwhile.
        """
        if not self._lock.acquire(blocking=False):
            thread, call, hint = self._under_way
            raise SessionInUseError(
                f"thread {threading.current_thread().name!r} called {what} on the session of {self._owner!r} while "
                f"thread {thread!r} was in its {call}: {hint}"
            )
        outer, self._under_way = self._under_way, (threading.current_thread().name, what, instead)
        try:
            yield
        finally:
            self._under_way = outer
            self._lock.release()

    @contextmanager
    def ending(self, timeout_s: float) -> Iterator[None]:
        """For closing the session: begins when another thread's call is over, or after this time."""
        is_over = self._lock.acquire(timeout=timeout_s)
        try:
            yield
        finally:
            if is_over:
                self._lock.release()


class _Guarded(Protocol):
    _one_thread: OneThread


_S = TypeVar("_S", bound=_Guarded)


def by_one_thread(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Decorates a method for one thread at a time; its object has a OneThread in ``_one_thread``."""

    @functools.wraps(method)
    def guarded(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._one_thread.doing(method.__name__):
            return method(self, *args, **kwargs)

    return guarded
