"""How `ps-server status --watch` looks in a terminal. Needs rich: the extra `watch`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server import status as words
from ps_server.watch import Seen

__all__ = ["picture", "show"]

_MISSING = "-"
_ALARM = "bold not dim red"


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
        rows.append(Text(f"AWAY{since}: {server.problem}", _ALARM))
    if status is not None:
        rows += [_summary(status), *([_workers(status)] if status.workers else [])]
    calm = "dim" if server.problem else "none"
    return Panel(
        Group(*rows), title=title, title_align="left", border_style="red" if server.problem else calm, style=calm
    )


def _summary(status: pb.GetStatusResponse) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    pace = f"{status.rounds_per_minute:.1f} rounds/min, the last took {status.last_round_s:.3f} s"
    grid.add_row("phase", Text.assemble((words.phase_of(status), "bold"), f"   step {status.global_step}   {pace}"))
    grid.add_row("waits for", _waits_for(status))
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
    grid.add_row("rounds", ", ".join([f"{status.rounds_committed} committed", *trouble]))
    moved = f"{words.size(status.received_bytes)} received, {words.size(status.sent_bytes)} sent"
    grid.add_row("model", f"{words.size(status.model_size_bytes)}; {moved}")
    if status.checkpoint_problem:
        grid.add_row("checkpoint", Text(f"{words.trouble_of(status)}: {status.checkpoint_problem}", _ALARM))
    elif status.HasField("checkpoint_age_s"):
        grid.add_row("checkpoint", f"step {status.checkpoint_step}, {_age(status.checkpoint_age_s)} ago")
    return grid


def _waits_for(status: pb.GetStatusResponse) -> Text:
    if status.phase == pb.PHASE_UNINITIALIZED:
        return Text("the chief, to initialize the center", _ALARM)
    if status.waiting_for or status.waiting_for_unknown:
        return Text(f"{words.missing_of(status)}   for {_age(status.round_age_s)}", _ALARM)
    return Text("nobody", "dim")


def _workers(status: pb.GetStatusResponse) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", expand=True, padding=(0, 1))
    table.add_column("worker", overflow="fold")
    table.add_column("doing")
    for title in ("local step", "loss", "late", "last seen", "counted"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for worker in status.workers:
        late = _age(worker.lateness_s) if worker.HasField("lateness_s") else _MISSING
        table.add_row(
            words.name_of(worker.worker_id) + (" (chief)" if worker.is_chief else ""),
            words.state_of(worker).removeprefix("waits "),
            str(worker.local_step),
            f"{worker.loss:.4g}" if worker.HasField("loss") else _MISSING,
            late,
            _age(worker.last_seen_age_s),
            str(worker.pushes_counted),
            _transport(worker),
            style=_ALARM if worker.worker_id in status.waiting_for else None,
        )
    return table


def _transport(worker: pb.WorkerStatus) -> str:
    if worker.transport == pb.TRANSPORT_UNSPECIFIED:
        return _MISSING
    return pb.Transport.Name(worker.transport).removeprefix("TRANSPORT_").lower().replace("_", " ")


def _age(age_s: float) -> str:
    if age_s < 1:
        return f"{age_s * 1000:.0f} ms"
    return f"{age_s:.1f} s" if age_s < 60 else f"{age_s // 60:.0f} min {age_s % 60:.0f} s"
