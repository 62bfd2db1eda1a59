"""The routes of the page. aiohttp is imported here, so this module is loaded only if there is a page."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import mimetypes
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from aiohttp import web

from modelaverage.logs import event
from ps_server.page.connections import Connections
from ps_server.page.documents import Since
from ps_server.page.feed import Feed, NoSampleError
from ps_server.page.guard import Guard, PageRefusal, RequestHead, cookie_of
from ps_server.page.openapi import api_page, openapi_json

__all__ = ["MAX_STREAMS", "PageApp", "PageProtocol", "SECURITY_HEADERS"]

MAX_STREAMS = 64
"""The most streams at once; each is a browser's window."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Server": "ps-server",
}
_STATIC = Path(__file__).parent / "static"
_LARGEST_STEP = 2**63 - 1
# A stream whose client takes nothing for this long ends.
_WRITE_TIMEOUT_S = 30.0
_JSON = "application/json"
_log = logging.getLogger("ps_server")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class PageApp:
    """The page of one server.

    Args:
        feed: what it shows.
        guard: who may read it.
        connections: the open ones.
        cookie_name: of its cookie; another one for each port, because browsers send cookies to all ports of a host.
        is_encrypted: whether it has TLS.
    """

    feed: Feed
    guard: Guard
    connections: Connections
    cookie_name: str
    is_encrypted: bool

    def __post_init__(self) -> None:
        self._files = _static_files()
        self._streams = 0
        self._logged_at_s = -math.inf
        self._paths: dict[str, _Handler] = {
            "/": self._index,
            "/api": self._api_page,
            "/api/openapi.json": self._openapi,
            "/api/status": self._status,
            "/api/rounds": self._rounds,
            "/api/rounds.csv": self._csv,
            "/api/stream": self._stream,
        }

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guarded])
        routes = {**self._paths, "/static/{name:.*}": self._static}
        for path, handler in routes.items():
            app.router.add_get(path, handler, allow_head=False, expect_handler=_ignore_expectation)
        app.router.add_route("*", "/{anything:.*}", _nothing, expect_handler=_ignore_expectation)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuses what the guard refuses. An error of this program is logged, once a second at most."""
        try:
            return await self._answered(request, handler)
        except ConnectionError:  # the client has gone
            raise
        except Exception:
            now_s = asyncio.get_running_loop().time()
            if now_s - self._logged_at_s >= 1:
                self._logged_at_s = now_s
                _log.exception("a request for the page has failed", extra=event("page_failed"))
            return _refused(PageRefusal(500, "the page has failed", "the server's log says why"))

    async def _answered(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        head = self._head(request)
        refusal = self.guard.refusal(head)
        if refusal is not None:
            return _refused(refusal)
        if head.tokens:
            return self._remembered(request, head.tokens[0])
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return _refused(PageRefusal(404, "there is nothing here", "/api lists what there is"))
        except NoSampleError as error:
            return _refused(PageRefusal(503, str(error), "try again in a few seconds"))

    def _head(self, request: web.Request) -> RequestHead:
        tokens = [value for name, value in parse_qsl(request.query_string, True) if name == "token"]
        return RequestHead(
            request.method,
            request.raw_path,
            request.path,
            request.headers.getall("Host", ()),
            request.headers.getall("Authorization", ()),
            request.cookies.get(self.cookie_name),
            tokens,
            request.headers.get("Sec-Fetch-Site", ""),
            request.body_exists,
        )

    def _remembered(self, request: web.Request, token: str) -> web.Response:
        """Sends the browser to the same page without the token, which has no place in its history, with a cookie."""
        rest = urlencode([(name, value) for name, value in parse_qsl(request.query_string, True) if name != "token"])
        # Not to any other path: browsers take `//name` and `/\\name` for another host.
        path = request.path if request.path in self._paths else "/"
        response = _response(b"", "text/plain", 303, {"Location": f"{path}?{rest}" if rest else path})
        if self.guard.tokens is not None:
            response.set_cookie(
                self.cookie_name,
                cookie_of(token),
                path="/",
                httponly=True,
                samesite="Strict",
                secure=self.is_encrypted,
            )
        return response

    # What there is.

    async def _index(self, _: web.Request) -> web.Response:
        return self._file("index.html")

    async def _static(self, request: web.Request) -> web.Response:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        found = self._files.get(name)
        if found is None:
            raise web.HTTPNotFound
        return _response(found, _type_of(name), headers={"Cache-Control": "no-cache"})

    async def _api_page(self, _: web.Request) -> web.Response:
        return _response(api_page().encode(), "text/html")

    async def _openapi(self, _: web.Request) -> web.Response:
        return _response(openapi_json().encode(), _JSON)

    async def _status(self, _: web.Request) -> web.Response:
        return _response((await self.feed.now()).status, _JSON)

    async def _rounds(self, request: web.Request) -> web.Response:
        text = request.query.get("since", "0")
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _LARGEST_STEP):
            return _refused(PageRefusal(400, "`since` is not a step", "give a whole number, 0 or more"))
        view = await self.feed.now()
        return _response(b"".join(view.rounds(Since(int(text)))), _JSON)

    async def _csv(self, _: web.Request) -> web.Response:
        attached = {"Content-Disposition": 'attachment; filename="rounds.csv"'}
        return _response((await self.feed.now()).csv, "text/csv", headers=attached)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        if self._streams >= MAX_STREAMS:
            return _refused(PageRefusal(503, f"{MAX_STREAMS} streams are open", "close other windows with this page"))
        self._streams += 1
        try:
            return await self._streamed(request)
        finally:
            self._streams -= 1

    async def _streamed(self, request: web.Request) -> web.StreamResponse:
        """Sends the newest view, waits for the client to take it, and so on, for as long as the client may read. A slow
        client misses views, but no round: each message has what it lacks."""
        view = await self.feed.after(0)
        response = web.StreamResponse(headers=_headers("text/event-stream", {"Cache-Control": "no-store"}))
        response.force_close()
        await response.prepare(request)
        self.connections.is_stream(request.protocol)
        since, head = Since(), self._head(request)
        while self.guard.refusal(head) is None:
            parts = [b"event: status\ndata: ", view.status, b"\n\nevent: rounds\ndata: ", *view.rounds(since), b"\n\n"]
            for part in parts:
                try:
                    await asyncio.wait_for(response.write(part), _WRITE_TIMEOUT_S)
                except asyncio.TimeoutError:
                    self.connections.abort(request.protocol)
                    return response
            since = view.next_since
            try:
                view = await self.feed.after(view.number)
            except NoSampleError:
                return response
        return response


class PageProtocol(web.RequestHandler):
    """Also answers what is no request: aiohttp would repeat it, and tell its version."""

    __slots__ = ()

    def handle_error(self, request: web.BaseRequest, status: int = 500, *_: object, **__: object) -> web.StreamResponse:
        """See aiohttp."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has been sent already")
        return _refused(PageRefusal(status, "this is not a request that the page understands", "send GET and a path"))


