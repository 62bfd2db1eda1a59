"""Asks a running server for its status and shows it to people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from modelaverage import wire
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["NoAnswerError", "as_json", "as_text", "fetch"]

# JSON has no such numbers; these are the words of protobuf's own JSON.
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class NoAnswerError(Exception):
    """No parameter server answers at the address."""


def fetch(address: str, timeout_s: float) -> pb.GetStatusResponse:
    """The status of the server at ``address``. Raises NoAnswerError, naming it, after ``timeout_s`` at most."""
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            f"/{wire.SERVICE}/GetStatus",
            request_serializer=pb.GetStatusRequest.SerializeToString,
            response_deserializer=pb.GetStatusResponse.FromString,
        )
        try:
            answer: pb.GetStatusResponse = call(pb.GetStatusRequest(), timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise NoAnswerError(f"no parameter server answers at {address} (waited {timeout_s:g} s)") from None
            raise NoAnswerError(f"{address} did not answer as a parameter server: {error.details()}") from None
    return answer


def as_json(statuses: Sequence[pb.GetStatusResponse]) -> str:
    """Every field under its name in the protocol; numbers as numbers, bytes in hex. A list if there are several."""
    plain = [_plain(status) for status in statuses]
    return json.dumps(plain if len(plain) > 1 else plain[0], indent=2)


def _plain(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.enum_type is not None:
            plain[field.name] = field.enum_type.values_by_number[value].name
        elif field.is_repeated:
            plain[field.name] = [_plain(item) if field.message_type else item for item in value]
        elif field.has_presence and not message.HasField(field.name):
            plain[field.name] = None
        elif field.message_type is not None:
            plain[field.name] = _plain(value)
        elif isinstance(value, float) and not math.isfinite(value):
            plain[field.name] = _NOT_FINITE[repr(value)]
        else:
            plain[field.name] = value.hex() if isinstance(value, bytes) else value
    return plain


def as_text(status: pb.GetStatusResponse) -> str:
    """A few lines for people."""
    phase = pb.Phase.Name(status.phase).removeprefix("PHASE_").lower()
    lines = [
        f"phase        {phase}",
        f"global_step  {status.global_step}",
        f"workers      {_workers(status)}",
        f"model        {_size(status.model_size_bytes)}{_shard(status)}",
        f"received     {_size(status.received_bytes)}, sent {_size(status.sent_bytes)}",
        f"up           {status.uptime_s:.1f} s, last round {status.last_round_s:.3f} s, "
        f"{status.rounds_restarted} rounds restarted, {status.stale_pushes} stale pushes",
    ]
    if status.checkpoint_problem:
        lines.append(f"checkpoint   FAILED: {status.checkpoint_problem}")
    elif status.HasField("checkpoint_step"):
        lines.append(f"checkpoint   of global_step {status.checkpoint_step}")
    if status.phase == pb.PHASE_UNINITIALIZED:
        lines.append("waiting for  the chief, to initialize the center")
    if status.waiting_for or status.waiting_for_unknown:
        missing = [_name(worker_id) for worker_id in status.waiting_for]
        if status.waiting_for_unknown:
            missing.append(f"{status.waiting_for_unknown} not heard of yet")
        lines.append(f"waiting for  {', '.join(missing) or 'nobody'} (for {status.round_age_s:.1f} s)")
    for worker in status.workers:
        state = "waits at the barrier" if worker.waiting else "computes"
        if worker.fragments_given and not worker.waiting:
            state = f"has sent {worker.fragments_given} fragments"
        notes = f", {worker.nonfinite_values} values not finite" if worker.nonfinite_values else ""
        chief = " (chief)" if worker.is_chief else ""
        lines.append(
            f"  {_name(worker.worker_id)}{chief}: {state}, local_step {worker.local_step}, "
            f"{worker.pushes_counted} pushes counted, last seen {worker.last_seen_age_s:.1f} s ago{notes}"
        )
    return "\n".join(lines)


def _shard(status: pb.GetStatusResponse) -> str:
    if not status.HasField("shard"):
        return ""
    return f", shard {status.shard.index} of {status.shard.count} of job {status.shard.job_id.hex()[:8]}"


def _workers(status: pb.GetStatusResponse) -> str:
    if status.min_workers == status.num_workers:
        return f"{status.num_workers} in a round"
    return f"{status.num_workers}, at least {status.min_workers} in a round; {status.rounds_without_all} without all"


def _name(worker_id: str) -> str:
    return worker_id if worker_id.isprintable() else repr(worker_id)


def _size(size_bytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
