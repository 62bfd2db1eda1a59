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

from modelaverage.commands.columns import fitted, listed_within, shortened, size, width
from modelaverage.names import shown
from ps_worker.curves.curve import Curve
from ps_worker.curves.text import plotted
from ps_worker.demo.record import Record
from ps_worker.events.parse import ServerEvent

__all__ = ["Cast", "LiveView", "PlainView", "View", "view_for"]

_MISSING = "-"
_FIRST_QUIET_S = 2.0
_PROGRAM = "modelaverage"
_CHIEF = " (chief)"
_ACCURACY = "test accuracy"
_BAR = ""
_BAR_WIDTH = 8  # so that everything fits into 80 columns
# Names take a third of a wide terminal at most, and this much of a narrow one.
_NAME_COLUMNS = 24
_NARROWEST = 8
# Left out where a terminal is too narrow for all columns.
_FIRST_TO_GO = (_BAR, "samples/s", "loss", "barrier wait", "step")
# Lines of the title and of the table's frame; of everything with one worker and three lone processes; of one server.
_FRAME_ROWS, _FEWEST_ROWS, _ROWS_OF_SERVER = 6, 13, 2


@dataclass(frozen=True)
class Cast:
    """Who takes part.

    Args:
        servers: the address of each parameter server, by its name; empty until they listen.
        workers: names of their workers, the chief first.
        alone: names of the lone processes, which train without a server.
        steps: local steps of each.
    """

    servers: Mapping[str, str]
    workers: tuple[str, ...]
    alone: tuple[str, ...]
    steps: int


class View(Protocol):
    """Shows a run. ``refresh_interval_s``: how often to call `show`."""

    refresh_interval_s: float

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """Shows what has happened so far; ``stage`` names what is happening now."""

    def say(self, line: str) -> None:
        """Prints a line that is not part of the view."""

    def close(self) -> None:
        """Nothing more will be shown."""

    def plot(self, curves: Sequence[Curve]) -> None:
        """Shows the losses of the whole run, after `close`, if that is of use."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The result, after `close`."""


def view_for(console: Console) -> View:
    """The live view where the terminal can show one, otherwise plain lines."""
    # With FORCE_COLOR set, rich takes any stream for a terminal.
    return LiveView(console) if console.file.isatty() and not console.is_dumb_terminal else PlainView()


class LiveView:
    """A table that is redrawn in place."""

    refresh_interval_s = 0.25

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._started_at_s = time.monotonic()

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """Draws the view."""
        if not self._live.is_started:
            self._live.start()
        self._live.update(self._picture(cast, record, stage), refresh=True)

    def _picture(self, cast: Cast, record: Record, stage: str) -> RenderableType:
        elapsed_s = time.monotonic() - self._started_at_s
        return _picture(cast, record, stage, elapsed_s, self._console.width, self._console.height)

    def say(self, line: str) -> None:
        """Prints a line above the view."""
        self._console.print(Text(line))

    def close(self) -> None:
        """Leaves the last picture on the screen."""
        self._live.stop()

    def plot(self, curves: Sequence[Curve]) -> None:
        """Plots them."""
        for line in plotted(curves, self._console.width):
            self._console.print(Text(line))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints the result."""
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.ROUNDED, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", style="bold")
        for label, value in rows:
            table.add_row(Text(label), Text(value))
        self._console.print(table)


class PlainView:
    """A line a second while there is news, and an occasional line while there is none."""

    refresh_interval_s = 1.0

    def __init__(self) -> None:
        self._started_at_s = self._printed_at_s = time.monotonic()
        self._quiet_s = _FIRST_QUIET_S
        self._stage = ""
        self._shown = ""

    def show(self, cast: Cast, record: Record, stage: str) -> None:
        """Prints a line if there is news."""
        line = _line(cast, record)
        news = [line] if line != self._shown else []
        if stage != self._stage:
            news.append(f"{stage} ...")
        now_s = time.monotonic()
        if news:
            self._quiet_s = _FIRST_QUIET_S
        elif now_s - self._printed_at_s >= self._quiet_s:  # it goes on
            news, self._quiet_s = [f"{stage} ..."], 2 * self._quiet_s
        self._shown, self._stage = line, stage
        for text in news:
            self._printed_at_s = now_s
            print(f"{now_s - self._started_at_s:5.1f} s  {text}", flush=True)

    def say(self, line: str) -> None:
        """Prints it."""
        print(line, flush=True)

    def close(self) -> None:
        """Does nothing."""

    def plot(self, curves: Sequence[Curve]) -> None:
        """Does nothing: a plot is for people."""

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints the result in two columns."""
        width = max(len(label) for label, _ in rows)
        print(f"\n{title}")
        for label, value in rows:
            print(f"{label:<{width}}  " + value.replace("\n", "\n" + " " * (width + 2)))


def _line(cast: Cast, record: Record) -> str:
    alone = [_alone_line(cast, record, worker) for worker in cast.alone if record.last_step(worker) is not None]
    if alone:
        return "; ".join(alone)
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


