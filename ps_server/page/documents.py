"""The JSON documents of the page and the table of rounds, from values. Pure; docs/observability.md describes them.

Times in the values are seconds on the server's clock; in the documents, `..._at` is Unix time and `..._s` a duration.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modelaverage import __version__
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console.status import Seen, plain
from ps_server.page.log_tail import LogEvent
from ps_server.seen.history import HistorySeen
from ps_server.seen.marks import Mark
from ps_server.seen.past_round import Losses, PastPush, PastRound
from ps_server.seen.sample import PageSample
from ps_server.seen.traffic import Traffic

__all__ = ["COLUMNS", "LATE_FROM_S", "Since", "next_since", "rounds_csv", "rounds_json", "status_json"]

LATE_FROM_S = 5.0
"""A worker that a round has waited for longer than this is late."""
# A row of the CSV. Names of workers are left out: spreadsheets take some texts for formulas.
COLUMNS = (
    "step",
    "count",
    "began_at",
    "committed_at",
    "took_s",
    "waiting_s",
    "receiving_s",
    "averaging_s",
    "received_bytes",
    "received_raw_bytes",
    "sent_bytes",
    "sent_raw_bytes",
    "loss",
    "loss_min",
    "loss_max",
    "nonfinite_values",
)


@dataclass(frozen=True)
class Since:
    """What a reader has already.

    Args:
        step: it lacks the rounds from this one on.
        mark: it has the marks up to this number; None: those before ``step``.
    """

    step: int = 0
    mark: int | None = None

    def lacks(self, mark: Mark) -> bool:
        """Whether the reader lacks this mark."""
        return mark.step >= self.step if self.mark is None else mark.number > self.mark


def status_json(
    sample: PageSample, address: str, epoch_at: float, events: Sequence[LogEvent], others: Sequence[Seen] = ()
) -> bytes:
    """The state of the server.

    Args:
        sample: the state.
        address: where workers reach the server.
        epoch_at: the Unix time at which the server's clock was 0.
        events: of the log, the newest last.
        others: what is known of the job's other servers.
    """
    status, history = sample.status, sample.history
    shard = {"index": status.shard.index, "count": status.shard.count} if status.HasField("shard") else None
    return _encoded(
        {
            "now_at": epoch_at + sample.now_s,
            "server": {
                "version": __version__,
                "address": address,
                "started_at": epoch_at + sample.started_at_s,
                "first_step": history.first_step,
                "restored": history.is_restored,
                "shard": {"index": 0, "count": 1} if shard is None else shard,
            },
            "status": plain(status),
            "waiting": list(_waiting(status)),
            "traffic": {"by_transport": _by_transport(sample.traffic)},
            "shards": [_shard(each) for each in (Seen(address, status), *others)] if others else [],
            "events": [_event(event) for event in events],
        }
    ).encode()


def rounds_json(seen: HistorySeen, global_step: int, epoch_at: float, since: Since) -> Iterator[bytes]:
    """The past rounds that a reader lacks, in parts, so that no part takes long.

    Args:
        seen: the history.
        global_step: of the server.
        epoch_at: the Unix time at which the server's clock was 0.
        since: what the reader has.
    """
    head = {
        "first_step": seen.first_step,
        "next_step": global_step,
        "detailed_from": global_step if seen.detailed_from is None else seen.detailed_from,
        "kept_from": seen.rounds[0].step if seen.rounds else global_step,
        "whole": since == Since(),
        "marks": [_mark(mark, epoch_at) for mark in seen.marks if since.lacks(mark)],
    }
    yield f'{_encoded(head)[:-1]}, "rounds": ['.encode()
    comma = ""
    for each in _lacking(seen, since):
        yield f"{comma}{_encoded(_round(each, epoch_at))}".encode()
        comma = ", "
    yield b"]}"


def next_since(seen: HistorySeen) -> Since:
    """What a reader of everything has then."""
    step = seen.rounds[-1].last_step + 1 if seen.rounds else 0
    return Since(step, seen.marks[-1].number if seen.marks else 0)


def rounds_csv(seen: HistorySeen, epoch_at: float) -> bytes:
    """All rounds as a table with a line of titles, RFC 4180; numbers only."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for each in seen.rounds:
        row = _round(each, epoch_at)
        table.writerow("" if row[column] is None else row[column] for column in COLUMNS)
    return text.getvalue().encode()


