"""TLS for connections beside the calls: with the files and checks of gRPC's connections, and always TLS 1.3."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelaverage.access import handshake
from modelaverage.access.security import Tls
from modelaverage.errors import SecurityError

__all__ = ["Encryption", "client_context", "server_context"]


def server_context(cert_file: Path, key_file: Path, authorities: bytes | None) -> ssl.SSLContext:
    """For the server's end.

    Args:
        cert_file: its certificate, followed by any intermediate ones.
        key_file: its key.
        authorities: one of them must have signed a client's certificate; None: clients need none.

    Raises:
        SecurityError: a file has changed since it was checked, and is unusable.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, cert_file, key_file)
    context.num_tickets = 0  # no connection is resumed, and between two pushes nothing else may arrive
    if authorities is not None:
        context.load_verify_locations(cadata=authorities.decode("latin-1"))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(authorities: bytes | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """For a client's end.

    Args:
        authorities: one of them must have signed the server's certificate; None: those of this system.
        cert_file: the client's own certificate; None: it has none.
        key_file: its key.

    Raises:
        SecurityError: a file has changed since it was checked, and is unusable.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT, cert_file, key_file)
    if authorities is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(cadata=authorities.decode("latin-1"))
    return context


@dataclass(frozen=True)
class Encryption:
    """TLS for a client's connections beside its calls to one server.

    Args:
        address: of the server.
        tls: the client's settings.
        context: returns the current context: changed files count for the next connection.
    """

    address: str
    tls: Tls
    context: Callable[[], ssl.SSLContext]

    def encrypted(self, connection: socket.socket, host: str) -> ssl.SSLSocket:
        """Makes the handshake, within the socket's timeout, and checks the server's certificate.

        Raises:
            SecurityError: the server is not trusted; the message says what to do.
            OSError: the handshake fails otherwise.
        """
        try:
            return self.context().wrap_socket(connection, server_hostname=self.tls.server_name or host)
        except ssl.SSLError as error:
            raise self.named(error, host) from None

    def named(self, error: OSError, host: str) -> OSError | SecurityError:
        """A SecurityError if the error means that server and client do not trust each other; otherwise the error."""
        why = handshake.distrust(self.address, host, self.tls, error)
        return error if why is None else SecurityError(f"the data connection fails: {why}")


def _context(protocol: int, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The kernel encrypts, where Python (3.12), OpenSSL and the kernel can do that.
    context.options |= getattr(ssl, "OP_ENABLE_KTLS", 0)
    if cert_file is not None:
        try:
            # Without this password, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(cert_file, key_file, password=lambda: b"")
        except (ssl.SSLError, OSError) as error:
            raise SecurityError(f"{cert_file} and {key_file} cannot be used: {error.strerror or error}") from None
    return context
