"""Channels to parameter servers, the token in every call, and why a channel fails."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from modelaverage.access import handshake, proxies
from modelaverage.access.contexts import Encryption, client_context
from modelaverage.access.pem import read_authorities, read_identity
from modelaverage.access.renewed_channel import RenewedChannel
from modelaverage.access.security import Security, Tls
from modelaverage.access.tokens import bearer, read_tokens
from modelaverage.access.watched_files import WatchedFiles
from modelaverage.errors import SecurityError
from modelaverage.logs import event

__all__ = ["Access"]

_log = logging.getLogger("modelaverage")
_Metadata = tuple[tuple[str, str], ...]


class _Credentials(NamedTuple):
    """The same files for gRPC's connections and for those beside them."""

    of_channels: grpc.ChannelCredentials
    context: ssl.SSLContext


class Access:
    """Opens channels to servers and provides the metadata of calls. Safe for any thread.

    Args:
        security: certificates and token. The files are read here, and again when they change: later calls carry the new
            token and use a connection with the new certificates.

    Raises:
        SecurityError: a file is missing or unusable; the message names it.
    """

    def __init__(self, security: Security) -> None:
        self._tls = tls = security.tls
        self._credentials = None if tls is None else _credentials_of(tls)
        self._token: WatchedFiles[_Metadata] | None = None
        self._metadata: _Metadata = () if security.token is None else bearer(security.token)
        if security.token_file is not None:
            path = Path(security.token_file)
            self._token = WatchedFiles(
                (path,), lambda: bearer(read_tokens(path)[0]), lambda error: _keep("token", error)
            )

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A channel to a server, encrypted if `is_encrypted` says so. It uses no proxy unless `proxies.USE_PROXY` is
        set."""
        options = [proxies.option(), *options]
        if self._credentials is None or self._tls is None or not self.is_encrypted(address):
            return grpc.insecure_channel(address, options=options)
        if self._tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self._tls.server_name)]
        files = self._credentials
        return RenewedChannel(
            lambda: files.get().of_channels, lambda now: grpc.secure_channel(address, now, options=options)
        )

    def is_encrypted(self, address: str) -> bool:
        """Whether channels to ``address`` are encrypted. Those over Unix sockets, which stay on the host, are not."""
        return self._tls is not None and not address.startswith("unix:")

    def encryption(self, address: str) -> Encryption | None:
        """TLS for connections beside the calls to ``address``; None: they are in plain text, like the calls."""
        files = self._credentials
        if files is None or self._tls is None or not self.is_encrypted(address):
            return None
        return Encryption(address, self._tls, lambda: files.get().context)

    @property
    def metadata(self) -> _Metadata:
        """The metadata for the next call."""
        return self._metadata if self._token is None else self._token.get()

    def problem(self, address: str) -> str | None:
        """Why the server at ``address`` and this client do not trust each other; None: that is not the problem.

        Connects to the server to find out, which takes a few seconds at most. gRPC itself only reports that the server
        cannot be reached.
        """
        return handshake.problem(address, self._tls)


def _credentials_of(tls: Tls) -> WatchedFiles[_Credentials]:
    """Raises SecurityError."""
    ca_file, cert_file, key_file = (
        None if path is None else Path(path) for path in (tls.ca_file, tls.cert_file, tls.key_file)
    )

    def read() -> _Credentials:
        authorities = None if ca_file is None else read_authorities(ca_file)
        cert = key = None
        if cert_file is not None and key_file is not None:
            cert, key = read_identity(cert_file, key_file)
        return _Credentials(
            grpc.ssl_channel_credentials(authorities, key, cert), client_context(authorities, cert_file, key_file)
        )

    paths = [path for path in (ca_file, cert_file, key_file) if path is not None]
    return WatchedFiles(paths, read, lambda error: _keep("certificates", error))


def _keep(what: str, error: SecurityError) -> None:
    _log.warning("%s; still using the previous %s", error, what, extra=event("credentials_kept", cause=str(error)))
