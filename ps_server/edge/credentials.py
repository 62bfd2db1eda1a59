"""A server's certificates and tokens, read from files again when these change."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc

from modelaverage.access.certificate_names import broken_chain, certificates_in
from modelaverage.access.contexts import server_context
from modelaverage.access.pem import read_authorities, read_identity
from modelaverage.access.tokens import read_tokens
from modelaverage.access.watched_files import WatchedFiles
from modelaverage.errors import SecurityError
from modelaverage.logs import event
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role, Tokens

__all__ = ["ServerTls", "tokens_of"]

_log = logging.getLogger("ps_server")


class _Identity(NamedTuple):
    """The same files for gRPC's connections and for those beside them."""

    of_calls: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


class ServerTls:
    """How a server with a certificate encrypts. Each new connection uses the files' present content. For any thread.

    Args:
        cert_file: its certificate (PEM), followed by any intermediate ones.
        key_file: the certificate's key.
        client_ca: authorities, one of which must have signed a client's certificate; None: clients need none.

    Raises:
        SecurityError: a file is missing or unusable.
    """

    def __init__(self, cert_file: Path, key_file: Path, client_ca: Path | None) -> None:
        self._cert_file, self._key_file, self._client_ca = cert_file, key_file, client_ca
        self._is_read = False
        paths = [path for path in (cert_file, key_file, client_ca) if path is not None]
        self._files = WatchedFiles(paths, self._read, lambda error: _keep("certificate", error))

    @classmethod
    def of(cls, security: ServerSecurity) -> ServerTls | None:
        """None: the server has no certificate, so it listens in plain text. Raises SecurityError."""
        if security.tls_cert is None or security.tls_key is None:
            return None
        return cls(security.tls_cert, security.tls_key, security.tls_client_ca)

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for gRPC to listen with on one address: it uses an object only once."""
        current = self._files.get().of_calls

        def news() -> grpc.ServerCertificateConfiguration | None:  # gRPC calls this before every handshake
            nonlocal current
            before, current = current, self._files.get().of_calls
            return None if current is before else current

        return grpc.dynamic_ssl_server_credentials(
            current,
            news,  # type: ignore[arg-type]  # the stubs forget that None means: no change
            require_client_authentication=self._client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For the next connection beside the calls."""
        return self._files.get().context

    def _read(self) -> _Identity:
        certificates, key = read_identity(self._cert_file, self._key_file)
        authorities = None if self._client_ca is None else read_authorities(self._client_ca)
        found = _Identity(
            grpc.ssl_server_certificate_configuration([(key, certificates)], authorities),
            server_context(self._cert_file, self._key_file, authorities),
        )
        path = str(self._cert_file)
        problem = broken_chain(certificates_in(certificates.decode("latin-1")))
        if problem is not None:
            _log.warning(
                "%s is not a whole chain: %s; clients may not trust it. Append to the server's certificate that of the "
                "authority that signed it, then that of the next one",
                path,
                problem,
                extra=event("certificate_chain_broken", path=path, cause=problem),
            )
        if self._is_read:
            changed = event("certificate_changed", path=path)
            _log.warning("the certificate in %s has changed; new connections get it", path, extra=changed)
        self._is_read = True
        return found


def tokens_of(security: ServerSecurity) -> WatchedFiles[Tokens] | None:
    """The tokens that the server knows; None: calls need none.

    Raises:
        SecurityError: a file is missing or unusable, or a token has two roles.
    """
    if security.token_file is None:
        return None
    worker = Role.CHIEF if security.chief_token_file is None else Role.WORKER
    files = [(security.token_file, worker)]
    if security.chief_token_file is not None:
        files.append((security.chief_token_file, Role.CHIEF))
    if security.reader_token_file is not None:
        files.append((security.reader_token_file, Role.READER))
    return WatchedFiles(
        [path for path, _ in files],
        lambda: _read_tokens(files),
        lambda error: _keep("tokens", error),
    )


def _keep(what: str, error: Exception) -> None:
    _log.warning("%s; still using the previous %s", error, what, extra=event("credentials_kept", cause=str(error)))


def _read_tokens(files: Sequence[tuple[Path, Role]]) -> Tokens:
    roles: dict[str, Role] = {}
    first_in: dict[str, Path] = {}
    for path, role in files:
        for token in read_tokens(path):
            if roles.setdefault(token, role) is not role:
                raise SecurityError(f"{first_in[token]} and {path} have a token in common; give every role its own")
            first_in.setdefault(token, path)
    return Tokens(roles)
