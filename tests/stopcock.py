"""A TCP relay each of whose directions can be stopped silently."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

import pytest

from ma_client import DataSettings
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.contexts import Encryption
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["Stopcock", "data_through"]

# How much of what is sent to the relay may wait in it.
_ROOM_BYTES = 64 << 10


class Way:
    """One direction. While it is not ``open``, nothing gets through; what was underway comes later."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.chunk_bytes, self.pause_s = 1 << 16, 0.0
        self.passed_bytes = 0
        self._counting = threading.Lock()

    def slow(self, chunk_bytes: int, pause_s: float) -> None:
        """Makes it pause each time it has taken this many bytes."""
        self.chunk_bytes, self.pause_s = chunk_bytes, pause_s

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self.chunk_bytes):
                self.open.wait()
                with self._counting:
                    self.passed_bytes += len(data)
                target.sendall(data)
                time.sleep(self.pause_s)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


class Stopcock:
    """Listens on loopback; every connection is passed on to ``target_port``.

    Attributes:
        up: the way to the target.
        down: the way back.
        passed: how many connections there were.
    """

    def __init__(self) -> None:
        self.up, self.down, self.passed, self.target_port = Way(), Way(), 0, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM_BYTES)  # also of what it accepts
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Stopcock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.up.open.set()
        self.down.open.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):  # the other side has closed it already
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)
        for one in self._sockets:
            one.close()

    def _start(self, target: object, *arguments: object) -> None:
        assert callable(target)
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.passed += 1
                server = socket.create_connection(("127.0.0.1", self.target_port))
                self._sockets += [client, server]
                self._start(self.up.pass_on, client, server)
                self._start(self.down.pass_on, server, client)


def data_through(stopcock: Stopcock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has all data connections opened through the relay."""
    open_directly = DataSocket.open

    def opened(
        host: str, offer: pb.DataConnection, settings: DataSettings, encryption: Encryption | None = None
    ) -> DataSocket:
        stopcock.target_port = offer.port
        return open_directly(host, pb.DataConnection(port=stopcock.port, key=offer.key), settings, encryption)

    monkeypatch.setattr(DataSocket, "open", opened)
