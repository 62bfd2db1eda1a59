"""Addresses of servers as people write them: HOST:PORT or unix:PATH. Errors say what to write instead."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Address", "check_all", "parse", "split"]

_MAX_PORT = 65535
_EXAMPLE_PORT = 2222
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/+)(?P<rest>.*)")
_BRACKETS = re.compile(r"\[(?P<host>[^\]]*)\](?::(?P<port>.*))?")
_PORT = re.compile(r"[0-9]{1,5}")
# A resolver may accept these, but in addresses they have another meaning.
_NOT_IN_HOSTS = re.compile(r"[@?#\\\[\]%,;\"']")


@dataclass(frozen=True)
class Address:
    """One address.

    Args:
        host: a name or an IP address without brackets; empty for a Unix socket.
        port: 0: any free port; also 0 for a Unix socket.
        path: of a Unix socket; otherwise empty.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        """In the form that gRPC accepts."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str, to_listen: bool = False) -> Address:
    """Reads an address.

    Args:
        text: HOST:PORT or unix:PATH; an IPv6 address in brackets.
        to_listen: whether port 0 (any free port) is allowed.

    Raises:
        ValueError: it is neither; one line that says why, and what to write.
    """
    problem, better = "", ""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path and not re.search(r"\s", path):
            return Address(path=path)
        problem = "it has no path" if not path else "there is a space in it"
        raise ValueError(f"{text!r} is not unix:PATH, such as unix:/tmp/ps.sock: {problem}")
    if not text.strip():
        problem = "it is empty"
    elif re.search(r"\s", text):
        problem = "there is a space in it"
    elif scheme := _SCHEME.fullmatch(text):
        problem, better = f"it begins with {scheme['scheme']!r}", scheme["rest"].partition("/")[0]
    elif "/" in text:
        better, _, path = text.partition("/")
        problem = f"there is a path in it, {'/' + path!r}"
    else:
        return _host_and_port(text, to_listen)
    raise _refusal(text, problem, _like_it(better))


def split(text: str) -> tuple[str, ...]:
    """Splits addresses at commas. Raises ValueError if one is malformed."""
    found = tuple(address.strip() for address in text.split(","))
    if len(found) > 1 and "" in found:
        raise ValueError(
            f"{text!r} is not HOST:PORT[,HOST:PORT...]: an address is missing between two commas, or at an end"
        )
    check_all(found)
    return found


def check_all(addresses: Iterable[object]) -> None:
    """Raises ValueError if one is malformed."""
    for address in addresses:
        if not isinstance(address, str):
            raise ValueError(f"{address!r} is not HOST:PORT: it is not a string")
        parse(address)


def _host_and_port(text: str, to_listen: bool) -> Address:
    brackets = _BRACKETS.fullmatch(text)
    if brackets is not None:
        host, port = brackets["host"], brackets["port"]
        if not _is_ipv6(host):
            raise _refusal(text, f"{host!r} is not an IPv6 address, and only those take brackets", "")
    elif text.count(":") > 1:
        host, _, port = text.rpartition(":")
        if _is_port(port) and _is_ipv6(host.removesuffix(":") if host.endswith("::") else host):
            better = f"[{host}]:{port}"
        else:
            better = f"[{text}]:{_EXAMPLE_PORT}" if _is_ipv6(text) else ""
        raise _refusal(text, "an IPv6 address needs brackets" if better else "there is more than one colon", better)
    else:
        host, colon, port = text.rpartition(":")
        host, port = (host, port) if colon else (port, None)
    if not host:
        raise _refusal(text, "it has no host", f"127.0.0.1:{port}" if port and _is_port(port) else "")
    if brackets is None and (odd := _NOT_IN_HOSTS.search(host)):
        raise _refusal(text, f"a host's name cannot have {odd[0]!r} in it", "")
    shown = f"[{host}]" if brackets is not None else host
    if port is None and _is_port(host):
        raise _refusal(text, "it has no host", f"127.0.0.1:{host}")
    if not port:
        raise _refusal(text, "it has no port", f"{shown}:{_EXAMPLE_PORT}")
    least = 0 if to_listen else 1
    if not _is_port(port, least):
        raise _refusal(text, f"port {port!r} is not a number from {least} to {_MAX_PORT}", "")
    return Address(host, int(port))


def _is_port(text: str, least: int = 1) -> bool:
    return _PORT.fullmatch(text) is not None and least <= int(text) <= _MAX_PORT


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _like_it(better: str) -> str:
    """The address without its scheme and path, with a port added if need be; empty if that is malformed, too."""
    for text in (better, f"{better}:{_EXAMPLE_PORT}"):
        try:
            return str(_host_and_port(text, to_listen=False))
        except ValueError:
            continue
    return ""


def _refusal(text: str, problem: str, better: str) -> ValueError:
    # A general example, if there is no better proposal.
    example = f"; write {better}" if better else ""
    such_as = "" if better else ", such as 127.0.0.1:2222"
    return ValueError(f"{text!r} is not HOST:PORT{such_as}: {problem}{example}")
