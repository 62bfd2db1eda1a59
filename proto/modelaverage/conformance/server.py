"""The real parameter server, as a process on a free port of loopback."""

from __future__ import annotations

import subprocess
import sys
import threading

__all__ = ["Server", "ServerError"]

_START_TIMEOUT_S = 30.0


class ServerError(Exception):
    """The server did not start: not the client's fault."""


class Server:
    """`ps-server serve`, until `kill`; a restart uses the same port.

    Args:
        flags: of the command, besides `--bind`.

    Raises:
        ServerError: it does not start.
    """

    def __init__(self, *flags: str) -> None:
        self._flags = flags
        self.address = "127.0.0.1:0"
        """HOST:PORT."""
        self.start()

    def start(self) -> None:
        """Starts it (a second time: on the same port) and returns when it listens."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ps_server", "serve", "--bind", self.address, *self._flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        # If it never prints a line, killing it ends the wait.
        watchdog = threading.Timer(_START_TIMEOUT_S, self._process.kill)
        watchdog.start()
        line = self._process.stdout.readline()
        watchdog.cancel()
        if not line:
            _, errors = self._process.communicate()
            raise ServerError(f"the parameter server did not start: {errors.strip() or 'it said nothing'}")
        self.address = line.split()[-1]

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.communicate()
