"""A TCP proxy that records every byte that goes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from modelaverage.addresses import parse

__all__ = ["Wiretap"]


class Wiretap:
    """Listens on loopback, and relays everything to ``target`` (HOST:PORT) and back."""

    def __init__(self, target: str) -> None:
        where = parse(target)
        self._target = where.host, where.port
        self._up, self._down = bytearray(), bytearray()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for open_one in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):  # the other side has closed it already
                open_one.shutdown(socket.SHUT_RDWR)
            open_one.close()
        for thread in self._threads:
            thread.join(timeout=5)

    @property
    def recorded(self) -> tuple[bytes, bytes]:
        """The bytes sent to the server, and those received from it."""
        return bytes(self._up), bytes(self._down)

    def _start(self, target: object, *arguments: object) -> None:
        assert callable(target)
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            self._start(_pass_on, client, server, self._up)
            self._start(_pass_on, server, client, self._down)


def _pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    try:
        while data := source.recv(1 << 16):
            record += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return
