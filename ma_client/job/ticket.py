"""A push that goes on in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError

from ma_client.job.results import PushResult
from ma_client.process.threads import without_thread
from modelaverage.checks import check_timeout
from modelaverage.errors import DeadlineExceededError

__all__ = ["PushTicket"]


class PushTicket:
    """What `ParameterServerSession.begin_push` returns. May be used from any thread."""

    def __init__(self, push: Callable[[], PushResult], worker_id: str) -> None:
        """Begins a push in a thread of its own.

        Args:
            push: makes it.
            worker_id: names the thread and errors.

        Raises:
            ServerUnavailableError: no threads are left.
        """
        self._worker_id = worker_id
        self._future: Future[PushResult] = Future()

        def work() -> None:
            try:
                result = push()
            except BaseException as error:
                self._future.set_exception(error)
            else:
                self._future.set_result(result)

        try:
            threading.Thread(target=work, name=f"push-{worker_id}", daemon=True).start()
        except RuntimeError as error:
            raise without_thread(f"{worker_id} cannot push in the background", error) from error

    @property
    def done(self) -> bool:
        """Whether the round is over; `result` then returns, or raises, at once."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> PushResult:
        """Waits for the round, and returns its result; see `ParameterServerSession.push_and_average`.

        Args:
            timeout_s: how long to wait; 0: not at all; None: until the round is over.

        Raises:
            InvalidRequestError: ``timeout_s`` is negative or not a number.
            DeadlineExceededError: it is not over yet; it goes on, and `result` may be called again. Or the push ended
                with this error.
            ModelAverageError: the push failed; it may be made again.
        """
        check_timeout("timeout_s", timeout_s, zero="do not wait", none="no limit")
        try:
            return self._future.result(timeout_s)
        except NotYetError:
            if self._future.done():
                raise
            raise DeadlineExceededError(
                f"the push of {self._worker_id!r} is not over after {timeout_s:g} s; it goes on: ask again"
            ) from None
