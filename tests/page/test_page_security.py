"""Tokens, cookies, TLS and mutual TLS of a real page, and where it may listen."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import replace
from http.cookies import SimpleCookie
from pathlib import Path

import pytest

from ps_server.edge.security import NO_SECURITY, ServerSecurity, page_warnings_of
from ps_server.page import thread
from ps_server.page.thread import PageConfig
from ps_server.unusable import UnusableSettingError
from tests.certificates import Authority, Identity
from tests.conftest import RunningServer, StartServer
from tests.page.conftest import PAGE
from tests.page.reading import Answer, ask, place_of, stream
from tests.raw_client import until

WORKER, READER, WRONG = "worker-0123456789abcdef", "reader-0123456789abcdef", "wrong-0123456789abcdef"
PATHS = ("/", "/static/index.html", "/api", "/api/status", "/api/rounds", "/api/rounds.csv", "/api/stream")


@pytest.fixture
def tokens(tmp_path: Path) -> ServerSecurity:
    (tmp_path / "worker").write_text(f"{WORKER}\n")
    (tmp_path / "reader").write_text(f"{READER}\n")
    return ServerSecurity(token_file=tmp_path / "worker", reader_token_file=tmp_path / "reader")


@pytest.fixture
def closed(start_server: StartServer, tokens: ServerSecurity) -> RunningServer:
    return start_server(1, security=tokens, page=PAGE)


def cookie_in(answer: Answer) -> str:
    """As a browser sends it back."""
    (morsel,) = SimpleCookie(answer.headers["set-cookie"]).values()
    return f"{morsel.key}={morsel.value}"


@pytest.mark.parametrize("path", PATHS)
def test_without_a_token_nothing_can_be_read(closed: RunningServer, path: str) -> None:
    for headers in (
        {},
        {"Authorization": f"Bearer {WRONG}"},
        {"Authorization": f"Basic {READER}"},
        {"Cookie": f"ma_page_{place_of(closed.page_url)[1]}={READER}"},
    ):
        answer = ask(closed.page_url, path, headers)
        assert answer.status == 401
        assert set(answer.json) == {"error", "hint"}
        assert answer.headers["www-authenticate"] == "Bearer"
    assert ask(closed.page_url, f"{path}?token={WRONG}").status == 401
    assert "set-cookie" not in ask(closed.page_url, f"{path}?token={WRONG}").headers


@pytest.mark.parametrize("token", [READER, WORKER])
def test_a_token_in_a_header_opens_the_page(closed: RunningServer, token: str) -> None:
    for path in PATHS[:-1]:
        assert ask(closed.page_url, path, {"Authorization": f"Bearer {token}"}).status == 200


def test_a_token_in_the_address_is_turned_into_a_cookie_at_once(closed: RunningServer) -> None:
    answer = ask(closed.page_url, f"/api/rounds?since=0&token={READER}")
    assert (answer.status, answer.headers["location"]) == (303, "/api/rounds?since=0")
    cookie = SimpleCookie(answer.headers["set-cookie"])[f"ma_page_{place_of(closed.page_url)[1]}"]
    assert (cookie["httponly"], cookie["samesite"], cookie["secure"], cookie["path"]) == (True, "Strict", "", "/")
    assert READER not in answer.headers["set-cookie"]
    assert ask(closed.page_url, "/api/status", {"Cookie": cookie_in(answer)}).status == 200
    assert ask(closed.page_url, "/api/status", {"Cookie": cookie_in(answer) + "0"}).status == 401


@pytest.mark.parametrize("path", ["//evil.example/", "///evil.example", "/\\evil.example", "/%2fevil.example"])
def test_a_redirection_stays_on_this_server(closed: RunningServer, path: str) -> None:
    assert ask(closed.page_url, f"{path}?token={READER}").headers["location"] == "/"


def test_tokens_are_read_again(closed: RunningServer, tokens: ServerSecurity) -> None:
    cookie = {"Cookie": cookie_in(ask(closed.page_url, f"/?token={READER}"))}
    assert ask(closed.page_url, "/", cookie).status == 200
    assert tokens.reader_token_file is not None
    tokens.reader_token_file.write_text(f"{WRONG}\n")
    until(lambda: ask(closed.page_url, "/", cookie).status == 401, "the cookie opens nothing any more")
    assert ask(closed.page_url, "/", {"Authorization": f"Bearer {WRONG}"}).status == 200


def test_an_open_window_gets_nothing_more_once_its_token_is_removed(
    closed: RunningServer, tokens: ServerSecurity
) -> None:
    cookie = {"Cookie": cookie_in(ask(closed.page_url, f"/?token={READER}"))}
    for headers in (cookie, {"Authorization": f"Bearer {READER}"}):
        with stream(closed.page_url, headers) as page:
            page.pair()
            assert tokens.reader_token_file is not None
            tokens.reader_token_file.write_text(f"{WRONG}\n")
            page.to_its_end()
        assert ask(closed.page_url, "/api/stream", headers).status == 401
        tokens.reader_token_file.write_text(f"{READER}\n")
        until(lambda: ask(closed.page_url, "/", cookie).status == 200, "the token counts again")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def trusting(authority: Authority, identity: Identity | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if identity is not None:
        context.load_cert_chain(identity.cert, identity.key)
    return context


def refused(attempt: Callable[[], Answer]) -> bool:
    try:
        attempt()
    except (OSError, ConnectionError):  # with TLS 1.3, the client learns of a refusal when it reads
        return True
    return False


def test_the_page_has_the_servers_certificate(start_server: StartServer, authority: Authority, tmp_path: Path) -> None:
    own = authority.sign("server")
    (tmp_path / "token").write_text(f"{READER}\n")
    security = ServerSecurity(own.cert, own.key, token_file=tmp_path / "token")
    server = start_server(1, security=security, page=PAGE)
    assert server.page_url.startswith("https://127.0.0.1:")
    answer = ask(server.page_url, f"/?token={READER}", tls=trusting(authority))
    assert answer.status == 303
    assert "Secure" in answer.headers["set-cookie"]
    assert ask(server.page_url, "/", {"Cookie": cookie_in(answer)}, tls=trusting(authority)).status == 200
    stranger, old = Authority(tmp_path, "stranger"), trusting(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert refused(lambda: ask(server.page_url, tls=trusting(stranger)))
    assert refused(lambda: ask(server.page_url, tls=old))
    assert refused(lambda: ask(server.page_url.replace("https", "http")))


def test_a_renewed_certificate_is_used_without_a_restart(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    own = authority.sign("server")
    server = start_server(1, security=ServerSecurity(own.cert, own.key), page=PAGE)
    assert ask(server.page_url, tls=trusting(authority)).status == 200
    other = Authority(tmp_path, "other")
    renewed = other.sign("renewed")
    assert refused(lambda: ask(server.page_url, tls=trusting(other)))
    os.replace(renewed.key, own.key)
    os.replace(renewed.cert, own.cert)
    until(lambda: not refused(lambda: ask(server.page_url, tls=trusting(other))), "the new certificate is used")
    assert refused(lambda: ask(server.page_url, tls=trusting(authority)))


def test_with_mutual_tls_browsers_need_a_certificate_too_and_a_new_authority_counts_at_once(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    own, client = authority.sign("server"), authority.sign("client")
    stranger = Authority(tmp_path, "stranger")
    theirs = stranger.sign("theirs")
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.ca.read_bytes())
    server = start_server(1, security=ServerSecurity(own.cert, own.key, trusted), page=PAGE)

    def is_refused(identity: Identity | None) -> bool:
        return refused(lambda: ask(server.page_url, tls=trusting(authority, identity)))

    assert not is_refused(client)
    assert is_refused(None)
    assert is_refused(theirs)
    trusted.write_bytes(stranger.ca.read_bytes())
    until(lambda: is_refused(client), "the former authority's certificates are refused")
    assert not is_refused(theirs)


def problem_of(start_server: StartServer, page: PageConfig, security: ServerSecurity = NO_SECURITY) -> str:
    with pytest.raises(UnusableSettingError) as raised:
        start_server(1, security=security, page=page)
    return str(raised.value)


def test_beyond_loopback_something_keeps_strangers_out(start_server: StartServer, tokens: ServerSecurity) -> None:
    everywhere = PageConfig("0.0.0.0:0")
    problem = problem_of(start_server, everywhere)
    assert problem.startswith("--page-bind 0.0.0.0:0 may be reached from other machines")
    assert "--insecure" in problem
    insecure = replace(NO_SECURITY, insecure=True)
    url = start_server(1, security=insecure, page=everywhere).page_url
    port = place_of(url)[1]
    assert url == f"http://localhost:{port}"  # what a browser opens
    for host in ("127.0.0.1", "localhost"):
        assert ask(f"http://{host}:{port}").status == 200
    assert start_server(1, security=tokens, page=everywhere).page_url


@pytest.mark.parametrize(
    ("security", "warning"),
    [
        (ServerSecurity(insecure=True), "neither --token-file nor --tls-client-ca"),
        (ServerSecurity(Path("cert"), Path("key")), "neither --token-file nor --tls-client-ca"),
        (ServerSecurity(token_file=Path("token")), "has no TLS"),
        (ServerSecurity(Path("cert"), Path("key"), token_file=Path("token")), ""),
        (ServerSecurity(Path("cert"), Path("key"), Path("ca")), ""),
    ],
)
def test_a_page_that_strangers_can_read_says_so(security: ServerSecurity, warning: str) -> None:
    assert page_warnings_of("127.0.0.1", "127.0.0.1:8222", security) == []
    found = page_warnings_of("0.0.0.0", "0.0.0.0:8222", security)
    assert [warning in line for line in found] == ([True] if warning else [])


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        ("8222", "--page-bind"),
        ("unix:/tmp/page", "browsers need a port"),
        ("127.0.0.1:99999", "--page-bind"),
        ("192.0.2.1:0", "--page-bind"),
        ("no-such-host.invalid:1", "--page-bind"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(start_server: StartServer, bind: str, words: str) -> None:
    problem = problem_of(start_server, PageConfig(bind), replace(NO_SECURITY, insecure=True))
    assert words in problem
    assert bind in problem


def test_a_port_in_use_is_named(start_server: StartServer) -> None:
    server = start_server(1, page=PAGE)
    bind = "{}:{}".format(*place_of(server.page_url))
    assert f"cannot serve the page on --page-bind {bind}: Address already in use" in problem_of(
        start_server, PageConfig(bind)
    )


def test_a_further_name_must_be_given(start_server: StartServer) -> None:
    server = start_server(1, page=replace(PAGE, names=("trainer.lan",)))
    assert ask(server.page_url, headers={"Host": "trainer.lan:80"}).status == 200
    assert ask(server.page_url, headers={"Host": "trainer.lan.evil.example"}).status == 421


@pytest.mark.parametrize("name", ["http://trainer.lan/", "trainer.lan:8222", "a b", ""])
def test_a_further_name_that_no_browser_can_send_is_refused(start_server: StartServer, name: str) -> None:
    assert problem_of(start_server, replace(PAGE, names=(name,))).startswith(f"--page-host {name!r} is not the name")


def test_without_aiohttp_the_page_is_refused_with_the_command_that_helps(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "find_spec", lambda _: None)
    assert problem_of(start_server, PAGE) == ("--page-bind needs aiohttp; run: pip install 'torch-model-average[page]'")


def test_a_page_whose_thread_cannot_start_is_refused(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(thread, "Thread", no_thread)
    assert "can't start new thread" in problem_of(start_server, PAGE)
