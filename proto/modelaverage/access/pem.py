"""Reads and checks certificates and keys in PEM files; errors name the file."""

from __future__ import annotations

import ssl
from pathlib import Path

from modelaverage.errors import SecurityError

__all__ = ["read_authorities", "read_file", "read_identity"]

_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = b"PRIVATE KEY-----"


def read_authorities(ca_file: Path) -> bytes:
    """The certificates of trusted authorities.

    Raises:
        SecurityError: the file cannot be read, or has no certificate.
    """
    pem = _read_certificates(ca_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("latin-1"))
    except ssl.SSLError as error:
        raise SecurityError(f"{ca_file} has a certificate that cannot be read: {_words(error)}") from None
    return pem


def read_identity(cert_file: Path, key_file: Path) -> tuple[bytes, bytes]:
    """A key and its certificate, which is followed by any intermediate ones.

    Raises:
        SecurityError: a file cannot be read or is no PEM, the key has a passphrase, or is another certificate's.
    """
    certificates = _read_certificates(cert_file)
    key = read_file(key_file)
    if _KEY not in key:
        raise SecurityError(f"{key_file} has no private key in PEM form (-----BEGIN PRIVATE KEY-----)")
    try:
        # Without this password, OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SecurityError(
                f"the key in {key_file} does not belong to the certificate in {cert_file}; give a matching pair"
            ) from None
        raise SecurityError(
            f"{cert_file} and {key_file} cannot be used: {_words(error)}; the key must not have a passphrase"
        ) from None
    except OSError as error:
        raise SecurityError(f"cannot read {cert_file} and {key_file}: {error.strerror or error}") from None
    return certificates, key


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises SecurityError, naming it, if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecurityError(f"cannot read {path}: {error.strerror or error}") from None


def _read_certificates(path: Path) -> bytes:
    pem = read_file(path)
    if _CERTIFICATE not in pem:
        raise SecurityError(f"{path} has no certificate in PEM form ({_CERTIFICATE.decode()})")
    return pem


def _words(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")