def _lacking(seen: HistorySeen, since: Since) -> Iterable[PastRound]:
    return (each for each in seen.rounds if each.last_step >= since.step)


def _waiting(status: pb.GetStatusResponse) -> Iterator[dict[str, Any]]:
    for worker_id in status.waiting_for:
        yield {
            "worker_id": worker_id,
            "for_s": status.round_age_s,
            "is_late": status.round_age_s > LATE_FROM_S,
        }


def _shard(seen: Seen) -> dict[str, Any]:
    status = None
    if seen.status is not None:
        status = plain(seen.status)
        del status["workers"]  # the same on every server
    return {"address": seen.address, "problem": seen.problem, "away_s": seen.away_s, "status": status}


def _by_transport(traffic: Traffic) -> dict[str, int]:
    """Bytes received and sent, by the way they took."""
    beside = traffic.aside_bytes + traffic.shared_bytes
    return {
        "messages": traffic.received_bytes + traffic.sent_bytes - beside,
        "data_connection": traffic.aside_bytes,
        "shared_memory": traffic.shared_bytes,
    }


def _event(event: LogEvent) -> dict[str, Any]:
    return {"id": event.number, "at": event.at, "level": event.level, "name": event.name, "text": event.text}


def _mark(mark: Mark, epoch_at: float) -> dict[str, Any]:
    return {
        "id": mark.number,
        "at": epoch_at + mark.at_s,
        "step": mark.step,
        "kind": mark.kind.value,
        "worker_id": mark.worker_id,
    }


def _round(each: PastRound, epoch_at: float) -> dict[str, Any]:
    found = {
        "step": each.step,
        "count": each.rounds,
        "began_at": epoch_at + each.began_at_s,
        "committed_at": epoch_at + each.committed_at_s,
        "took_s": each.took_s / each.rounds,
        "waiting_s": each.waiting_s / each.rounds,
        "receiving_s": each.receiving_s / each.rounds,
        "averaging_s": each.averaging_s / each.rounds,
        "received_bytes": each.moved.received_bytes,
        "received_raw_bytes": each.moved.received_raw_bytes,
        "sent_bytes": each.moved.sent_bytes,
        "sent_raw_bytes": each.moved.sent_raw_bytes,
        **_losses(each.losses),
        "nonfinite_values": each.nonfinite_values,
    }
    if each.has_detail:
        found["workers"] = [_push(push) for push in each.pushes]
        found["workers_omitted"] = each.pushes_omitted
        found["without"] = each.without
        found["without_omitted"] = each.without_omitted
    return found


def _losses(losses: Losses) -> dict[str, Any]:
    if not losses.told:
        return {"loss": None, "loss_min": None, "loss_max": None}
    mean = losses.total / losses.told
    return {"loss": _number(mean), "loss_min": _number(losses.least), "loss_max": _number(losses.most)}


def _push(push: PastPush) -> dict[str, Any]:
    return {
        "worker_id": push.worker_id,
        "pushed_s": push.pushed_s,
        "whole_s": push.whole_s,
        "loss": None if push.loss is None else _number(push.loss),
        "local_step": push.local_step,
        "nonfinite_values": push.nonfinite_values,
    }


def _number(value: float) -> float | str:
    """A number; one that JSON lacks as a word, as in the status."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _encoded(value: Any) -> str:
    # Names are hostile: escaped to ASCII, none of them can end a line of a stream or hide in a log.
    return json.dumps(value, allow_nan=False, ensure_ascii=True)
