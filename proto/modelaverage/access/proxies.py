"""Whether channels use a proxy. By default they do not.

gRPC itself would use the proxy that environment variables name for a machine's web browsers. Where that proxy does not
lead to the server, no server can be reached, not even on loopback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["USE_PROXY", "in_the_way", "is_wanted", "option"]

USE_PROXY = "MA_USE_PROXY"
"""Set to 1: channels use the proxy that gRPC finds in the environment."""
# The variables that gRPC reads, in this order.
_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO = ("", "0", "no", "false", "off")


def is_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether channels are to use a proxy, if there is one."""
    return environ.get(USE_PROXY, "").strip().lower() not in _NO


def option(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The option of a channel."""
    return "grpc.enable_http_proxy", int(is_wanted(environ))


def in_the_way(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """What to append to an error when no server answers at ``address``: the variable that names a proxy, if any."""
    if not is_wanted(environ) or address.startswith("unix:"):
        return ""
    for name in _VARIABLES:
        if environ.get(name):
            return (
                f"; {USE_PROXY} is set, so calls go through the proxy in {name}={environ[name]}: "
                f"unset {USE_PROXY}, or name the server in no_proxy, to bypass it"
            )
    return ""
