"""`ps-server status --watch`: asks servers for their status at an interval, and shows the answers.

Draws them in a terminal if rich is installed; otherwise prints a line for each change; with --json an object a line.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from modelaverage.chosen import NO_COMPRESSION
from modelaverage.names import printable
from modelaverage.outer import AVERAGE
from modelaverage.runtime.output import wait_while_read
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.console import status
from ps_server.console.status import NoAnswerError, Seen

__all__ = ["json_line", "line", "watch"]

_Fetch = Callable[[str], pb.GetStatusResponse]


def watch(addresses: Sequence[str], fetch: _Fetch, interval_s: float, as_json: bool) -> None:
    """Shows the servers until Ctrl-C. ``fetch`` asks one server, and may raise NoAnswerError."""
    samples = _samples(addresses, fetch, interval_s)
    try:
        if as_json:
            for servers in samples:
                print(json_line(servers, time.time()), flush=True)
        elif sys.stdout.isatty() and find_spec("rich") is not None:
            from ps_server.console.status_view import show

            show(samples)
        else:
            if sys.stdout.isatty():
                print("for a live picture: pip install 'torch-model-average[watch]'", file=sys.stderr)
            _print_changes(samples)
    except KeyboardInterrupt:
        pass


def _samples(addresses: Sequence[str], fetch: _Fetch, interval_s: float) -> Iterator[list[Seen]]:
    """Asks all servers at the same time, every ``interval_s``."""
    servers = [Seen(address) for address in addresses]
    heard_at_s = dict.fromkeys(addresses, time.monotonic())

    def look(before: Seen) -> Seen:
        try:
            answer = fetch(before.address)
        except NoAnswerError as error:
            return Seen(before.address, before.status, str(error), time.monotonic() - heard_at_s[before.address])
        heard_at_s[before.address] = time.monotonic()
        return Seen(before.address, answer)

    with ThreadPoolExecutor(len(addresses), "status") as threads:
        while True:
            due_at_s = time.monotonic() + interval_s
            servers = list(threads.map(look, servers))
            yield servers
            wait_while_read(max(0.0, due_at_s - time.monotonic()))


def _print_changes(samples: Iterator[list[Seen]]) -> None:
    shown: dict[str, tuple[object, ...]] = {}
    warned = list[str]()
    for servers in samples:
        warned, before = status.differing_choices(servers), warned
        for differ in warned:
            if differ not in before:
                print(_in_columns(f"{time.strftime('%H:%M:%S')}  {differ}"), flush=True)
        for server in servers:
            news = _news(server)
            if shown.get(server.address) != news:
                shown[server.address] = news
                print(_in_columns(f"{time.strftime('%H:%M:%S')}  {line(server)}"), flush=True)


def _in_columns(text: str) -> str:
    """In a terminal, wrapped between words, so that the terminal does not break names."""
    if not sys.stdout.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(text, columns, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False)


def _news(server: Seen) -> tuple[object, ...]:
    """What has to change before a new line is printed; leaves out what grows every second."""
    if server.status is None or server.problem:
        return bool(server.problem), server.status is None
    now = server.status
    lasting_problem = re.sub(r" for \d+ s$", "", now.checkpoint_problem)
    return (
        now.phase,
        now.global_step,
        tuple(now.waiting_for),
        now.waiting_for_omitted,
        now.waiting_for_unknown,
        now.workers_finished,
        lasting_problem,
    )


def line(server: Seen) -> str:
    """One server in a line."""
    if server.problem:
        last = (
            ""
            if server.status is None
            else f", last seen {server.away_s:.0f} s ago at step {server.status.global_step}"
        )
        return f"{server.address}  AWAY: {printable(server.problem)}{last}"
    now = server.status
    if now is None:
        return f"{server.address}  not asked yet"
    parts = [
        status.phase_of(now),
        f"step {now.global_step}",
        f"{now.rounds_per_minute:.1f} rounds/min",
        f"{sum(worker.waiting for worker in now.workers)} of {now.num_workers} at the barrier",
    ]
    if (outer := status.outer_optimizer_of(now)) not in ("", AVERAGE.name):
        parts.append(f"outer {outer}")
    if (compression := status.compression_in(now)) not in ("", NO_COMPRESSION):
        parts.append(f"compression {compression}")
    if now.workers_finished:
        parts.append(status.workers_in_round(now)[0])
    if now.phase == pb.PHASE_UNINITIALIZED:
        parts.append("waits for the chief, to initialize the center")
    if missing := status.missing_of(now):
        parts.append(f"waits for {missing} (for {now.round_age_s:.1f} s)")
    if now.checkpoint_problem:
        parts.append(f"checkpoint {status.trouble_of(now)}: {printable(now.checkpoint_problem)}")
    return f"{server.address}  {', '.join(parts)}"


def json_line(servers: Sequence[Seen], unix_time_s: float) -> str:
    """All servers as one JSON object; a status has the protocol's field names, as without --watch."""
    plain = [
        {
            "address": server.address,
            "problem": server.problem,
            "away_s": server.away_s,
            "status": None if server.status is None else status.plain(server.status),
        }
        for server in servers
    ]
    return json.dumps({"unix_time_s": unix_time_s, "servers": plain})
