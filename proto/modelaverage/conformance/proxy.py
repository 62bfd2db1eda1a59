"""A TCP proxy between client and server that breaks connections when a case says so."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence

from modelaverage.addresses import parse

__all__ = ["Proxy"]

_READ_BYTES = 1 << 16


class Proxy:
    """Forwards connections until `end`. After a break, a client may reconnect at once.

    Args:
        target: HOST:PORT of the server.
    """

    def __init__(self, target: str) -> None:
        where = parse(target)
        self._target = where.host, where.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        """HOST:PORT for the client."""
        self.cuts = 0
        """How often it has broken connections."""
        self._lock = threading.Lock()
        self._left: dict[str, list[int]] = {"up": [], "down": []}
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, up_bytes: Sequence[int] = (), down_bytes: Sequence[int] = ()) -> None:
        """Breaks all connections after the first number of bytes has passed up (to the server) or down, again after the
        second number more, and so on."""
        with self._lock:
            self._left = {"up": list(up_bytes), "down": list(down_bytes)}

    def hold_down(self) -> None:
        """Holds back what the server sends, until the next `cut`."""
        self._open.clear()

    def cut(self) -> None:
        """Breaks all connections now."""
        with self._lock:
            self._cut()
        self._open.set()

    def end(self) -> None:
        """Accepts no more connections, and breaks those that there are."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # it has ended
                return
            try:
                server = socket.create_connection(self._target, timeout=5)
            except OSError:  # the server is away
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._pairs.append((client, server))
            threading.Thread(target=self._pump, args=(client, server, "up"), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, "down"), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if way == "down":
                    self._open.wait()
                if not self._pass(data, sink, way):
                    break
        _close(source)
        _close(sink)

    def _pass(self, data: bytes, sink: socket.socket, way: str) -> bool:
        """Forwards the bytes up to the next break; returns whether the connection still exists."""
        with self._lock:
            left = self._left[way]
            data = data[: left[0]] if left else data
            if left:
                left[0] -= len(data)
        sink.sendall(data)
        with self._lock:
            if not left or left[0] > 0:
                return True
            del left[0]
            self._cut()
            return False

    def _cut(self) -> None:
        self.cuts += 1
        for pair in self._pairs:
            for one in pair:
                _close(one)
        self._pairs.clear()


def _close(one: socket.socket) -> None:
    # A close alone does not wake a thread that reads from it.
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
