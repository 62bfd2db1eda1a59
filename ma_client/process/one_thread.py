"""A session is for one thread at a time, until it is closed: other calls get an exception instead of breaking it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from modelaverage.errors import ModelAverageError, SessionInUseError

__all__ = ["OneThread", "by_one_thread", "session_closed"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_ONE_EACH = "a session is for one thread at a time; open another one for this thread, or hold a lock around every call"


def session_closed(owner: str) -> ModelAverageError:
    """The error of every call to a closed session, and of a call that its close has ended.

    Args:
        owner: the session's worker id.
    """
    return ModelAverageError(f"the session of {owner!r} is closed; open another one")


class OneThread:
    """Admits the calls of one thread, also nested ones (from a signal handler), and refuses those of other threads
    meanwhile, and all once the session is closed.

    Args:
        owner: the session's worker id, for the message.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lock = threading.RLock()
        self._is_closed = False
        self._under_way = ("", "", "")  # the thread, its call, and what to do instead

    @contextmanager
    def doing(self, what: str, instead: str = _ONE_EACH) -> Iterator[None]:
        """Makes a call.

        Args:
            what: the call.
            instead: what others should do that call meanwhile.

        Raises:
            SessionInUseError: another thread is in a call.
            ModelAverageError: the session is closed, or was closed during the call.
        """
        if self._is_closed:
            raise session_closed(self._owner)
        if not self._lock.acquire(blocking=False):
            thread, call, hint = self._under_way
            raise SessionInUseError(
                f"thread {threading.current_thread().name!r} called {what} on the session of {self._owner!r} while "
                f"thread {thread!r} was in its {call}: {hint}"
            )
        outer, self._under_way = self._under_way, (threading.current_thread().name, what, instead)
        try:
            yield
        except ModelAverageError as error:
            if self._is_closed and type(error) is ModelAverageError:  # other errors have causes of their own
                raise session_closed(self._owner) from error
            raise
        finally:
            self._under_way = outer
            self._lock.release()

    def close(self) -> None:
        """Refuses calls from now on. From any thread."""
        self._is_closed = True

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
