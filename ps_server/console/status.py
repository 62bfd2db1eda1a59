"""Asks a running server for its status and shows it."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from modelaverage import wire
from modelaverage.access import proxies
from modelaverage.access.absence import no_answer
from modelaverage.access.channels import Access
from modelaverage.chosen import CHOICES, compression_of
from modelaverage.commands.columns import fitted, listed_within, shortened, size, width
from modelaverage.missing import Missing
from modelaverage.names import printable, shown
from modelaverage.outer import AVERAGE
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.worker_table import age, worker_table

__all__ = [
    "NoAnswerError",
    "Seen",
    "as_json",
    "as_text",
    "compression_in",
    "differing_choices",
    "fetch",
    "intervals_of",
    "missing_of",
    "moved_of",
    "outer_optimizer_of",
    "phase_of",
    "plain",
    "shard_of",
    "trouble_of",
    "workers_in_round",
]

# A checkpoint that takes longer to write is shown as a problem.
_HANGS_FROM_S = 5.0
_TITLE_COLUMNS = 13
# Rows that are wrapped; the others are shortened.
_SENTENCES = ("checkpoint", "moved")
_INDENT = "  "
# Nothing is made narrower than this.
_NARROWEST = 12
_NAME_COLUMNS = 24
# JSON lacks these numbers; protobuf's JSON uses these words.
_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class NoAnswerError(Exception):
    """No parameter server answers at the address."""


@dataclass(frozen=True)
class Seen:
    """What is known about one server.

    Args:
        address: of the server.
        status: its last answer; None: it has never answered.
        problem: why it does not answer now; empty if it does.
        away_s: for how long it has not answered.
    """

    address: str
    status: pb.GetStatusResponse | None = None
    problem: str = ""
    away_s: float = 0.0


def fetch(address: str, timeout_s: float, access: Access) -> pb.GetStatusResponse:
    """The status of the server at ``address``. Raises NoAnswerError, at the latest shortly after ``timeout_s``."""
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
                raise NoAnswerError(distrust or no_answer(address, timeout_s)) from None
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise NoAnswerError(f"{address}: {printable(error.details() or '')}") from None
            details = printable(error.details() or "")
            proxy = proxies.in_the_way(address)
            raise NoAnswerError(f"{address} did not answer as a parameter server: {details}{proxy}") from None
    return answer


def as_json(statuses: Sequence[pb.GetStatusResponse]) -> str:
    """All fields by their names in the protocol; numbers as numbers, bytes in hex. A list if there are several."""
    found = [plain(status) for status in statuses]
    return json.dumps(found if len(found) > 1 else found[0], indent=2)


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON types, by the protocol's names; an absent field is None."""
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


def as_text(status: pb.GetStatusResponse, columns: int | None = None) -> str:
    """A few lines for people.

    Args:
        status: of a server.
        columns: how wide they may be; None: any width.
    """
    room = None if columns is None else max(_NARROWEST, columns - _TITLE_COLUMNS)
    trouble = [f"{status.rounds_restarted} rounds restarted", f"{status.stale_pushes} stale pushes"]
    rows = [
        ("phase", phase_of(status)),
        ("global_step", str(status.global_step)),
        ("workers", fitted(workers_in_round(status), room)),
        ("model", fitted([f"{size(status.model_size_bytes)}{shard_of(status)}"], room)),
        ("moved", ", ".join(moved_of(status))),
        ("up", fitted([f"{status.uptime_s:.1f} s", f"last round {status.last_round_s:.3f} s", *trouble], room)),
    ]
    if status.checkpoint_problem:
        rows.append(("checkpoint", f"{trouble_of(status)}: {printable(status.checkpoint_problem)}"))
    elif status.HasField("checkpoint_step"):
        rows.append(("checkpoint", f"of global_step {status.checkpoint_step}"))
    if status.phase == pb.PHASE_UNINITIALIZED:
        rows.append(("waiting for", "the chief, to initialize the center"))
    since = f" (for {age(status.round_age_s)})"
    if missing := missing_of(status, None if room is None else room - width(since)):
        rows.append(("waiting for", f"{missing}{since}"))
    if outer := outer_optimizer_of(status):
        rows.append(("outer", fitted([outer], room)))
    if compression := compression_in(status):
        rows.append(("compression", fitted([compression], room)))
    lines = [
        line
        for title, text in rows
        for line in (_wrapped(title, text, room) if title in _SENTENCES else [f"{title:<{_TITLE_COLUMNS}}{text}"])
    ]
    if differ := intervals_of(status, columns):
        lines.append(differ)
    table = worker_table(status, None if columns is None else columns - len(_INDENT))
    return "\n".join([*lines, *(_INDENT + row.text for row in table)])


def phase_of(status: pb.GetStatusResponse) -> str:
    """The server's phase, in a word."""
    return pb.Phase.Name(status.phase).removeprefix("PHASE_").lower()


def trouble_of(status: pb.GetStatusResponse) -> str:
    """What is wrong with a checkpoint, in a word: the disk does not answer, or writing failed."""
    return "HANGS" if status.checkpoint_writing_s >= _HANGS_FROM_S else "FAILED"


