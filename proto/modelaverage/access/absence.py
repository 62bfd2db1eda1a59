"""Why no server answers at an address, as far as it can be found out from here."""

from __future__ import annotations

import ipaddress
import socket
import threading

from modelaverage.access import proxies
from modelaverage.addresses import parse

__all__ = ["no_answer"]

_LOOKUP_TIMEOUT_S = 2.0


def no_answer(address: str, waited_s: float, hint: str = "") -> str:
    """The message for a server that has not answered in time; it may take 2 s to find the cause.

    Args:
        address: of the server.
        waited_s: how long it had.
        hint: what to do if only the server is missing.
    """
    proxy = proxies.in_the_way(address)
    unknown = "" if proxy else _unknown_name(address)
    if unknown:
        return f"no parameter server answers at {address} (waited {waited_s:g} s): {unknown}"
    return f"no parameter server answers at {address} (waited {waited_s:g} s){hint and f'; {hint}'}{proxy}"


def _unknown_name(address: str) -> str:
    """That the host's name is unknown; empty if it is known, is an IP address, or the lookup takes too long."""
    try:
        host = parse(address).host
    except ValueError:
        return ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return ""
    problems = list[str]()

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, None)
        except socket.gaierror as error:
            problems.append(str(error.strerror))
        except (OSError, UnicodeError):
            pass

    # Nothing ends a lookup, so another thread makes it.
    thread = threading.Thread(target=look_up, name="host-lookup", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no threads are left
        return ""
    thread.join(_LOOKUP_TIMEOUT_S)
    if not host or not problems:
        return ""
    return f"the host name {host!r} is unknown here ({problems[0]}); check its spelling, or give the IP address"
