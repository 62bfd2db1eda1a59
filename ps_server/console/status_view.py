"""How `ps-server status --watch` looks in a terminal. Needs rich: the extra `watch`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from modelaverage.chosen import NO_COMPRESSION
from modelaverage.commands.columns import fitted, shortened, size, width
from modelaverage.names import printable
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console import status as words
from ps_server.console.status import Seen
from ps_server.console.worker_table import age, worker_table

__all__ = ["picture", "show"]

_ALARM = "bold not dim red"
_TITLE_COLUMNS = 12
_FRAME_COLUMNS, _FRAME_ROWS = 4, 2
_HEAD_ROWS = 1
# Even in the smallest terminal: the server's phase, and the workers that it waits for.
_LEAST_ROWS = 2
_TABLE_ROWS = 3
_NARROWEST = 8


def show(samples: Iterable[Sequence[Seen]], console: Console | None = None) -> None:
    """Draws each sample in place. At the end, also after Ctrl-C, the last one stays on the terminal."""
    console = console or Console()
    servers, at = list[Seen](), ""
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            for sample in samples:
                servers, at = list(sample), time.strftime("%H:%M:%S")
                live.update(picture(servers, at, console.height), refresh=True)
    finally:
        console.print(picture(servers, at) if servers else Text())


def picture(servers: Sequence[Seen], at: str, height: int | None = None) -> RenderableType:
    """All servers, one panel each, as wide as the terminal. What does not fit is left out or shortened with a ….

    Args:
        servers: what is known about each.
        at: the time, as text.
        height: rows of the terminal that all panels have to fit into; None: any number.
    """
    away = sum(bool(server.problem) for server in servers)
    head = Text.assemble(("modelaverage", "bold"), f"  {at}  {len(servers)} server{'s' * (len(servers) != 1)}")
    head.no_wrap, head.overflow = True, "ellipsis"
    if away:
        head.append(f"  {away} away", _ALARM)
    warnings = [Text(differ, _ALARM, no_wrap=True, overflow="ellipsis") for differ in words.differing_choices(servers)]
    head_rows = _HEAD_ROWS + len(warnings)
    rows = None if height is None else (height - head_rows) // max(1, len(servers)) - _FRAME_ROWS
    return Group(head, *warnings, *(_ServerPanel(server, rows) for server in servers))


@dataclass(frozen=True)
class _ServerPanel:
    """One server, in at most ``rows`` rows within its frame."""

    server: Seen
    rows: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = max(_NARROWEST, options.max_width - _FRAME_COLUMNS)
        server, status = self.server, self.server.status
        shard = "" if status is None else words.shard_of(status)
        title = Text(shortened(server.address, max(_NARROWEST, columns - width(shard) - 2)), "bold")
        title.append(shard, "not bold")
        lines = list[Text]()
        if server.problem:
            since = "" if status is None else f" for {server.away_s:.0f} s; below is its last status"
            problem = Text(f"AWAY{since}: {printable(server.problem)}", _ALARM)
            lines += problem.wrap(console, columns)
        if status is not None:
            vital, rest = _summary(status, columns, console)
            room = None if self.rows is None else max(_LEAST_ROWS, self.rows - len(lines))
            # Where there is little room, the table of workers is worth more than the rest of the summary.
            summary = vital if room is not None and room < len(vital) + len(rest) + _TABLE_ROWS else vital + rest
            lines += summary
            left = None if room is None else max(0, room - len(summary))
            table = worker_table(status, columns, left)
            if table and (left is None or left > len(table)):
                lines.append(Text())
            lines += [Text(row.text, _ALARM if row.is_missing else "none" if row.is_worker else "dim") for row in table]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        calm = "dim" if server.problem else "none"
        yield Panel(
            Group(*lines), title=title, title_align="left", border_style="red" if server.problem else calm, style=calm
        )


def _summary(status: pb.GetStatusResponse, columns: int, console: Console) -> tuple[list[Text], list[Text]]:
    """The summary's lines: those that are always shown, and the rest."""
    room = max(_NARROWEST, columns - _TITLE_COLUMNS)
    compression = words.compression_in(status)
    lines = list[Text]()

    def add(title: str, content: str | Text) -> None:
        text = Text(content) if isinstance(content, str) else content
        for at, line in enumerate(text.wrap(console, room)):
            lines.append(Text.assemble((f"{'' if at else title:<{_TITLE_COLUMNS}}", "dim"), line))

    pace = [f"step {status.global_step}", f"{status.rounds_per_minute:.1f} rounds/min"]
    pace.append(f"the last took {status.last_round_s:.3f} s")
    phase = words.phase_of(status)
    add("phase", Text.assemble((phase, "bold"), "   ", fitted(pace, room - len(phase) - 3, "   ")))
    add("waits for", _waits_for(status, room))
    if status.checkpoint_problem:
        add("checkpoint", Text(f"{words.trouble_of(status)}: {printable(status.checkpoint_problem)}", _ALARM))
    vital, lines = lines, []
    if differ := words.intervals_of(status, columns):
        lines.append(Text(differ))
    if status.workers_finished:
        add("workers", fitted(words.workers_in_round(status), room))
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
    add("rounds", fitted([f"{status.rounds_committed} committed", *trouble], room))
    model, moved = size(status.model_size_bytes), ", ".join(words.moved_of(status))
    if compression in ("", NO_COMPRESSION):
        add("model", fitted([model, moved], room, "; "))
    else:
        add("model", fitted([model], room))
        add("moved", moved)
    if outer := words.outer_optimizer_of(status):
        add("outer", fitted([outer], room))
    if compression:
        add("compression", fitted([compression], room))
    if not status.checkpoint_problem and status.HasField("checkpoint_age_s"):
        add("checkpoint", f"step {status.checkpoint_step}, {age(status.checkpoint_age_s)} ago")
    return vital, lines


def _waits_for(status: pb.GetStatusResponse, columns: int) -> Text:
    if status.phase == pb.PHASE_UNINITIALIZED:
        return Text("the chief, to initialize the center", _ALARM)
    since = f"   for {age(status.round_age_s)}"
    if missing := words.missing_of(status, columns - len(since)):
        return Text(f"{missing}{since}", _ALARM)
    return Text("nobody", "dim")
