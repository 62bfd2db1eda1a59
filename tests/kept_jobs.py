"""Jobs whose server keeps its center on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.reading import Checkpoint, find_latest
from tests.conftest import RunningServer
from tests.jobs import Job
from tests.raw_client import Arrays, RawClient
from tests.test_server_process import ServerProcess

__all__ = ["job_of", "newest", "push_all"]


def push_all(job: Job, step: int, values: Arrays) -> tuple[pb.PushOutcome, bytes]:
    """A round of two workers; the first one's answer."""
    streams = [job.push(name, values, base_step=step, push_id=step) for name in ("a", "b")]
    answers = [stream.answer() for stream in streams]
    assert [outcome.global_step for outcome, _ in answers] == [step + 1] * 2
    assert all(outcome.outcome == pb.OUTCOME_COMMITTED for outcome, _ in answers)
    return answers[0]


@contextmanager
def job_of(server: RunningServer | ServerProcess) -> Iterator[Job]:
    with RawClient(server.address) as client:
        yield Job(client, server.address)


def newest(directory: Path) -> Checkpoint:
    found, _ = find_latest(directory)
    assert found is not None
    return found[1]
