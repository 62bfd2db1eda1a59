"""Why a TLS handshake fails, and what to do: gRPC itself only reports that the server cannot be reached.

Only messages depend on this: gRPC itself decides whom to trust.
"""

from __future__ import annotations

import socket
import ssl

from modelaverage.access.certificate_names import CertificateNames, shown_name
from modelaverage.access.security import TLS_CA, TLS_CERT, TLS_KEY, TLS_SERVER_NAME, Tls
from modelaverage.addresses import parse

__all__ = ["distrust", "problem"]

_TIMEOUT_S = 2.0
# X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT, ..._LOCALLY, X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE
_ISSUER_MISSING = (2, 20, 21)
# HTTP/2's client preface with empty settings: a server that accepts it has accepted the client's certificate.
_FIRST_WORDS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def problem(address: str, tls: Tls | None) -> str | None:
    """Why a TLS handshake with the server at ``address`` fails.

    Returns:
        One line; None if it succeeds, or if nothing answers there.
    """
    try:
        where = parse(address)
    except ValueError:
        return None
    if where.path:
        return None
    try:
        with socket.create_connection((where.host, where.port), _TIMEOUT_S) as connection:
            if tls is None:
                return _problem_in_plain_text(address, connection)
            return _problem(address, where.host, connection, tls)
    except (
        OSError,
        OverflowError,
        UnicodeError,
    ):  # nothing listens there, or it is not an address: gRPC's own error is better
        return None


def _problem_in_plain_text(address: str, connection: socket.socket) -> str | None:
    context = _context(None)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the only question is whether there is TLS
    try:
        with context.wrap_socket(connection):
            return f"{address} wants TLS; say which authority signed its certificate (Tls(ca_file=...) or {TLS_CA})"
    except (ssl.SSLError, OSError):
        return None


def _problem(address: str, host: str, connection: socket.socket, tls: Tls) -> str | None:
    context = _context(tls)
    greeted = False
    try:
        with context.wrap_socket(connection, server_hostname=tls.server_name or host) as secure:
            greeted = True
            secure.sendall(_FIRST_WORDS)
            if secure.recv(1):
                return None
            return _of_own_certificate(address, tls, "it hung up")
    except ssl.SSLError as error:
        why = distrust(address, host, tls, error)
        if why is None and not greeted:
            reason = (error.reason or "").lower().replace("_", " ")
            return f"{address} does not speak TLS ({reason}); start it with --tls-cert and --tls-key, or unset {TLS_CA}"
        return why
    except OSError:
        return _of_own_certificate(address, tls, "it hung up") if greeted else None


def distrust(address: str, host: str, tls: Tls, error: OSError) -> str | None:
    """Why client and server do not trust each other, from the error of a handshake or of the first read after it.

    Returns:
        One line; None if the error does not say so.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_server_certificate(address, tls.server_name or host, tls, error)
    reason = error.reason or "" if isinstance(error, ssl.SSLError) else ""
    if "ALERT" not in reason or "PROTOCOL_VERSION" in reason:
        return None
    return _of_own_certificate(address, tls, reason.partition("ALERT_")[2].lower().replace("_", " "))


def _of_server_certificate(address: str, name: str, tls: Tls, error: ssl.SSLCertVerificationError) -> str:
    match error.verify_code:
        case 9:  # X509_V_ERR_CERT_NOT_YET_VALID
            return f"the certificate of {address} is not valid yet; correct the clocks, or give the server another one"
        case 10:  # X509_V_ERR_CERT_HAS_EXPIRED
            return f"the certificate of {address} has expired; give the server a new one (its --tls-cert and --tls-key)"
        case 62 | 64:  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return (
                f"the certificate of {address} is not for {name!r}; connect to a name that it covers, or give one of "
                f"its names (Tls(server_name=...) or {TLS_SERVER_NAME})"
            )
        case code:
            trusted = "no public authority" if tls.ca_file is None else f"no authority in {tls.ca_file}"
            between = _of_intermediate(address, tls) if code in _ISSUER_MISSING else ""
            return (
                f"{trusted} signed the certificate of {address} ({error.verify_message}); {between}give the "
                f"certificate of the authority that did (Tls(ca_file=...) or {TLS_CA})"
            )


def _of_intermediate(address: str, tls: Tls) -> str:
    """If an intermediate certificate may be missing: its name, and where to put it."""
    chain = _chain_of(address, tls)
    if not chain or chain[-1].issuer == chain[-1].subject:
        return ""
    return (
        f"if {shown_name(chain[-1].issuer)} is an intermediate authority, its certificate is missing: append it to "
        "the server's own, in the file of its --tls-cert; otherwise "
    )


def _chain_of(address: str, tls: Tls) -> list[CertificateNames]:
    """The certificates that the server sends, its own first; with an older Python only that one."""
    context = _context(tls)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificates are only read, not trusted
    try:
        where = parse(address)
        with (
            socket.create_connection((where.host, where.port), _TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=tls.server_name or where.host) as secure,
        ):
            if hasattr(secure, "get_unverified_chain"):  # Python 3.13
                return [CertificateNames.of(der) for der in secure.get_unverified_chain()]
            own = secure.getpeercert(binary_form=True)
            return [] if own is None else [CertificateNames.of(own)]
    except (OSError, ValueError):
        return []


def _of_own_certificate(address: str, tls: Tls, why: str) -> str:
    if tls.cert_file is None:
        return (
            f"{address} wants a certificate from this client ({why}); give one that its --tls-client-ca signed "
            f"(Tls(cert_file=..., key_file=...) or {TLS_CERT} and {TLS_KEY})"
        )
    return (
        f"{address} refuses the certificate in {tls.cert_file} ({why}); give one that has not "
        "expired and that its --tls-client-ca signed; if an intermediate authority signed it, append that authority's "
        "certificate to the file"
    )


def _context(tls: Tls | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls is not None:
        if tls.ca_file is None:
            context.load_default_certs()
        else:
            context.load_verify_locations(tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    return context
