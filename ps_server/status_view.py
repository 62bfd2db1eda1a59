"""How `ps-server status --watch` looks in a terminal. Needs rich: the extra `watch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modelaverage.names import printable, shown
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server import status as words
from ps_server.watch import Seen

__all__ = ["picture", "show"]

_MISSING = "-"
_ALARM = "bold not dim red"
# A wider name is folded; one of 128 letters would leave room for nothing else.
_WIDEST_NAME = 40
_ANY_WIDTH = 10_000


def show(samples: Iterable[Sequence[Seen]], console: Console | None = None) -> None:
    """Draws each sample in place; on the way out, Ctrl-C included, the last one stays on the terminal."""
    console = console or Console()
    last: RenderableType = Text()
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            for servers in samples:
                last = picture(servers, time.strftime("%H:%M:%S"))
                live.update(last, refresh=True)
    finally:
        console.print(last)


def picture(servers: Sequence[Seen], at: str) -> RenderableType:
    """All servers, one panel each."""
    away = sum(bool(server.problem) for server in servers)
    head = Text.assemble(("modelaverage", "bold"), f"  {at}  {len(servers)} server{'s' * (len(servers) != 1)}")
    if away:
        head.append(f"  {away} away", _ALARM)
    return Group(head, *map(_panel, servers))


def _panel(server: Seen) -> Panel:
    status = server.status
    title = Text(server.address, "bold")
    if status is not None:
        title.append(words.shard_of(status), "not bold")
    rows = list[RenderableType]()
    if server.problem:
        since = "" if status is None else f" for {server.away_s:.0f} s; below is what it said last"
        rows.append(Text(f"AWAY{since}: {printable(server.problem)}", _ALARM))
    if status is not None:
        rows += [_summary(status), *([_Workers(status)] if status.workers else [])]
    calm = "dim" if server.problem else "none"
    return Panel(
        Group(*rows), title=title, title_align="left", border_style="red" if server.problem else calm, style=calm
    )


def _summary(status: pb.GetStatusResponse) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")

    def add_row(title: str, content: str | Text) -> None:
        grid.add_row(Text(title), Text(content) if isinstance(content, str) else content)

    pace = f"{status.rounds_per_minute:.1f} rounds/min, the last took {status.last_round_s:.3f} s"
    add_row("phase", Text.assemble((words.phase_of(status), "bold"), f"   step {status.global_step}   {pace}"))
    add_row("waits for", _waits_for(status))
    trouble = [
        f"{count} {what}"
        for count, what in (
            (status.rounds_restarted, "restarted"),
            (status.rounds_without_all, "without all"),
            (status.stale_pushes, "stale pushes"),
            (status.pushes_retried, "pushes made again"),
        )
        if count
    ]
    add_row("rounds", ", ".join([f"{status.rounds_committed} committed", *trouble]))
    moved = f"{words.size(status.received_bytes)} received, {words.size(status.sent_bytes)} sent"
    add_row("model", f"{words.size(status.model_size_bytes)}; {moved}")
    if status.checkpoint_problem:
        add_row("checkpoint", Text(f"{words.trouble_of(status)}: {printable(status.checkpoint_problem)}", _ALARM))
    elif status.HasField("checkpoint_age_s"):
        add_row("checkpoint", f"step {status.checkpoint_step}, {_age(status.checkpoint_age_s)} ago")
    return grid


def _waits_for(status: pb.GetStatusResponse) -> Text:
    if status.phase == pb.PHASE_UNINITIALIZED:
        return Text("the chief, to initialize the center", _ALARM)
    if missing := words.missing_of(status):
        return Text(f"{missing}   for {_age(status.round_age_s)}", _ALARM)
    return Text("nobody", "dim")


class _Workers:
    """A line for each worker. Where a terminal is too narrow for all columns, names stay whole and columns go."""

    def __init__(self, status: pb.GetStatusResponse) -> None:
        self._waiting_for = frozenset(status.waiting_for)
        self._workers, self._more = words.workers_of(status)
        self._names = [shown(w.worker_id) + (" (chief)" if w.is_chief else "") for w in self._workers]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name_width = min(_WIDEST_NAME, max(map(cell_len, self._names), default=0))
        anything = options.update(max_width=_ANY_WIDTH)
        left = dict(_COLUMNS)
        for title in _FIRST_TO_GO:
            if Measurement.get(console, anything, self._table(left, name_width)).maximum <= options.max_width:
                break
            del left[title]
        yield self._table(left)
        if self._more:
            yield Text(f"  and {self._more:,} more", "dim")

    def _table(self, columns: Mapping[str, _Column], name_width: int | None = None) -> Table:
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", expand=True, padding=(0, 1))
        table.add_column("worker", overflow="fold", width=name_width)
        for title, column in columns.items():
            table.add_column(title, justify=column.justify, no_wrap=True)
        for worker, name in zip(self._workers, self._names, strict=True):
            cells = [Text(column.cell(worker)) for column in columns.values()]
            table.add_row(Text(name), *cells, style=_ALARM if worker.worker_id in self._waiting_for else None)
        return table


@dataclass(frozen=True)
class _Column:
    """What stands in a column, and on which side."""

    cell: Callable[[pb.WorkerStatus], str]
    justify: Literal["left", "right"] = "right"


def _transport(worker: pb.WorkerStatus) -> str:
    if worker.transport == pb.TRANSPORT_UNSPECIFIED:
        return _MISSING
    return pb.Transport.Name(worker.transport).removeprefix("TRANSPORT_").lower().replace("_", " ")


def _age(age_s: float) -> str:
    if age_s < 1:
        return f"{age_s * 1000:.0f} ms"
    return f"{age_s:.1f} s" if age_s < 60 else f"{age_s // 60:.0f} min {age_s % 60:.0f} s"


_COLUMNS = {
    "doing": _Column(lambda worker: words.state_of(worker).removeprefix("waits "), "left"),
    "local step": _Column(lambda worker: str(worker.local_step)),
    "loss": _Column(lambda worker: f"{worker.loss:.4g}" if worker.HasField("loss") else _MISSING),
    "late": _Column(lambda worker: _age(worker.lateness_s) if worker.HasField("lateness_s") else _MISSING),
    "last seen": _Column(lambda worker: _age(worker.last_seen_age_s)),
    "counted": _Column(lambda worker: str(worker.pushes_counted)),
    "by": _Column(_transport, "left"),
}
_FIRST_TO_GO = ("by", "loss", "counted", "local step", "late", "doing", "last seen")
