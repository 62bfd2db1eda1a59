"""The Ray engine's part on a node of the cluster: an actor that runs a parameter server or a worker."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from modelaverage.addresses import Address, parse
from ps_worker.engines.processes import EventPipe, Processes

__all__ = ["Command", "ERROR", "EVENT", "Line", "OUTPUT", "RayHost"]

OUTPUT, ERROR, EVENT = "output", "error", "event"

_MAX_BATCH_LINES = 1000

Line = tuple[str, str]
"""The pipe (OUTPUT, ERROR, EVENT) that a line came from, and its text."""


@dataclass(frozen=True)
class Command:
    """What to run.

    Args:
        name: of the process, for messages.
        arguments: for Python.
        environ: variables to add to the node's environment.
        directory: its working directory; None: the actor's.
        events_flag: the flag that tells it the file descriptor of a pipe for events; None: it gets no such pipe.
    """

    name: str
    arguments: Sequence[str]
    environ: Mapping[str, str]
    directory: str | None
    events_flag: str | None


class RayHost:
    """Runs one Python process at a time, which ends with it at the latest.

    Ray creates it, and recreates it when it or its node dies.

    Args:
        bind_host: where a server listens; None: at the node's IP address.
    """

    def __init__(self, bind_host: str | None) -> None:
        self._bind_host = bind_host
        self._run: _Run | None = None

    async def bind_address(self, before: str) -> str:
        """HOST:PORT for a server: that of ``before`` if it is on this node and free, otherwise one with port 0."""
        import ray

        host: str = self._bind_host or ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        is_here = bool(before) and parse(before).host == host
        return before if is_here and _is_free(before) else str(Address(host))

    async def run(self, command: Command) -> AsyncIterator[list[Line] | int]:
        """Runs ``command`` with this node's Python, once an earlier one has been stopped.

        Yields:
            Lists of the lines that it prints; at the end its exit code (negative: the signal that ended it).

        Raises:
            OSError: it cannot be started on this node.
        """
        # The driver may have lost sight of an earlier one.
        run = self._run = _Run(command, self._run)
        while batch := await run.next_lines():
            yield batch
        yield await run.task

    async def stop(self) -> None:
        """Ends the process if there is one: SIGTERM, and SIGKILL after 3 s."""
        if self._run is not None:
            await self._run.stop()


class _Run:
    """A command that is run once the ``earlier`` one has been stopped. The result of ``task`` is its exit code."""

    def __init__(self, command: Command, earlier: _Run | None) -> None:
        self._command = command
        self._earlier = earlier
        self._stopped = asyncio.Event()
        self._lines: asyncio.Queue[Line | None] = asyncio.Queue()  # None marks the end
        self.task = asyncio.ensure_future(self._live())
        self.task.add_done_callback(lambda _: self._lines.put_nowait(None))

    async def stop(self) -> None:
        self._stopped.set()
        await asyncio.wait([self.task])

    async def next_lines(self) -> list[Line]:
        """Waits for a line and returns all lines that are there; an empty list at the end."""
        batch = []
        line = await self._lines.get()
        while line is not None:
            batch.append(line)
            if self._lines.empty() or len(batch) == _MAX_BATCH_LINES:
                return batch
            line = self._lines.get_nowait()
        if batch:
            self._lines.put_nowait(None)  # for the next time
        return batch

    async def _live(self) -> int:
        if self._earlier is not None:
            await self._earlier.stop()
            self._earlier = None
        flag = self._command.events_flag
        async with Processes() as processes:
            child = processes.start(
                self._command.name,
                [sys.executable, *self._command.arguments],
                {**os.environ, **self._command.environ},
                on_output=partial(self._put, OUTPUT),
                on_error=partial(self._put, ERROR),
                events=None if flag is None else EventPipe(flag, partial(self._put, EVENT)),
                directory=self._command.directory,
            )
            stopped = asyncio.ensure_future(self._stopped.wait())
            ends: list[asyncio.Future[Any]] = [child.exit_code, stopped]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if child.exit_code.done():
                await child.all_lines_read()
        return child.exit_code.result() if child.exit_code.done() else -signal.SIGKILL

    def _put(self, pipe: str, line: str) -> None:
        self._lines.put_nowait((pipe, line))


def _is_free(address: str) -> bool:
    where = parse(address)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((where.host, where.port))
        except OSError:
            return False
    return True
