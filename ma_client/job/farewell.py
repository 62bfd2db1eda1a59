"""A finished worker's wait for those that still train."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from modelaverage.errors import DeadlineExceededError, ServerUnavailableError
from modelaverage.logs import event
from modelaverage.names import MAX_NAMES, listed
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["wait_until_all_have_finished"]

_log = logging.getLogger("ma_client")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_FIRST_NOTICE_S = 5.0


def wait_until_all_have_finished(
    statuses: Callable[[], Sequence[pb.GetStatusResponse]], worker_id: str, timeout_s: float
) -> bool:
    """Polls the servers; logs which workers it waits for, after 5 s and at growing intervals.

    Args:
        statuses: returns the status of each server.
        worker_id: this worker. A server that no longer counts it as finished has begun another run.
        timeout_s: the longest wait.

    Returns:
        Whether all workers have finished. False: the wait timed out, or a server does not answer.
    """
    began_at_s = time.monotonic()
    pause_s, notice_s = _FIRST_PAUSE_S, _FIRST_NOTICE_S
    while True:
        try:
            found = statuses()
        except (ServerUnavailableError, DeadlineExceededError) as error:
            what = event("finish_awaited", workers=[], waited_s=time.monotonic() - began_at_s)
            _log.warning("no longer waits for the others to finish: %s", error, extra=what)
            return False
        training = [status for status in found if not _is_over(status, worker_id)]
        if not training:
            return True
        waited_s = time.monotonic() - began_at_s
        if waited_s >= min(notice_s, timeout_s):
            names = sorted(worker.worker_id for worker in training[0].workers if _trains(worker))
            count = training[0].num_workers - training[0].workers_finished
            whom = listed(names, max(0, count - len(names))) or f"{count} workers"
            over = waited_s >= timeout_s
            what = event("finish_awaited", workers=names[:MAX_NAMES], waited_s=waited_s)
            rest = "; the center goes on without this worker" if over else ""
            _log.warning("has waited %.0f s for %s to finish%s", waited_s, whom, rest, extra=what)
            notice_s = 2 * notice_s + _FIRST_NOTICE_S
            if over:
                return False
        time.sleep(max(0.0, min(pause_s, timeout_s - waited_s)))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_over(status: pb.GetStatusResponse, worker_id: str) -> bool:
    own = next((worker for worker in status.workers if worker.worker_id == worker_id), None)
    return status.job_over or (own is not None and not own.has_finished)


def _trains(worker: pb.WorkerStatus) -> bool:
    return bool(worker.peer or worker.is_chief) and not worker.has_finished
