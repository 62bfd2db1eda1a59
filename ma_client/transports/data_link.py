"""Manages the data connection to one server: opened during a push, used by later ones, paused after a failure."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from ma_client.transports.data_settings import DataSettings
from ma_client.transports.data_socket import DataSocket
from modelaverage.access.contexts import Encryption
from modelaverage.addresses import parse
from modelaverage.errors import SecurityError
from modelaverage.logs import event
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["DataLink", "host_of"]

_log = logging.getLogger("ma_client")


def host_of(address: str) -> str | None:
    """The host in a gRPC address; None: it has no host that a socket could connect to."""
    with contextlib.suppress(ValueError):
        return parse(address).host or None
    return None


class DataLink:
    """Holds at most one connection. May be used from any thread.

    Args:
        address: the gRPC address of the server.
        encryption: encrypts the connections like the calls; None: calls and connections are in plain text.
        settings: when to use data connections.
    """

    def __init__(self, address: str, encryption: Encryption | None, settings: DataSettings) -> None:
        self.address = address
        self._encryption = encryption
        self._host = host_of(address)
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: DataSocket | None = None
        self._opening = self._closed = False
        self._not_before_s = 0.0

    @property
    def is_encrypted(self) -> bool:
        """Whether its connections are encrypted, as calls to the server are."""
        return self._encryption is not None

    def wants(self, size_bytes: int) -> bool:
        """Whether to ask the server for a connection, for models of this size."""
        with self._lock:
            return size_bytes >= self._settings.least_bytes and self._lacks_one

    def open(self, offer: pb.DataConnection) -> None:
        """Connects in the background. Ignores an unwanted offer."""
        with self._lock:
            if not self._lacks_one:
                return
            self._opening = True
        try:
            threading.Thread(target=self._open, args=(offer,), name="data-connection", daemon=True).start()
        except RuntimeError as error:  # no threads are left
            self._opening = False
            self._not_opened(error)

    def take(self) -> DataSocket | None:
        """Takes the connection for a push, if there is one; `put` returns it."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None and not connection.is_open:
            connection.close()
            return None
        return connection

    def put(self, connection: DataSocket) -> None:
        """Keeps a connection for the next push, unless TLS needs new keys."""
        with self._lock:
            if not self._closed and not connection.is_spent:
                self._connection = connection
                return
        connection.close()

    def give_up(self, cause: object) -> None:
        """A push on the connection got stuck, or the connection broke although the server is reachable: pauses data
        connections for a while."""
        pause_s = self._pause()
        what = event("data_connection_given_up", peer=self.address, cause=str(cause), pause_s=pause_s)
        _log.warning(
            "%s; pushes to %s go in messages for %g s, not on a data connection",
            cause,
            self.address,
            pause_s,
            extra=what,
        )

    def server_was_away(self) -> None:
        """The server was away, which explains earlier failures: ends the pause, and discards the old
        connection."""
        self._not_before_s = 0.0
        connection = self.take()
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Closes the connection; no push follows."""
        with self._lock:
            self._closed = True
        connection = self.take()
        if connection is not None:
            connection.close()

    @property
    def _lacks_one(self) -> bool:
        may_have = self._host is not None and not self._closed and time.monotonic() >= self._not_before_s
        return may_have and self._connection is None and not self._opening

    def _pause(self) -> float:
        self._not_before_s = time.monotonic() + self._settings.pause_s
        return self._settings.pause_s

    def _open(self, offer: pb.DataConnection) -> None:
        assert self._host is not None
        try:
            self.put(DataSocket.open(self._host, offer, self._settings, self._encryption))
        except (OSError, ValueError, OverflowError, SecurityError) as error:  # not there, or no host, or no port
            self._not_opened(error)
        finally:
            self._opening = False

    def _not_opened(self, error: Exception) -> None:
        pause_s = self._pause()
        what = event("data_connection_given_up", peer=self.address, cause=str(error), pause_s=pause_s)
        level = logging.WARNING if isinstance(error, SecurityError) else logging.INFO
        _log.log(level, "no data connection to %s (%s); pushes go in messages", self.address, error, extra=what)