def missing_of(status: pb.GetStatusResponse, columns: int | None = None) -> str:
    """The workers that the round waits for; empty if there are none.

    Args:
        status: of a server.
        columns: how wide the text may be, which then has only names; None: any width, with what is known about each.
    """
    missing = Missing.told(status)
    if columns is None:
        return missing.text(shown) if missing else ""
    unknown = missing.unknown_text
    room = columns - (len(unknown) + 2 if unknown else 0)
    known = listed_within(status.waiting_for, status.waiting_for_omitted, shown, room, max(_NAME_COLUMNS, room // 2))
    return ", ".join(filter(None, (known, unknown)))


def intervals_of(status: pb.GetStatusResponse, columns: int | None = None) -> str:
    """How many local steps each worker makes between two rounds, if the numbers differ; otherwise empty.

    Args:
        status: of a server.
        columns: how wide the text may be; None: any width.
    """
    steps = {worker.worker_id: worker.interval_steps for worker in status.workers if worker.interval_steps}
    if len(set(steps.values())) < 2:
        return ""
    # One worker for each number comes first: if there are many, some are left out.
    firsts = {interval: name for name, interval in reversed(steps.items())}
    names = sorted(steps, key=lambda name: (firsts[steps[name]] != name, name))
    head = "interval_steps differ: "
    room = None if columns is None else columns - len(head)

    def show(name: str) -> str:
        return f"{shown(name) if room is None else shortened(shown(name), _NAME_COLUMNS)} {steps[name]}"

    return head + listed_within(names, 0, show, room)


def moved_of(status: pb.GetStatusResponse) -> list[str]:
    """The bytes of fragments received and sent: on the wire, and before coding where that is another number."""
    found = list[str]()
    for what in ("received", "sent"):
        moved, raw = getattr(status, f"{what}_bytes"), getattr(status, f"{what}_raw_bytes")
        before = f" ({size(raw)} before coding)" if raw not in (0, moved) else ""  # 0: of an older server
        found.append(f"{size(moved)} {what}{before}")
    return found


def outer_optimizer_of(status: pb.GetStatusResponse) -> str:
    """The outer optimizer of the server's center; empty if there is no center yet."""
    if status.phase == pb.PHASE_UNINITIALIZED:
        return ""
    return printable(status.outer_optimizer or AVERAGE.name)


def compression_in(status: pb.GetStatusResponse) -> str:
    """How workers and server encode a round's bytes, "none" for raw; empty if there is no center yet."""
    return "" if status.phase == pb.PHASE_UNINITIALIZED else compression_of(status.compression)


_SHOWN = {"outer_optimizer": outer_optimizer_of, "compression": compression_in}


def differing_choices(servers: Sequence[Seen]) -> list[str]:
    """A warning for each choice, such as the outer optimizer, that is not the same on all servers of one job."""
    return [warning for choice in CHOICES if (warning := _differing(servers, choice.noun, _SHOWN[choice.field]))]


def _differing(servers: Sequence[Seen], noun: str, shown_of: Callable[[pb.GetStatusResponse], str]) -> str:
    jobs = dict[bytes, dict[str, str]]()
    for server in servers:
        if server.status is not None and server.status.HasField("shard") and (text := shown_of(server.status)):
            jobs.setdefault(server.status.shard.job_id, {})[server.address] = text
    differing = [found for found in jobs.values() if len(set(found.values())) > 1]
    each = "; ".join(f"{address} has {text}" for found in differing for address, text in found.items())
    return each and f"{noun.upper()}S DIFFER within one job: {each}"


def workers_in_round(status: pb.GetStatusResponse) -> list[str]:
    """How many workers there are, and how many of them rounds still need."""
    finished = status.workers_finished
    if status.job_over:
        return [f"all {status.num_workers} have finished", "the job is over", "a new one may begin with this center"]
    if finished:
        have = "has" if finished == 1 else "have"
        left = max(0, status.num_workers - finished)
        parts = [f"{finished} of {status.num_workers} {have} finished; rounds go on with {left}"]
    else:
        parts = [f"{status.num_workers} in a round"]
    if status.min_workers != status.num_workers:
        parts.append(f"at least {status.min_workers} in a round" if finished else f"at least {status.min_workers}")
        parts.append(f"{status.rounds_without_all} rounds without all")
    return parts


def shard_of(status: pb.GetStatusResponse) -> str:
    """The server's shard; empty if it has the whole model."""
    if not status.HasField("shard"):
        return ""
    return f", shard {status.shard.index} of {status.shard.count} of job {status.shard.job_id.hex()[:8]}"


def _wrapped(title: str, text: str, columns: int | None) -> list[str]:
    """A sentence, wrapped to the width."""
    lines = [text] if columns is None else textwrap.wrap(text, columns, break_on_hyphens=False) or [""]
    return [f"{title if at == 0 else '':<{_TITLE_COLUMNS}}{line}" for at, line in enumerate(lines)]