def _response(body: bytes, kind: str, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    response = web.Response(
        body=body, status=status, headers=_headers(kind, {"Cache-Control": "no-store", **(headers or {})})
    )
    response.force_close()  # one request a connection: its time is limited
    return response


def _headers(kind: str, more: Mapping[str, str]) -> dict[str, str]:
    text = kind if kind == _JSON else f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    return {**SECURITY_HEADERS, "Content-Type": text, **more}


def _refused(refusal: PageRefusal) -> web.Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 405: {"Allow": "GET"}}.get(refusal.status)
    body = json.dumps({"error": refusal.error, "hint": refusal.hint}).encode()
    return _response(body, _JSON, refusal.status, headers)


async def _nothing(_: web.Request) -> web.StreamResponse:
    raise web.HTTPNotFound


async def _ignore_expectation(_: web.Request) -> None:
    """A request that asks before it sends its body is answered without: none has one. aiohttp's own handler fails at
    words that are no UTF-8."""


def _static_files() -> dict[str, bytes]:
    """All files of the page, by their path below `static`: nothing else can be asked for."""
    return {path.relative_to(_STATIC).as_posix(): path.read_bytes() for path in _STATIC.rglob("*") if path.is_file()}


def _type_of(name: str) -> str:
    if name.endswith((".js", ".mjs")):
        return "text/javascript"
    return mimetypes.guess_type(name)[0] or "text/plain"
