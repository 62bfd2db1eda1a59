"""Reads a page as a browser does, by the standard library."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Answer", "OpenStream", "ask", "document", "place_of", "stream"]

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """An answer, with the names of its headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def place_of(url: str) -> tuple[str, int]:
    """Host and port of a page."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def _connection(url: str, tls: ssl.SSLContext | None) -> http.client.HTTPConnection:
    host, port = place_of(url)
    if tls is None:
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=tls)


def ask(
    url: str,
    path: str = "/",
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    tls: ssl.SSLContext | None = None,
    body: bytes | None = None,
) -> Answer:
    """One request; redirections are not followed."""
    connection = _connection(url, tls)
    try:
        connection.request(method, path, body, dict(headers or {}))
        found = connection.getresponse()
        return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())
    finally:
        connection.close()


def document(url: str, path: str, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None) -> Any:
    """A JSON document."""
    answer = ask(url, path, headers, tls=tls)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/json"
    return answer.json


class OpenStream:
    """Server-sent events."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def event(self) -> tuple[str, Any]:
        """The next event's name and document."""
        name, data = "", ""
        while (line := self._response.readline().decode().rstrip("\n")) or not name:
            assert not self._response.isclosed(), "the stream has ended"
            field, _, value = line.partition(": ")
            name, data = (value, data) if field == "event" else (name, data + value)
        return name, json.loads(data)

    def pair(self) -> tuple[Any, Any]:
        """The documents of the next status and the next rounds."""
        (one, status), (other, rounds) = self.event(), self.event()
        assert (one, other) == ("status", "rounds")
        return status, rounds

    def to_its_end(self) -> None:
        """Returns once the server has ended it."""
        while self._response.readline():
            pass


@contextmanager
def stream(url: str, headers: Mapping[str, str] | None = None) -> Iterator[OpenStream]:
    """A browser's window."""
    connection = _connection(url, None)
    try:
        connection.request("GET", "/api/stream", headers=dict(headers or {}))
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            yield OpenStream(response)
    finally:
        connection.close()
