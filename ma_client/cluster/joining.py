"""A task index from the server, for a process whose launcher has none for it: asked for once, held until it ends."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass

from ma_client.process.threads import without_thread
from ma_client.transports.absence import NoticePace, connect
from ma_client.transports.connection import Connection
from ma_client.transports.registry import TransportSettings
from ma_client.transports.timing import TIMING, Timing
from modelaverage.access.channels import Access
from modelaverage.access.security import Security
from modelaverage.errors import DeadlineExceededError, ModelAverageError, ServerUnavailableError
from modelaverage.logs import event
from modelaverage.runtime.deadline import Deadline
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["TaskPlace", "join"]

_log = logging.getLogger("ma_client")
_PAUSE_S = 0.5
_GOODBYE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class TaskPlace:
    """What a server has given to this process.

    Args:
        task_index: which worker it is.
        num_workers: how many there are.
    """

    task_index: int
    num_workers: int


class _HeldPlace:
    """Holds the place that a server gives: comes back for it when the connection breaks, says goodbye at the end."""

    def __init__(self, address: str, access: Access, timeout_s: float, timing: Timing) -> None:
        self._address = address
        self._connection = Connection(address, access, TransportSettings(timing=timing))
        self._incarnation = uuid.uuid4().bytes
        self._place = Future[TaskPlace]()
        self._trouble = f"{address} has not given one"
        self._thread = threading.Thread(target=self._hold, name="ma_client-join", daemon=True)
        try:
            connect(self._connection, timeout_s)
            self._thread.start()
        except RuntimeError as error:
            self._connection.close()
            raise without_thread(f"no task index can be held at {address}", error) from None
        except BaseException:
            self._connection.close()
            raise

    def place(self, deadline: Deadline) -> TaskPlace:
        """Waits for it."""
        began_at_s, pace = time.monotonic(), NoticePace(self._connection.timing)
        while True:
            due_in_s = max(0.0, began_at_s + pace.due_s - time.monotonic())
            left_s = deadline.left_s
            try:
                return self._place.result(due_in_s if left_s is None else min(due_in_s, left_s))
            except NotYetError:
                if self._place.done():
                    raise
                if deadline.is_over:
                    message = f"no task index within {deadline.timeout_s:g} s: {self._trouble}"
                    raise DeadlineExceededError(message) from None
            self._say_that_it_waits(pace.due_s)
            pace.said()

    def _say_that_it_waits(self, waited_s: float) -> None:
        what = event("task_index_waits", peer=self._address, cause=self._trouble)
        _log.warning("has waited %.0f s for a task index: %s", waited_s, self._trouble, extra=what)

    def end(self) -> None:
        """Gives the place back."""
        if self._place.done() and self._place.exception() is None:
            worker_id = f"worker-{self._place.result().task_index}"
            with contextlib.suppress(ModelAverageError):
                self._connection.leave(
                    pb.LeaveRequest(worker_id=worker_id, incarnation=self._incarnation), Deadline(_GOODBYE_TIMEOUT_S)
                )
        self._connection.stop()
        self._thread.join(_GOODBYE_TIMEOUT_S)
        self._connection.close()

    def _hold(self) -> None:
        while not self._connection.stopped.is_set():
            try:
                self._stay()
            except ServerUnavailableError as error:
                self._trouble = str(error)
                _log.debug(
                    "task index: %s", error, extra=event("task_index_waits", peer=self._address, cause=str(error))
                )
            except ModelAverageError as error:
                if not self._connection.stopped.is_set():
                    self._fail(error)
                return
            self._connection.stopped.wait(_PAUSE_S)

    def _stay(self) -> None:
        request = pb.JoinRequest(incarnation=self._incarnation)
        if self._place.done():
            request.task_index = self._place.result().task_index
        for response in self._connection.join(request):
            if not response.HasField("task_index"):
                self._trouble = (
                    f"all {response.num_workers} of {self._address} are taken; start no more workers than its "
                    "--num-workers, or wait until one that has left gives its index back"
                )
                _log.warning(
                    "waiting for a task index: %s",
                    self._trouble,
                    extra=event("task_index_waits", peer=self._address, cause=self._trouble),
                )
            elif not self._place.done():
                self._place.set_result(TaskPlace(response.task_index, response.num_workers))

    def _fail(self, error: ModelAverageError) -> None:
        if self._place.done():
            _log.warning(
                "the task index is no longer held for this process: %s",
                error,
                extra=event("task_index_lost", peer=self._address, cause=str(error)),
            )
        else:
            self._place.set_exception(error)


_holders: dict[tuple[int, str], _HeldPlace] = {}
_lock = threading.Lock()


def join(address: str, timeout_s: float, security: Security | None = None, timing: Timing = TIMING) -> TaskPlace:
    """The place of this process in the job of a server, the same whenever it asks.

    The place is another process's again soon after this one has ended: at once after a normal end, after some seconds
    when it was killed.

    Args:
        address: of the parameter server; of the first one if there are several.
        timeout_s: how long to wait for the server, and for an index that is free.
        security: as a session's; None: what the environment says.
        timing: how soon a wait is said.

    Raises:
        SecurityError: a file is missing or unusable, or the server does not let this process in.
        DeadlineExceededError: there was none in time; names what it waited for.
        ServerUnavailableError: no parameter server answers there in time.
    """
    key = os.getpid(), address  # a forked process is another worker, or none
    deadline = Deadline(timeout_s)
    with _lock:
        holder = _holders.get(key)
        if holder is None:
            access = Access(Security.from_env() if security is None else security)
            holder = _holders[key] = _HeldPlace(address, access, timeout_s, timing)
            atexit.register(_end, key)
    try:
        return holder.place(deadline)
    except ModelAverageError:
        _end(key)
        raise


def _end(key: tuple[int, str]) -> None:
    with _lock:
        holder = _holders.pop(key, None) if key[0] == os.getpid() else None
    if holder is not None:
        holder.end()
