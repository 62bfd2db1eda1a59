"""The workers of a status as a table of plain text; a narrow one has fewer columns, but always the names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from modelaverage.commands.columns import padded, shortened, width
from modelaverage.names import MAX_NAMES, shown
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Row", "age", "state_of", "worker_table", "workers_of"]

_MISSING = "-"
_GAP = "  "
_CHIEF = " (chief)"
# Names take a third of a wide terminal at most, and this much of a narrow one.
_NAME_COLUMNS = 24


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        text: the line.
        is_missing: whether it shows a worker that the round waits for.
        is_worker: whether it shows a worker at all.
    """

    text: str
    is_missing: bool = False
    is_worker: bool = True


def worker_table(status: pb.GetStatusResponse, columns: int | None = None, rows: int | None = None) -> list[Row]:
    """A header, a line for each worker, and the number of workers left out; empty if there is no worker.

    Args:
        status: of a server.
        columns: how wide the table may be; None: any width. Columns that do not fit are left out.
        rows: how many lines it may have; None: any number. With a limit, workers that the round waits for come first.
    """
    workers, more = workers_of(status)
    missing = _missing(status)
    if rows is not None and len(workers) + 1 + (more > 0) > rows:
        workers = sorted(workers, key=lambda worker: worker.worker_id not in missing)
        kept = max(0, rows - 2)
        workers, more = workers[:kept], more + len(workers) - kept
    if not workers:
        return [Row(f"{more:,} workers", is_worker=False)] if more and (rows is None or rows > 0) else []
    titles = [title for title in _COLUMNS if title != "not finite" or any(w.nonfinite_values for w in workers)]
    cells = {title: [_COLUMNS[title].cell(worker, missing) for worker in workers] for title in titles}
    names = _names(workers, None if columns is None else min(columns, max(_NAME_COLUMNS, columns // 3)))
    left = [("worker", False, names), *((title, _COLUMNS[title].right, cells[title]) for title in titles)]
    for title in _FIRST_TO_GO:
        if columns is None or _widths(left) <= columns:
            break
        left = [column for column in left if column[0] != title]
    widths = [max(map(width, [title, *texts])) for title, _, texts in left]
    lines = [
        _GAP.join(
            padded(text, columns, right) for (_, right, _), columns, text in zip(left, widths, texts, strict=True)
        )
        for texts in zip(*([title, *texts] for title, _, texts in left), strict=True)
    ]
    head, *body = [line.rstrip() for line in lines]
    table = [Row(head, is_worker=False)]
    table += [Row(line, worker.worker_id in missing) for line, worker in zip(body, workers, strict=True)]
    if more:
        table.append(Row(f"and {more:,} more", is_worker=False))
    return table


def workers_of(status: pb.GetStatusResponse) -> tuple[list[pb.WorkerStatus], int]:
    """The workers to show, sorted by name, and how many more there are. Those that have only pulled come last, and only
    a few are shown: any client with read access can invent any number of them."""
    pushers = [worker for worker in status.workers if _has_pushed(worker)]
    readers = [worker for worker in status.workers if not _has_pushed(worker)]
    return pushers + readers[:MAX_NAMES], status.workers_omitted + len(readers[MAX_NAMES:])


def state_of(worker: pb.WorkerStatus, missing: Collection[str] = ()) -> str:
    """What a worker is doing, as far as the server can tell. It cannot tell whether a worker that a round waits for is
    computing or is gone.

    Args:
        worker: what the server says about it.
        missing: names of the workers that the round waits for.
    """
    if worker.has_finished:
        return "finished"
    if worker.waiting:
        return "at the barrier"
    if worker.has_left:
        return "has left"
    if worker.fragments_given:
        return f"has sent {worker.fragments_given} fragments"
    return f"last heard from {age(worker.last_seen_age_s)} ago" if worker.worker_id in missing else "computes"


def age(age_s: float) -> str:
    """Seconds for people."""
    if age_s < 1:
        return f"{age_s * 1000:.0f} ms"
    if age_s < 60:
        return f"{age_s:.1f} s"
    minutes, seconds = divmod(int(age_s), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _missing(status: pb.GetStatusResponse) -> frozenset[str]:
    """Names of the workers that the round waits for, including those that the server leaves out of its list."""
    named = frozenset(status.waiting_for)
    if not status.waiting_for_omitted:
        return named
    return named | {worker.worker_id for worker in status.workers if _has_pushed(worker) and not worker.waiting}


def _names(workers: Collection[pb.WorkerStatus], columns: int | None) -> list[str]:
    names = []
    for worker in workers:
        chief = _CHIEF if worker.is_chief else ""
        name = shown(worker.worker_id)
        names.append((name if columns is None else shortened(name, max(1, columns - len(chief)))) + chief)
    return names if columns is None else [shortened(name, columns) for name in names]


def _widths(table: Collection[tuple[str, bool, list[str]]]) -> int:
    return sum(max(map(width, [title, *texts])) for title, _, texts in table) + len(_GAP) * (len(table) - 1)


def _has_pushed(worker: pb.WorkerStatus) -> bool:
    """Whether the worker has pushed, or is the chief, which will."""
    return bool(worker.peer or worker.local_step or worker.pushes_counted or worker.waiting or worker.is_chief)


def _transport(worker: pb.WorkerStatus, _: Collection[str]) -> str:
    if worker.transport == pb.TRANSPORT_UNSPECIFIED:
        return _MISSING
    return pb.Transport.Name(worker.transport).removeprefix("TRANSPORT_").lower().replace("_", " ")


@dataclass(frozen=True)
class _Column:
    """A column's text for a worker, given who is missing, and its alignment."""

    cell: Callable[[pb.WorkerStatus, Collection[str]], str]
    right: bool = True


_COLUMNS = {
    "doing": _Column(state_of, right=False),
    "local step": _Column(lambda worker, _: str(worker.local_step)),
    "loss": _Column(lambda worker, _: f"{worker.loss:.4g}" if worker.HasField("loss") else _MISSING),
    "late": _Column(lambda worker, _: age(worker.lateness_s) if worker.HasField("lateness_s") else _MISSING),
    "last seen": _Column(lambda worker, _: age(worker.last_seen_age_s)),
    "counted": _Column(lambda worker, _: str(worker.pushes_counted)),
    "not finite": _Column(lambda worker, _: str(worker.nonfinite_values or _MISSING)),
    "by": _Column(_transport, right=False),
}
_FIRST_TO_GO = ("by", "counted", "last seen", "late", "loss", "local step", "not finite", "doing")
