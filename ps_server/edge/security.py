"""The security flags of `ps-server serve`, and whether they are enough for the addresses that it listens on."""

from __future__ import annotations

import argparse
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from modelaverage.errors import SecurityError

__all__ = [
    "NO_SECURITY",
    "ServerSecurity",
    "add_server_security_flags",
    "check_exposure",
    "page_warnings_of",
    "warnings_of",
]


@dataclass(frozen=True)
class ServerSecurity:
    """How a server identifies itself, and what it requires of its clients.

    Args:
        tls_cert: its certificate (PEM), followed by any intermediate ones; None: no TLS. Unix sockets never use TLS.
        tls_key: the certificate's key.
        tls_client_ca: authorities, one of which must have signed a client's certificate; None: clients need none.
        token_file: tokens of workers, one a line; None: calls need no token.
        chief_token_file: tokens that may also initialize; None: workers' tokens may.
        reader_token_file: tokens that may only pull and read the status; None: there are none.
        insecure: whether to listen even where strangers can connect.

    Raises:
        SecurityError: one of these needs another one that is not given.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    chief_token_file: Path | None = None
    reader_token_file: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            there, missing = ("cert", "key") if self.tls_key is None else ("key", "cert")
            raise SecurityError(f"--tls-{there} needs --tls-{missing}")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise SecurityError("--tls-client-ca needs --tls-cert and --tls-key")
        for flag, file in (
            ("--chief-token-file", self.chief_token_file),
            ("--reader-token-file", self.reader_token_file),
        ):
            if file is not None and self.token_file is None:
                raise SecurityError(f"{flag} needs --token-file, with the workers' token")


NO_SECURITY = ServerSecurity()
"""No TLS and no tokens; enough for loopback and Unix sockets."""


def add_server_security_flags(command: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `ServerSecurity`."""
    group = command.add_argument_group(
        "security",
        "All files are read again when they change. docs/security.md has a complete example.",
    )
    group.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="this server's certificate (PEM): TLS on all but unix: addresses"
    )
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    group.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="mutual TLS: clients need a certificate that one of these authorities signed",
    )
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="every call but health needs a token from this file, which has one a line; it allows every call, with the "
        "next flag every one but initialize",
    )
    group.add_argument(
        "--chief-token-file", type=Path, metavar="FILE", help="only these tokens may initialize the center"
    )
    group.add_argument(
        "--reader-token-file", type=Path, metavar="FILE", help="these tokens may pull and see the status, nothing else"
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="listen beyond this machine even though neither TLS nor a token keeps strangers out",
    )


def check_exposure(host: str, bind: str, security: ServerSecurity, flag: str = "--bind") -> None:
    """Refuses to listen where strangers can connect, unless TLS, tokens or ``insecure`` are set.

    Args:
        host: of a TCP address.
        bind: the address as it was given, for the message.
        security: the server's settings.
        flag: that gave the address, for the message.

    Raises:
        SecurityError: nothing keeps strangers out.
    """
    if security.tls_cert is None and security.token_file is None and not security.insecure and not _is_loopback(host):
        raise SecurityError(
            f"{flag} {bind} may be reached from other machines, and neither TLS (--tls-cert, --tls-key) nor a token "
            "(--token-file) keeps strangers out; give one of them, or --insecure on a network that you trust"
        )


def warnings_of(host: str, bind: str, security: ServerSecurity) -> list[str]:
    """Warnings for the operator about one TCP address."""
    if _is_loopback(host):
        return []
    if security.tls_cert is None and security.token_file is None:
        return [f"{bind} is --insecure: anyone who can reach it can read and replace the model"]
    if security.tls_cert is None:
        return [f"{bind} has no TLS: anyone who can read the network's traffic can read the token and the model"]
    if security.token_file is None and security.tls_client_ca is None:
        return [
            f"{bind} has TLS but neither --token-file nor --tls-client-ca: anyone who can reach it can read and "
            "replace the model"
        ]
    return []


def page_warnings_of(host: str, bind: str, security: ServerSecurity) -> list[str]:
    """Warnings for the operator about the address of the page, which can only be read."""
    if _is_loopback(host):
        return []
    if security.token_file is None and security.tls_client_ca is None:
        return [f"the page at {bind} is open to anyone who can reach it: neither --token-file nor --tls-client-ca"]
    if security.tls_cert is None:
        return [f"the page at {bind} has no TLS: anyone who can read the network's traffic can read the token"]
    return []


def _is_loopback(host: str) -> bool:
    """Whether every address of the host is on loopback; True for a host without an address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
