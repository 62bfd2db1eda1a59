"""A server of the page that plays scenes of scenes.py, with the content security policy of the real one.

`python -m tests.page.browser.fake_server training --port 8222` shows one to people.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from tests.page.browser.documents import Scene
from tests.page.browser.scenes import SCENES, scene

__all__ = ["FakePage", "fake_page"]

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class FakePage:
    """A page whose scene can be changed.

    Attributes:
        url: where it is.
        paths: the paths that were asked for.
    """

    def __init__(self, first: Scene, port: int = 0) -> None:
        self.paths = list[str]()
        self._news = threading.Condition()
        self._scenes: list[Scene | None] = [first]  # None: the streams end
        self._is_refused = False
        page = self

        class _Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(ConnectionError):  # the browser has gone
                    page._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def show(self, now: Scene) -> None:
        """Every open page gets this scene."""
        self._add(now)

    def hang_up(self, is_refused: bool = False) -> None:
        """Ends all streams; with ``is_refused``, further ones are answered 401 until `show`."""
        self._is_refused = is_refused
        self._add(None)

    def let_in(self, now: Scene) -> None:
        """Answers again."""
        self._is_refused = False
        self.show(now)

    def close(self) -> None:
        """Ends all streams and stops listening."""
        self.hang_up()
        self._http.shutdown()
        self._http.server_close()

    def _add(self, now: Scene | None) -> None:
        with self._news:
            self._scenes.append(now)
            self._news.notify_all()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.split("?")[0]
        self.paths.append(path)
        if path == "/api/stream" and not self._is_refused:
            self._stream(request)
        elif path.startswith("/api"):
            status = HTTPStatus.UNAUTHORIZED if self._is_refused else HTTPStatus.OK
            problem = {"error": "this token is not known", "hint": "open the page with ?token=..."}
            now = self._scenes[-1]
            body = problem if self._is_refused or now is None else now.status
            self._send(request, status, "application/json", json.dumps(body).encode())
        else:
            name = "index.html" if path == "/" else path.removeprefix("/static/")
            file = files("ps_server.page") / "static" / name
            if "/" in name or not file.is_file():
                self._send(request, HTTPStatus.NOT_FOUND, "application/json", b"{}")
            else:
                self._send(request, HTTPStatus.OK, _TYPES[name.rsplit(".", 1)[1]], file.read_bytes())

    def _send(self, request: BaseHTTPRequestHandler, status: HTTPStatus, kind: str, body: bytes) -> None:
        request.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", _POLICY),
        ):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def _stream(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(HTTPStatus.OK)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        at = len(self._scenes) - 1
        while True:
            with self._news:
                while at == len(self._scenes):
                    self._news.wait()
                now = self._scenes[at]
            if now is None:
                return
            at += 1
            for name, document in (("status", now.status), ("rounds", now.rounds)):
                request.wfile.write(f"event: {name}\ndata: {json.dumps(document)}\n\n".encode())
            request.wfile.flush()


@contextmanager
def fake_page(first: Scene) -> Iterator[FakePage]:
    """A page on a free port of loopback."""
    page = FakePage(first)
    try:
        yield page
    finally:
        page.close()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scene", choices=sorted(SCENES))
    parser.add_argument("--port", type=int, default=8222)
    arguments = parser.parse_args()
    page = FakePage(scene(arguments.scene), arguments.port)
    print(page.url)
    tick = threading.Event()
    while not tick.wait(1.0):
        page.show(scene(arguments.scene))


if __name__ == "__main__":
    _main()