def _alone_line(cast: Cast, record: Record, worker: str) -> str:
    step, accuracy = record.last_step(worker), record.last_accuracy(worker)
    assert step is not None
    tested = "" if accuracy is None else f", test accuracy {accuracy:.4f}"
    return f"{shown(worker)}: step {step.step}/{cast.steps}, loss {step.loss:.4f}{tested}"


def _picture(cast: Cast, record: Record, stage: str, elapsed_s: float, columns: int, rows: int) -> RenderableType:
    """Everything that fits into this many columns and, if possible, rows."""
    elapsed = f"  {elapsed_s:.0f} s"
    title = shortened(f"  digits: {stage}", max(_NARROWEST, columns - len(_PROGRAM) - len(elapsed)))
    servers = _servers(cast, record, columns, max(1, (rows - _FEWEST_ROWS) // _ROWS_OF_SERVER))
    left = rows - _FRAME_ROWS - len(cast.alone) - servers.row_count
    head = Text.assemble((_PROGRAM, "bold"), title, (elapsed, "dim"), no_wrap=True, overflow="ellipsis")
    return Group(head, _workers(cast, record, columns, max(1, left)), servers)


def _workers(cast: Cast, record: Record, columns: int, rows: int) -> Table:
    workers = cast.workers if len(cast.workers) <= rows else cast.workers[: max(1, rows - 1)]
    omitted = len(cast.workers) - len(workers)
    names_at_most = max(_NAME_COLUMNS, columns // 3)
    lines = [(worker, shortened(shown(worker), names_at_most)) for worker in (*workers, *cast.alone)]
    lines[0] = lines[0][0], shortened(shown(workers[0]), names_at_most - len(_CHIEF)) + _CHIEF
    cells = [[name, *_cells(cast, record, worker)] for worker, name in lines]
    titles = ["worker", "step", "loss", "samples/s", "barrier wait"]
    widths = {title: max(width(title), *(width(row[at]) for row in cells)) for at, title in enumerate(titles)}
    widths[_BAR] = _BAR_WIDTH
    for title in _FIRST_TO_GO:
        if sum(widths.values()) + 3 * len(widths) + 1 <= columns:
            break
        widths.pop(title)
    table = Table(box=box.ROUNDED, header_style="dim")
    kept = [title for title in ("worker", "step", _BAR, *titles[2:]) if title in widths]
    for title in kept:
        table.add_column(title, justify="left" if title == "worker" else "right", no_wrap=True, width=widths[title])
    for (worker, _), row in zip(lines, cells, strict=True):
        step = record.last_step(worker)
        bar = ProgressBar(total=cast.steps, completed=0 if step is None else step.step, width=_BAR_WIDTH)
        found = {title: Text(cell) for title, cell in zip(titles, row, strict=True)}
        is_last = worker == workers[-1]
        table.add_row(
            *(bar if title == _BAR else found[title] for title in kept),
            style="dim" if step is None else None,
            end_section=is_last and not omitted,
        )
        if is_last and omitted:
            table.add_row(Text(f"and {omitted} more"), style="dim", end_section=True)
    return table


def _cells(cast: Cast, record: Record, worker: str) -> list[str]:
    """Step, loss, samples/s, barrier wait."""
    step = record.last_step(worker)
    if step is None:
        return [f"0/{cast.steps}", *[_MISSING] * 3]
    waited = _MISSING if worker in cast.alone else f"{step.waited_s:.2f} s"
    return [f"{step.step}/{cast.steps}", f"{step.loss:.4f}", f"{step.samples_per_s:,.0f}", waited]


def _servers(cast: Cast, record: Record, columns: int, most: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    room = max(_NARROWEST, columns - max(map(width, [_ACCURACY, *cast.servers])) - 2)
    if not cast.servers:
        grid.add_row("servers", "starting")
    for name, address in list(cast.servers.items())[:most]:
        if name not in record.servers:
            grid.add_row(Text(name), Text(address))
            continue
        server = record.servers[name][-1]
        grid.add_row(Text(name), Text(f"{address}  {_doing(server, room - width(address) - 2)}"))
        traffic = [f"global_step {server.global_step}", f"received {size(server.received_bytes)}"]
        grid.add_row("", Text(fitted([*traffic, f"sent {size(server.sent_bytes)}"], room)))
    if len(cast.servers) > most:
        grid.add_row("", Text(f"and {len(cast.servers) - most} more", "dim"))
    accuracies = [("center", record.last_accuracy(cast.workers[0]))]
    accuracies += [(worker, record.last_accuracy(worker)) for worker in cast.alone]
    found = [f"{shown(who)} {accuracy:.4f}" for who, accuracy in accuracies if accuracy is not None]
    grid.add_row(_ACCURACY, Text(fitted(found, room)) if found else _MISSING)
    return grid


def _doing(server: ServerEvent, columns: int) -> str:
    if not server.waiting_for and not server.waiting_for_omitted:
        return server.phase
    head = "waits for "
    room = max(_NARROWEST, columns - len(head))
    widest = max(_NAME_COLUMNS, room // 2)
    return head + listed_within(server.waiting_for, server.waiting_for_omitted, shown, room, widest)
