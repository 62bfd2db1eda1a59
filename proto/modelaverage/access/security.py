"""A client's security settings, and the environment variables for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modelaverage.access.tokens import check_token
from modelaverage.errors import SecurityError

__all__ = ["Security", "TLS_CA", "TLS_CERT", "TLS_KEY", "TLS_SERVER_NAME", "TOKEN_FILE", "Tls"]

TLS_CA = "MA_TLS_CA"
TLS_CERT = "MA_TLS_CERT"
TLS_KEY = "MA_TLS_KEY"
TLS_SERVER_NAME = "MA_TLS_SERVER_NAME"
TOKEN_FILE = "MA_TOKEN_FILE"

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Tls:
    """TLS to the parameter servers. All files are PEM.

    Args:
        ca_file: certificates of the authorities that sign the servers' certificates; None: gRPC's public authorities.
        cert_file: this client's certificate, for servers with --tls-client-ca.
        key_file: its key.
        server_name: the name in the servers' certificates, if it differs from the one in their addresses.

    Raises:
        SecurityError: only one of ``cert_file`` and ``key_file`` is given.
    """

    ca_file: _Path | None = None
    cert_file: _Path | None = None
    key_file: _Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            there, missing = ("certificate", "key") if self.key_file is None else ("key", "certificate")
            raise SecurityError(
                f"the {there} {self.cert_file or self.key_file} has no {missing} beside it; give both "
                f"({TLS_CERT} and {TLS_KEY}, --tls-cert and --tls-key)"
            )


@dataclass(frozen=True)
class Security:
    """How a client and the parameter servers authenticate each other.

    Args:
        tls: TLS with the servers, except over Unix sockets; None: plain text.
        token: the secret that identifies this client to the servers; None: the one in ``token_file``.
        token_file: a file whose first line is the token; read again when it changes. None: no file.

    Raises:
        SecurityError: ``token`` is malformed, or ``token_file`` is given as well.
    """

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    token_file: _Path | None = None

    def __post_init__(self) -> None:
        if self.token is not None:
            check_token(self.token, "token")
            if self.token_file is not None:
                raise SecurityError(
                    f"both a token and the token_file {self.token_file} are given; give only one of them"
                )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Security:
        """Reads MA_TLS_CA, MA_TLS_CERT, MA_TLS_KEY, MA_TLS_SERVER_NAME and MA_TOKEN_FILE.

        TLS is on if one of the first four is set. An empty variable counts as not set.

        Raises:
            SecurityError: a certificate without its key, or a key without its certificate.
        """
        ca, cert, key, name, token_file = (
            environ.get(variable) or None for variable in (TLS_CA, TLS_CERT, TLS_KEY, TLS_SERVER_NAME, TOKEN_FILE)
        )
        tls = Tls(ca, cert, key, name) if any((ca, cert, key, name)) else None
        return cls(tls, token_file=token_file)

    def to_env(self) -> dict[str, str]:
        """The variables that pass these settings to other processes, with absolute paths.

        Raises:
            SecurityError: the token is not in a file: an environment is no place for it.
        """
        if self.token is not None:
            raise SecurityError("a token for other processes has to be in a file; give a token_file")
        tls = self.tls or Tls()
        files = {TLS_CA: tls.ca_file, TLS_CERT: tls.cert_file, TLS_KEY: tls.key_file, TOKEN_FILE: self.token_file}
        found = {name: str(Path(path).absolute()) for name, path in files.items() if path is not None}
        return {**found, **({} if tls.server_name is None else {TLS_SERVER_NAME: tls.server_name})}
