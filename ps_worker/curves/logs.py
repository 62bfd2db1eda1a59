"""Reads what workers have logged: rounds in the directory that MA_ROUND_LOG names, or the events of the built-in
workload."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ma_client.files.round_log import SUFFIX, LoggedRound
from ps_worker.curves.curve import Curve, Point, curve_of
from ps_worker.curves.metrics import curves_of
from ps_worker.events.parse import Event, decode

__all__ = ["curves_in", "curves_of_files"]


def curves_in(directory: Path) -> list[Curve]:
    """A curve for each worker with a file there, by name; empty: there is no such directory, or no round in it.

    Raises:
        OSError: a file cannot be read.
    """
    return curves_of_files(sorted(directory.glob(f"*{SUFFIX}")))


def curves_of_files(paths: Iterable[Path]) -> list[Curve]:
    """A curve for each worker with a round in these files. Half a line, which a full disk leaves, and lines of other
    kinds are passed over. Raises OSError."""
    rounds, events = list[LoggedRound](), list[Event]()
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                try:
                    rounds.append(LoggedRound.from_line(line))
                except ValueError:
                    events += _events(line)
    return [*_curves(rounds), *curves_of(events)]


def _events(line: bytes) -> list[Event]:
    try:
        return [decode(line.decode("utf-8"))]
    except ValueError:
        return []


def _curves(rounds: Sequence[LoggedRound]) -> list[Curve]:
    workers = defaultdict[str, list[LoggedRound]](list)
    for each in rounds:
        workers[each.worker].append(each)
    counts_rounds = not any(each.local_step for each in rounds)
    return [_curve(name, workers[name], counts_rounds) for name in sorted(workers, key=_by_number)]


def _curve(name: str, rounds: Sequence[LoggedRound], counts_rounds: bool) -> Curve:
    points = [
        Point(
            step=each.global_step if counts_rounds else each.local_step,
            unix_time_s=each.unix_time_s,
            moved_bytes=each.sent_bytes + each.received_bytes,
            loss=math.nan if each.loss is None else each.loss,
            session=each.session,
        )
        for each in rounds
    ]
    began_at_s = min(each.unix_time_s - each.elapsed_s for each in rounds)
    return curve_of(name, points, began_at_s, counts_rounds=counts_rounds)


def _by_number(name: str) -> tuple[str, int, str]:
    """worker-2 comes before worker-10."""
    head = name.rstrip("0123456789")
    digits = name[len(head) :]
    return head, int(digits[:18] or 0), name
