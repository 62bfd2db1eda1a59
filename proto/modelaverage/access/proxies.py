"""Whether channels go through a proxy. They do not unless they are told to.

gRPC by itself takes one from variables that whole machines have for their web browsers; where that proxy does not lead
to the server, nobody answers, not even on loopback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["USE_PROXY", "in_the_way", "is_wanted", "option"]

USE_PROXY = "MA_USE_PROXY"
"""Set to 1: channels use the proxy that gRPC finds in the environment."""
# Where gRPC looks, in this order.
_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO = ("", "0", "no", "false", "off")


def is_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether channels are to use a proxy, if there is one."""
    return environ.get(USE_PROXY, "").strip().lower() not in _NO


def option(environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """The option of a channel."""
    return "grpc.enable_http_proxy", int(is_wanted(environ))


def in_the_way(address: str, environ: Mapping[str, str] = os.environ) -> str:
    """What to add to an error when no server answers at ``address``: the variable whose proxy is used; or nothing."""
    if not is_wanted(environ) or address.startswith("unix:"):
        return ""
    for name in _VARIABLES:
        if environ.get(name):
            return (
                f"; {USE_PROXY} is set, and so calls go through the proxy of {name}={environ[name]}: "
                f"unset {USE_PROXY}, or name the server in no_proxy, to go without it"
            )
    return ""
