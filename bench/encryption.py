"""TLS for a benchmark's server and its workers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ma_client import Security, Tls
from tests.certificates import Authority

__all__ = ["security_of", "server_tls"]


@contextmanager
def server_tls(is_on: bool) -> Iterator[tuple[tuple[str, ...], Path | None]]:
    """The flags with which a server encrypts, and the file of the authority that its workers trust; without TLS, no
    flags and None."""
    if not is_on:
        yield (), None
        return
    with tempfile.TemporaryDirectory() as directory:
        authority = Authority(Path(directory))
        server = authority.sign("server")
        yield ("--tls-cert", str(server.cert), "--tls-key", str(server.key)), authority.ca


def security_of(ca_file: Path | None) -> Security:
    """What a session to that server is given."""
    return Security(None if ca_file is None else Tls(ca_file))
