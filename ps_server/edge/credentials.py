"""A server's certificates and tokens, read from files again when these change."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import grpc

from modelaverage.access.certificate_names import broken_chain, certificates_in
from modelaverage.access.pem import read_authorities, read_identity
from modelaverage.access.tokens import read_tokens
from modelaverage.access.watched_files import WatchedFiles
from modelaverage.errors import SecurityError
from modelaverage.logs import event
from ps_server.edge.security import ServerSecurity
from ps_server.rules.authorization import Role, Tokens

__all__ = ["credentials_of", "tokens_of"]

_log = logging.getLogger("ps_server")


def credentials_of(security: ServerSecurity) -> grpc.ServerCredentials | None:
    """The credentials to listen with; None: plain text. Each new connection uses the files' present certificate.

    Raises:
        SecurityError: a file is missing or unusable.
    """
    cert_file, key_file, client_ca = security.tls_cert, security.tls_key, security.tls_client_ca
    if cert_file is None or key_file is None:
        return None

    def read() -> grpc.ServerCertificateConfiguration:
        certificates, key = read_identity(cert_file, key_file)
        problem = broken_chain(certificates_in(certificates.decode("latin-1")))
        if problem is not None:
            _log.warning(
                "%s is not a whole chain: %s; clients may not trust it. Append to the server's certificate that of the "
                "authority that signed it, then that of the next one",
                cert_file,
                problem,
                extra=event("certificate_chain_broken", path=str(cert_file), cause=problem),
            )
        authorities = None if client_ca is None else read_authorities(client_ca)
        return grpc.ssl_server_certificate_configuration([(key, certificates)], authorities)

    paths = [path for path in (cert_file, key_file, client_ca) if path is not None]
    files = WatchedFiles(paths, read, lambda error: _keep("certificate", error))

    def news() -> grpc.ServerCertificateConfiguration | None:  # gRPC calls this before every handshake
        configuration = files.news()
        if configuration is not None:
            _log.warning(
                "the certificate in %s has changed; new connections get it",
                cert_file,
                extra=event("certificate_changed", path=str(cert_file)),
            )
        return configuration

    return grpc.dynamic_ssl_server_credentials(
        files.get(),
        news,  # type: ignore[arg-type]  # the stubs forget that None means: no change
        require_client_authentication=client_ca is not None,
    )


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
