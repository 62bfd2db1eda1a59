"""The state of a server at one moment, as GetStatus returns it. The metrics and the commands read the same message.

All values are passed in, so this module does not know their owners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelaverage import wire
from modelaverage.chosen import NOTHING_CHOSEN, Chosen
from modelaverage.manifest import Manifest
from modelaverage.missing import Missing
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.observations import Observations
from ps_server.seen.roster import Roster
from ps_server.seen.traffic import Traffic

__all__ = ["CheckpointSeen", "JobSeen", "ServerSeen", "status_of"]

# The most workers in a status; with the longest names they take a fifth of a message.
_MAX_WORKERS_SHOWN = 2000


@dataclass(frozen=True)
class JobSeen:
    """The round in progress and earlier rounds.

    Args:
        manifest: the current manifest.
        global_step: the number of completed rounds.
        workers_finished: how many workers have finished.
        is_over: whether all workers have finished.
        connected_workers: how many workers have a push open.
        round_age_s: seconds since the first push of the round in progress.
        missing: the workers that the round waits for; None: no round is in progress.
        complete: workers whose push in that round is whole.
        given: how many fragments a worker has delivered in that round.
        chosen: the job's choices, as servers tell them.
    """

    manifest: Manifest
    global_step: int
    workers_finished: int
    is_over: bool
    connected_workers: int
    round_age_s: float
    missing: Missing | None
    complete: frozenset[str]
    given: Callable[[str], int]
    chosen: Chosen = NOTHING_CHOSEN


@dataclass(frozen=True)
class CheckpointSeen:
    """The newest checkpoint, and the one being written.

    Args:
        problem: why there is no checkpoint, or none newer; empty if there is no problem.
        step: the step of the newest; None: none was written.
        written_at_s: when it was written, on the server's clock.
        writing_since_s: since when one is being written; None: no write is in progress.
    """

    problem: str = ""
    step: int | None = None
    written_at_s: float | None = None
    writing_since_s: float | None = None


@dataclass(frozen=True)
class ServerSeen:
    """The state of a server besides its job.

    Args:
        num_workers: how many workers the job has.
        min_workers: how many workers a round needs at least.
        started_at_s: the start time, on the server's clock.
        is_stopping: whether the server was told to stop.
    """

    num_workers: int
    min_workers: int
    started_at_s: float
    is_stopping: bool = False


def status_of(
    server: ServerSeen,
    job: JobSeen | None,
    checkpoint: CheckpointSeen | None,
    roster: Roster,
    observations: Observations,
    traffic: Traffic,
    now_s: float,
) -> pb.GetStatusResponse:
    """Builds the status message.

    Args:
        server: the server's own state.
        job: None before there is a center.
        checkpoint: None if no checkpoints are written.
        roster: the workers.
        observations: measurements of rounds.
        traffic: bytes of fragments.
        now_s: the time, on the server's clock.
    """
    status = pb.GetStatusResponse(
        phase=pb.PHASE_UNINITIALIZED,
        num_workers=server.num_workers,
        min_workers=server.min_workers,
        received_bytes=traffic.received_bytes,
        sent_bytes=traffic.sent_bytes,
        received_raw_bytes=traffic.received_raw_bytes,
        sent_raw_bytes=traffic.sent_raw_bytes,
        shared_bytes=traffic.shared_bytes,
        uptime_s=now_s - server.started_at_s,
        rounds_committed=observations.rounds_committed,
        rounds_per_minute=observations.rounds_per_minute(now_s),
        pushes_retried=observations.pushes_retried,
        last_round_s=observations.last_round_s,
        rounds_restarted=observations.rounds_restarted,
        rounds_without_all=observations.rounds_without_all,
        stale_pushes=observations.stale_pushes,
    )
    if job is not None:
        _add_job(status, job)
    if checkpoint is not None:
        _add_checkpoint(status, checkpoint, now_s)
    if server.is_stopping:
        status.phase = pb.PHASE_STOPPING
    _add_workers(status, job, roster, now_s)
    return status


def _add_job(status: pb.GetStatusResponse, job: JobSeen) -> None:
    status.global_step = job.global_step
    status.model_size_bytes = job.manifest.size_bytes
    status.manifest_id = job.manifest.id
    shard = wire.shard_to_message(job.manifest.shard)
    if shard is not None:
        status.shard.CopyFrom(shard)
    status.workers_finished = job.workers_finished
    status.job_over = job.is_over
    status.connected_workers = job.connected_workers
    status.outer_optimizer, status.compression = job.chosen.outer_optimizer, job.chosen.compression
    status.round_age_s = job.round_age_s
    status.phase = pb.PHASE_IDLE if job.missing is None else pb.PHASE_AVERAGING
    if job.missing is not None:
        status.waiting_for.extend(job.missing.names)
        status.waiting_for_omitted = job.missing.omitted
        status.waiting_for_unknown = job.missing.unknown


def _add_checkpoint(status: pb.GetStatusResponse, checkpoint: CheckpointSeen, now_s: float) -> None:
    status.checkpoint_problem = checkpoint.problem
    if checkpoint.step is not None:
        status.checkpoint_step = checkpoint.step
    if checkpoint.written_at_s is not None:
        status.checkpoint_age_s = now_s - checkpoint.written_at_s
    if checkpoint.writing_since_s is not None:
        status.checkpoint_writing_s = now_s - checkpoint.writing_since_s


def _add_workers(status: pb.GetStatusResponse, job: JobSeen | None, roster: Roster, now_s: float) -> None:
    foremost = roster.foremost(_MAX_WORKERS_SHOWN)
    status.workers_omitted = len(roster.records) - len(foremost)
    for worker_id, record in foremost:
        status.workers.add(
            worker_id=worker_id,
            is_chief=record.is_chief,
            local_step=record.local_step,
            fragments_given=0 if job is None else job.given(worker_id),
            waiting=job is not None and worker_id in job.complete,
            last_seen_age_s=now_s - record.last_seen_at_s,
            nonfinite_values=record.nonfinite_values,
            pushes_counted=record.pushes_counted,
            lateness_s=record.lateness_s,
            loss=record.loss,
            transport=record.transport,
            peer=record.peer,
            has_finished=record.has_finished,
            has_left=record.has_left,
            interval_steps=record.interval_steps,
        )
