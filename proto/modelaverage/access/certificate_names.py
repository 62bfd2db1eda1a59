"""Subject and issuer of a certificate: as much of X.509 as messages need. No decision about trust depends on it."""

from __future__ import annotations

import itertools
import ssl
from dataclasses import dataclass

__all__ = ["CertificateNames", "broken_chain", "certificates_in", "shown_name"]

_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
_VERSION_TAG = 0xA0
# Serial number, algorithm, issuer, validity, subject.
_FIELD_TAGS = (0x02, 0x30, 0x30, 0x30, 0x30)
# commonName, organizationName: the last byte of their OIDs, after 2.5.4.
_NAMES = (3, 10)


@dataclass(frozen=True)
class CertificateNames:
    """The names in a certificate, as encoded there.

    Args:
        subject: the certificate's owner.
        issuer: the signer.
    """

    subject: bytes
    issuer: bytes

    @classmethod
    def of(cls, der: bytes) -> CertificateNames:
        """Reads a certificate in DER form. Raises ValueError if the bytes are not one."""
        try:
            _, begin, _ = _element(der, 0)  # the certificate
            _, at, _ = _element(der, begin)  # what is signed of it
            tag, _, end = _element(der, at)
            at = end if tag == _VERSION_TAG else at
            found = []
            for expected in _FIELD_TAGS:
                tag, _, end = _element(der, at)
                if tag != expected:
                    raise IndexError
                found.append(der[at:end])
                at = end
        except IndexError:
            raise ValueError("no certificate") from None
        return cls(subject=found[4], issuer=found[2])


def certificates_in(pem: str) -> list[CertificateNames]:
    """The names of every certificate in a file, in order, up to the first that cannot be read."""
    found = []
    for part in pem.split(_BEGIN)[1:]:
        try:
            der = ssl.PEM_cert_to_DER_cert(_BEGIN + part.partition(_END)[0] + _END)
            found.append(CertificateNames.of(der))
        except ValueError:
            continue
    return found


def broken_chain(chain: list[CertificateNames]) -> str | None:
    """Says where a certificate is not signed by the next one; None: each is."""
    for number, (one, following) in enumerate(itertools.pairwise(chain), start=1):
        if one.issuer != following.subject:
            return (
                f"certificate {number} was signed by {shown_name(one.issuer)}, but certificate {number + 1} is that of "
                f"{shown_name(following.subject)}"
            )
    return None


def shown_name(name: bytes) -> str:
    """The common name, or otherwise the organization's, for people."""
    found = _texts(name)
    return next((repr(found[kind]) for kind in _NAMES if kind in found), "an unnamed authority")


def _texts(name: bytes) -> dict[int, str]:
    """The parts of a name, by the last byte of their OID."""
    found: dict[int, str] = {}
    try:
        _, at, end = _element(name, 0)
        while at < end:
            _, begin, at = _element(name, at)  # usually a set of one
            _, kind_at, _ = _element(name, begin)
            _, oid_begin, oid_end = _element(name, kind_at)
            _, text_begin, text_end = _element(name, oid_end)
            if name[oid_begin : oid_end - 1] == b"\x55\x04":
                found.setdefault(name[oid_end - 1], name[text_begin:text_end].decode("utf-8", "replace"))
    except IndexError:
        pass
    return found


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """A DER element: its tag, and where its content begins and ends. Raises IndexError."""
    length, begin = data[at + 1], at + 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(data[at + 2 : begin], "big")
    if begin + length > len(data):
        raise IndexError
    return data[at], begin, begin + length
