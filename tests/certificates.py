"""An authority for tests, and the certificates that it signs. None of it is secret."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "Identity"]

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """The files of a certificate and its key."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates. ``ca`` is the file for those who trust it.

    ``signed_by``: the authority above an intermediate one; None: it signs itself.
    """

    def __init__(self, directory: Path, name: str = "authority", signed_by: Authority | None = None) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        signer = signed_by or self
        builder = _builder(self._name, signer._name, self._key, valid_until=_now() + _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca = directory / f"{name}.pem"
        self.ca.write_bytes(builder.sign(signer._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def sign(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1"),
        expired: bool = False,
        passphrase: bytes | None = None,
    ) -> Identity:
        """A certificate for ``hosts``, and its key, in files that begin with ``name``."""
        key = ec.generate_private_key(ec.SECP256R1())
        until = _now() + (-_DAY if expired else _DAY)
        alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        certificate = (
            _builder(_name(name), self._name, key, until)
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        identity = Identity(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        identity.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        identity.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        return identity


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid_until: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(valid_until - 2 * _DAY)
        .not_valid_after(valid_until)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
