"""How a run of the built-in workload looks while it goes on: a live view in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelaverage.names import listed, shown
from ps_worker.record import Record
from ps_worker.summary import size

__all__ = ["Cast", "LiveView", "PlainView", "View", "view_for"]

_MISSING = "-"
_BAR_WIDTH = 8  # so that all of it fits into 80 columns


@dataclass(frozen=True)
class Cast:
    """Who takes part.

    Args:
        servers: the address of each parameter server, by its name; empty until they listen.
        workers: names of their workers, the chief first.
        alone: name of the lone worker.
        steps: local steps of each.
    """

    servers: Mapping[str, str]
    workers: tuple[str, ...]
    alone: str
    steps: int


class View(Protocol):
    """What shows a run. ``refresh_interval_s``: how often it likes to be shown something new."""

    refresh_interval_s: float

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """What has happened so far; ``stage`` says what goes on now."""

    def say(self, line: str) -> None:
        """Something that is to be read even if it is not part of the view."""

    def close(self) -> None:
        """Nothing more will be shown."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The result, after `close`."""


def view_for(console: Console) -> View:
    """The live view where the terminal can show one, otherwise plain lines."""
    # rich calls anything a terminal where FORCE_COLOR is set.
    return LiveView(console) if console.file.isatty() and not console.is_dumb_terminal else PlainView()


class LiveView:
    """A table that is drawn anew in place."""

    refresh_interval_s = 0.25

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._started_at_s = time.monotonic()

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """Draws the view."""
        if not self._live.is_started:
            self._live.start()
        self._live.update(_picture(cast, record, stage, time.monotonic() - self._started_at_s), refresh=True)

    def say(self, line: str) -> None:
        """Prints a line above the view."""
        self._console.print(Text(line))

    def close(self) -> None:
        """Leaves the last picture on the screen."""
        self._live.stop()

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints the result."""
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.ROUNDED, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", style="bold")
        for label, value in rows:
            table.add_row(Text(label), Text(value))
        self._console.print(table)


class PlainView:
    """A line a second."""

    refresh_interval_s = 1.0

    def __init__(self) -> None:
        self._started_at_s = time.monotonic()
        self._stage = ""
        self._shown = ""

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """Prints a line if there is news."""
        line = _line(cast, record)
        news = [line] if line != self._shown else []
        if stage != self._stage:
            news.append(f"{stage} ...")
        self._shown, self._stage = line, stage
        for text in news:
            print(f"{time.monotonic() - self._started_at_s:5.1f} s  {text}", flush=True)

    def say(self, line: str) -> None:
        """Prints it."""
        print(line, flush=True)

    def close(self) -> None:
        """Nothing is left to be done."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints the result in two columns."""
        width = max(len(label) for label, _ in rows)
        print(f"\n{title}")
        for label, value in rows:
            print(f"{label:<{width}}  " + value.replace("\n", "\n" + " " * (width + 2)))


def _line(cast: Cast, record: Record) -> str:
    alone = record.last_step(cast.alone)
    if alone is not None:
        accuracy = record.last_accuracy(cast.alone)
        tested = "" if accuracy is None else f", test accuracy {accuracy:.4f}"
        speed = f"{alone.samples_per_s:.0f} samples/s"
        return f"{shown(cast.alone)}: step {alone.step}/{cast.steps}, loss {alone.loss:.4f}, {speed}{tested}"
    steps = [step for worker in cast.workers if (step := record.last_step(worker)) is not None]
    if not steps:
        return ""
    parts = [
        f"step {min(step.step for step in steps)}/{cast.steps}",
        "loss " + " ".join(f"{step.loss:.4f}" for step in steps),
        "samples/s " + " ".join(f"{step.samples_per_s:.0f}" for step in steps),
        "waited " + " ".join(f"{step.waited_s:.1f}" for step in steps) + " s",
    ]
    servers = record.last_of_servers()
    if servers:
        moved_bytes = sum(server.received_bytes + server.sent_bytes for server in servers)
        parts.append(f"global_step {min(server.global_step for server in servers)}, {size(moved_bytes)} moved")
    accuracy = record.last_accuracy(cast.workers[0])
    if accuracy is not None:
        parts.append(f"test accuracy of the center {accuracy:.4f}")
    return ", ".join(parts)


def _picture(cast: Cast, record: Record, stage: str, elapsed_s: float) -> RenderableType:
    title = Text.assemble(("modelaverage", "bold"), f"  digits: {stage}", (f"  {elapsed_s:.0f} s", "dim"))
    return Group(title, _workers(cast, record), _servers(cast, record))


def _workers(cast: Cast, record: Record) -> Table:
    table = Table(box=box.ROUNDED, header_style="dim")
    table.add_column("worker", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True, min_width=9)
    table.add_column("", width=_BAR_WIDTH)
    table.add_column("loss", justify="right", min_width=6)
    table.add_column("samples/s", justify="right")
    table.add_column("barrier wait", justify="right")
    for worker in cast.workers:
        _add_row(table, cast, record, worker, shown(worker) + (" (chief)" if worker == cast.workers[0] else ""))
    table.add_section()
    _add_row(table, cast, record, cast.alone, shown(cast.alone))
    return table


def _add_row(table: Table, cast: Cast, record: Record, worker: str, label: str) -> None:
    step = record.last_step(worker)
    done = 0 if step is None else step.step
    name = Text(label)
    bar = ProgressBar(total=cast.steps, completed=done, width=_BAR_WIDTH)
    if step is None:
        table.add_row(name, f"0/{cast.steps}", bar, *[_MISSING] * 3, style="dim")
    else:
        waited = _MISSING if worker == cast.alone else f"{step.waited_s:.2f} s"
        table.add_row(name, f"{done}/{cast.steps}", bar, f"{step.loss:.4f}", f"{step.samples_per_s:,.0f}", waited)


def _servers(cast: Cast, record: Record) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    if not cast.servers:
        grid.add_row("servers", "starting")
    for name, address in cast.servers.items():
        if name not in record.servers:
            grid.add_row(Text(name), Text(address))
            continue
        server = record.servers[name][-1]
        missing = listed(server.waiting_for, server.waiting_for_omitted, shown)
        waits = f"waits for {missing}" if missing else server.phase
        grid.add_row(Text(name), Text(f"{address}  {waits}"))
        traffic = f", received {size(server.received_bytes)}, sent {size(server.sent_bytes)}"
        grid.add_row("", Text.assemble("global_step ", (str(server.global_step), "bold"), traffic))
    accuracies = [("center", record.last_accuracy(cast.workers[0])), (cast.alone, record.last_accuracy(cast.alone))]
    found = [
        Text.assemble(f"{shown(who)} ", (f"{accuracy:.4f}", "bold"))
        for who, accuracy in accuracies
        if accuracy is not None
    ]
    grid.add_row("test accuracy", Text(", ").join(found) if found else _MISSING)
    return grid
