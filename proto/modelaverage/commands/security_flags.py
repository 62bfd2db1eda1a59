"""The flags for TLS and tokens; the environment has the values of those that are not given."""

from __future__ import annotations

import argparse
import os

from modelaverage.access.security import TLS_CA, TLS_CERT, TLS_KEY, TLS_SERVER_NAME, TOKEN_FILE, Security

__all__ = ["add_security_flags", "security_of"]


def add_security_flags(command: argparse.ArgumentParser) -> None:
    """Adds --tls-ca, --tls-cert, --tls-key, --tls-server-name and --token-file to a client's command."""
    group = command.add_argument_group("security", "For servers with TLS or tokens (docs/security.md).")
    group.add_argument(
        "--tls-ca", metavar="FILE", help=f"use TLS; the authority that signed the servers' certificates ({TLS_CA})"
    )
    group.add_argument(
        "--tls-cert", metavar="FILE", help=f"this client's certificate, for a server with --tls-client-ca ({TLS_CERT})"
    )
    group.add_argument("--tls-key", metavar="FILE", help=f"its key ({TLS_KEY})")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"the name in the servers' certificates, if it is not the one in their addresses ({TLS_SERVER_NAME})",
    )
    group.add_argument("--token-file", metavar="FILE", help=f"a file with the token ({TOKEN_FILE})")


def security_of(arguments: argparse.Namespace) -> Security:
    """The settings from the flags; for flags that are not given, from the environment.

    Raises:
        SecurityError: a certificate without its key, or a key without its certificate.
    """
    told = {
        TLS_CA: arguments.tls_ca,
        TLS_CERT: arguments.tls_cert,
        TLS_KEY: arguments.tls_key,
        TLS_SERVER_NAME: arguments.tls_server_name,
        TOKEN_FILE: arguments.token_file,
    }
    return Security.from_env({**os.environ, **{name: value for name, value in told.items() if value is not None}})
