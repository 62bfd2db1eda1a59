"""Who may read the page. Pure: a request's head in, a refusal or nothing out.

A page in a browser is reachable from every other page that the browser shows. So the name in the Host header has to be
one of the server's own (a stranger's name that resolves to this address would make the stranger's page one origin with
this one: DNS rebinding), and other sites may do no more than link to the page.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from modelaverage.access.tokens import token_of
from modelaverage.errors import Reason
from modelaverage.rpcs import SERVICE
from ps_server.rules.authorization import Tokens, check

__all__ = ["Guard", "HostNames", "PageRefusal", "RequestHead", "cookie_of", "host_in", "name_in"]

_METHOD = f"/{SERVICE}/GetStatus"
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# Of Sec-Fetch-Site: this page asks, or a person; older browsers and programs say nothing. Another port is another page.
_OWN_SITE = ("", "none", "same-origin")
# What other sites may link to.
_LINKED = ("/", "/api")
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_COOKIE_PURPOSE = b"modelaverage page"


@dataclass(frozen=True)
class PageRefusal:
    """An answer that is no page: HTTP status, what is wrong, and what to do."""

    status: int
    error: str
    hint: str


@dataclass(frozen=True)
class RequestHead:
    """What a request says about itself.

    Args:
        method: such as GET.
        target: as it was sent, from the path on.
        path: the path of the target as the routes see it, decoded.
        hosts: the values of its Host headers.
        authorizations: the values of its Authorization headers.
        cookie: the value of this page's cookie; None: there is none.
        tokens: the values of `token` in the query.
        site: the value of Sec-Fetch-Site; empty: there is none.
        has_body: whether it announces a body.
    """

    method: str = "GET"
    target: str = "/"
    path: str = "/"
    hosts: Sequence[str] = ()
    authorizations: Sequence[str] = ()
    cookie: str | None = None
    tokens: Sequence[str] = ()
    site: str = ""
    has_body: bool = False


def host_in(header: str) -> str:
    """The host in a Host header, in lower case, without port and brackets; empty if it is malformed."""
    text = header.strip().lower()
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        port = port.removeprefix(":") if port.startswith(":") else "" if not port else "?"
        return host if bracket and (not port or port.isdecimal()) else ""
    host, _, port = text.partition(":")
    return host.removesuffix(".") if not port or (port.isascii() and port.isdecimal()) else ""


def name_in(text: str) -> str:
    """A host's name or address as `host_in` gives it; empty if no Host header can have it."""
    name = text.lower().removesuffix(".")
    address = _address_of(name.removeprefix("[").removesuffix("]"))
    if address is not None:
        return str(address)
    return name if _NAME.fullmatch(name) else ""


@dataclass(frozen=True)
class HostNames:
    """The names under which the page may be asked for. The port is not compared: it may be forwarded.

    Args:
        bound: the host that the page listens on.
        more: further names of it.
    """

    bound: str
    more: Iterable[str] = ()
    _names: frozenset[str] = field(init=False)
    _takes_addresses: bool = field(init=False)

    def __post_init__(self) -> None:
        address = _address_of(self.bound)
        object.__setattr__(self, "_names", frozenset(map(name_in, (self.bound, *self.more))) - {""} | _LOCAL_NAMES)
        # On all of the machine's addresses: a request for an address cannot come from a rebound name.
        object.__setattr__(self, "_takes_addresses", address is not None and address.is_unspecified)

    def has(self, host: str) -> bool:
        """Whether ``host`` is one of them."""
        return host in self._names or (self._takes_addresses and _address_of(host) is not None)


def _address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def cookie_of(token: str) -> str:
    """The cookie for the holder of a token. Browsers send cookies to every port of a host, so it is not the token
    itself, and opens nothing but this page."""
    return hmac.new(token.encode(), _COOKIE_PURPOSE, hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Guard:
    """Decides about requests.

    Args:
        names: of the page.
        tokens: returns the tokens that the server knows at the moment; None: it requires none.
    """

    names: HostNames
    tokens: Callable[[], Tokens] | None = None

    def refusal(self, head: RequestHead) -> PageRefusal | None:
        """Why a request is refused; None: it may proceed."""
        if head.method != "GET":
            return PageRefusal(405, "this page can only be read", "use GET")
        if head.has_body or not head.target.startswith("/"):
            return PageRefusal(400, "the request has a body, or names another server", "send GET and a path, no body")
        if len(head.hosts) != 1 or not self.names.has(host_in(head.hosts[0])):
            return PageRefusal(
                421,
                "this server is not known under the name in the request's Host header",
                "use the address that the server has printed, or start it with --page-host NAME",
            )
        if head.site not in _OWN_SITE and head.path not in _LINKED:
            return PageRefusal(403, "another site's page asks for this", "open the page itself")
        return None if self.tokens is None else self._stranger(head, self.tokens())

    def _stranger(self, head: RequestHead, tokens: Tokens) -> PageRefusal | None:
        if head.cookie is not None and not head.authorizations and not head.tokens:
            if self._knows(head.cookie, tokens):
                return None
            return PageRefusal(401, "the server does not know this browser any more", "open the page with ?token=TOKEN")
        sent = [*head.tokens, *(token_of(value) or "" for value in head.authorizations)]
        error = check(tokens, _METHOD, sent)
        if error is None:
            return None
        hint = "open the page with ?token=TOKEN, or send Authorization: Bearer TOKEN; a reader's token is enough"
        if error.reason is Reason.ROLE_INSUFFICIENT:
            return PageRefusal(403, str(error), hint)
        wrong = "the server does not know this token" if sent else "this server requires a token"
        return PageRefusal(401, wrong, hint)

    def _knows(self, cookie: str, tokens: Tokens) -> bool:
        known, sent = False, cookie.encode("utf-8", "surrogateescape")
        for token in tokens.roles:
            # No early return: timing must not reveal which token matched.
            known |= hmac.compare_digest(cookie_of(token).encode(), sent)
        return known
