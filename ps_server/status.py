"""Asks a running server for its status and shows it to people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from modelaverage import proxies, wire
from modelaverage.access import Access
from modelaverage.missing import Missing
from modelaverage.names import MAX_NAMES, printable, shown
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = [
    "NoAnswerError",
    "as_json",
    "as_text",
    "fetch",
    "missing_of",
    "phase_of",
    "plain",
    "shard_of",
    "size",
    "state_of",
    "trouble_of",
    "workers_of",
]

# From then on what the server says of a checkpoint that is being written is a problem.
_HANGS_FROM_S = 5.0
# JSON has no such numbers; these are the words of protobuf's own JSON.
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class NoAnswerError(Exception):
    """No parameter server answers at the address."""


def fetch(address: str, timeout_s: float, access: Access) -> pb.GetStatusResponse:
    """The status of the server at ``address``. Raises NoAnswerError, naming it, soon after ``timeout_s`` at most."""
    with access.channel(address) as channel:
        call = channel.unary_unary(
            f"/{wire.SERVICE}/GetStatus",
            request_serializer=pb.GetStatusRequest.SerializeToString,
            response_deserializer=pb.GetStatusResponse.FromString,
        )
        try:
            answer: pb.GetStatusResponse = call(
                pb.GetStatusRequest(), timeout=timeout_s, wait_for_ready=True, metadata=access.metadata
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                distrust = access.problem(address)
                raise NoAnswerError(
                    distrust
                    or f"no parameter server answers at {address} (waited {timeout_s:g} s){proxies.in_the_way(address)}"
                ) from None
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise NoAnswerError(f"{address}: {printable(error.details() or '')}") from None
            details = printable(error.details() or "")
            proxy = proxies.in_the_way(address)
            raise NoAnswerError(f"{address} did not answer as a parameter server: {details}{proxy}") from None
    return answer


def as_json(statuses: Sequence[pb.GetStatusResponse]) -> str:
    """Every field under its name in the protocol; numbers as numbers, bytes in hex. A list if there are several."""
    found = [plain(status) for status in statuses]
    return json.dumps(found if len(found) > 1 else found[0], indent=2)


def plain(message: Message) -> dict[str, Any]:
    """A message as what JSON knows, under the protocol's names; a field that is absent is None."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.enum_type is not None:
            found[field.name] = field.enum_type.values_by_number[value].name
        elif field.is_repeated:
            found[field.name] = [plain(item) if field.message_type else item for item in value]
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        elif field.message_type is not None:
            found[field.name] = plain(value)
        elif isinstance(value, float) and not math.isfinite(value):
            found[field.name] = _NOT_FINITE[repr(value)]
        else:
            found[field.name] = value.hex() if isinstance(value, bytes) else value
    return found


def as_text(status: pb.GetStatusResponse) -> str:
    """A few lines for people."""
    lines = [
        f"phase        {phase_of(status)}",
        f"global_step  {status.global_step}",
        f"workers      {_workers(status)}",
        f"model        {size(status.model_size_bytes)}{shard_of(status)}",
        f"received     {size(status.received_bytes)}, sent {size(status.sent_bytes)}",
        f"up           {status.uptime_s:.1f} s, last round {status.last_round_s:.3f} s, "
        f"{status.rounds_restarted} rounds restarted, {status.stale_pushes} stale pushes",
    ]
    if status.checkpoint_problem:
        lines.append(f"checkpoint   {trouble_of(status)}: {printable(status.checkpoint_problem)}")
    elif status.HasField("checkpoint_step"):
        lines.append(f"checkpoint   of global_step {status.checkpoint_step}")
    if status.phase == pb.PHASE_UNINITIALIZED:
        lines.append("waiting for  the chief, to initialize the center")
    if missing := missing_of(status):
        lines.append(f"waiting for  {missing} (for {status.round_age_s:.1f} s)")
    workers, more = workers_of(status)
    for worker in workers:
        notes = f", loss {worker.loss:.4g}" if worker.HasField("loss") else ""
        if worker.HasField("lateness_s"):
            notes += f", {worker.lateness_s:.2f} s late"
        notes += f", {worker.nonfinite_values} values not finite" if worker.nonfinite_values else ""
        chief = " (chief)" if worker.is_chief else ""
        lines.append(
            f"  {shown(worker.worker_id)}{chief}: {state_of(worker)}, local_step {worker.local_step}, "
            f"{worker.pushes_counted} pushes counted, last seen {worker.last_seen_age_s:.1f} s ago{notes}"
        )
    if more:
        lines.append(f"  and {more:,} more")
    return "\n".join(lines)


def phase_of(status: pb.GetStatusResponse) -> str:
    """What the server is doing, in a word."""
    return pb.Phase.Name(status.phase).removeprefix("PHASE_").lower()


def trouble_of(status: pb.GetStatusResponse) -> str:
    """What a problem with a checkpoint is, in a word: the disk does not answer, or it says no."""
    return "HANGS" if status.checkpoint_writing_s >= _HANGS_FROM_S else "FAILED"


def missing_of(status: pb.GetStatusResponse) -> str:
    """For whom the round waits; empty if it waits for nobody."""
    missing = Missing.told(status)
    return missing.text(shown) if missing else ""


def workers_of(status: pb.GetStatusResponse) -> tuple[list[pb.WorkerStatus], int]:
    """The workers to be shown, by name, and how many more there are. Those that have only pulled come last, and of
    these a few do: anybody who may read can make up any number of them."""
    pushers = [worker for worker in status.workers if _has_pushed(worker)]
    readers = [worker for worker in status.workers if not _has_pushed(worker)]
    return pushers + readers[:MAX_NAMES], status.workers_omitted + len(readers[MAX_NAMES:])


def state_of(worker: pb.WorkerStatus) -> str:
    """What a worker is doing, as far as the server can tell."""
    if worker.waiting:
        return "waits at the barrier"
    return f"has sent {worker.fragments_given} fragments" if worker.fragments_given else "computes"


def shard_of(status: pb.GetStatusResponse) -> str:
    """Which part of the model the server has; empty if it has the whole."""
    if not status.HasField("shard"):
        return ""
    return f", shard {status.shard.index} of {status.shard.count} of job {status.shard.job_id.hex()[:8]}"


def _has_pushed(worker: pb.WorkerStatus) -> bool:
    """Whether it has, or is the chief, which is about to."""
    return bool(worker.peer or worker.local_step or worker.pushes_counted or worker.waiting or worker.is_chief)


def _workers(status: pb.GetStatusResponse) -> str:
    if status.min_workers == status.num_workers:
        return f"{status.num_workers} in a round"
    return f"{status.num_workers}, at least {status.min_workers} in a round; {status.rounds_without_all} without all"


def size(size_bytes: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
