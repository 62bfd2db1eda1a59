"""What a worker of the built-in workload says when a signal stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ma_client import ParameterServerSession
from modelaverage.errors import ModelAverageError
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.commands.stop_signals import StoppedBySignal

__all__ = ["consequence", "says_what_follows"]

_STATUS_TIMEOUT_S = 1.0


@contextmanager
def says_what_follows(session: ParameterServerSession, local_step: Callable[[], int], steps: int) -> Iterator[None]:
    """A context that adds to a stop how far the training has come, and what the server does without this worker.

    Args:
        session: this worker's; it is still open.
        local_step: this worker's count of local steps, when it stops.
        steps: how many there are to make.
    """
    try:
        yield
    except StoppedBySignal as stop:
        stop.progress = f"local step {local_step()} of {steps}"
        try:
            stop.progress += consequence(session.status(_STATUS_TIMEOUT_S), session.worker_id)
        except ModelAverageError:
            stop.progress += "; the server does not answer"
        raise


def consequence(status: pb.GetStatusResponse, worker_id: str) -> str:
    """What a server does when this worker leaves without having finished; empty if nothing depends on it."""
    finished = {worker.worker_id for worker in status.workers if worker.has_finished}
    if status.phase == pb.PHASE_UNINITIALIZED or status.job_over or worker_id in finished:
        return ""
    if status.min_workers == status.num_workers:
        return f"; the server waits for {worker_id} until it returns"
    return f"; rounds of {status.min_workers} workers or more go on without {worker_id}"
