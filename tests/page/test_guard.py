"""Who may read the page: every wrong credential, host, method and body is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps_server.page.guard import Guard, HostNames, PageRefusal, RequestHead, cookie_of, host_in, name_in
from ps_server.rules.authorization import Role, Tokens

READER, WORKER, CHIEF = "reader-0123456789abcdef", "worker-0123456789abcdef", "chief-0123456789abcdef"
TOKENS = Tokens({READER: Role.READER, WORKER: Role.WORKER, CHIEF: Role.CHIEF})
OPEN = Guard(HostNames("127.0.0.1"))
CLOSED = Guard(HostNames("127.0.0.1"), lambda: TOKENS)
HOST = ("127.0.0.1:8222",)


def status_of(refusal: PageRefusal | None) -> int:
    return 200 if refusal is None else refusal.status


@pytest.mark.parametrize("token", [READER, WORKER, CHIEF])
def test_every_token_may_read(token: str) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert CLOSED.refusal(RequestHead(hosts=HOST, authorizations=[f"{scheme} {token}"])) is None
    assert CLOSED.refusal(RequestHead(hosts=HOST, tokens=[token])) is None
    assert CLOSED.refusal(RequestHead(hosts=HOST, cookie=cookie_of(token))) is None


@pytest.mark.parametrize(
    "head",
    [
        RequestHead(hosts=HOST),
        RequestHead(hosts=HOST, tokens=[""]),
        RequestHead(hosts=HOST, tokens=["reader-0123456789abcdeF"]),
        RequestHead(hosts=HOST, tokens=[READER[:-1]]),
        RequestHead(hosts=HOST, tokens=[READER + "x"]),
        RequestHead(hosts=HOST, tokens=[READER, READER]),
        RequestHead(hosts=HOST, tokens=[READER], authorizations=[f"Bearer {READER}"]),
        RequestHead(hosts=HOST, tokens=["\udcff\x00 é"]),
        RequestHead(hosts=HOST, authorizations=[READER]),
        RequestHead(hosts=HOST, authorizations=[f"Basic {READER}"]),
        RequestHead(hosts=HOST, authorizations=["Bearer "]),
        RequestHead(hosts=HOST, authorizations=["Bearer wrong-0123456789abcdef"]),
        RequestHead(hosts=HOST, authorizations=[f"Bearer {READER}", f"Bearer {READER}"]),
        RequestHead(hosts=HOST, cookie=""),
        RequestHead(hosts=HOST, cookie=READER),  # the token itself is no cookie
        RequestHead(hosts=HOST, cookie=cookie_of(READER)[:-1]),
        RequestHead(hosts=HOST, cookie=cookie_of("wrong-0123456789abcdef")),
        RequestHead(hosts=HOST, cookie=cookie_of(READER), tokens=["wrong-0123456789abcdef"]),
        RequestHead(hosts=HOST, cookie="\udcff"),
    ],
)
def test_every_wrong_credential_is_refused(head: RequestHead) -> None:
    refusal = CLOSED.refusal(head)
    assert refusal is not None
    assert refusal.status == 401
    for token in (READER, WORKER, CHIEF):
        assert token not in refusal.error + refusal.hint
    assert OPEN.refusal(head) is None  # without a token file, all of them may read


@settings(max_examples=30)
@given(st.text(max_size=80))
def test_no_other_text_is_a_credential(text: str) -> None:
    for head in (
        RequestHead(hosts=HOST, tokens=[text]),
        RequestHead(hosts=HOST, authorizations=[f"Bearer {text}"]),
        RequestHead(hosts=HOST, cookie=text),
    ):
        assert status_of(CLOSED.refusal(head)) == 401


def test_a_token_that_was_removed_from_its_file_opens_nothing_and_neither_does_its_cookie() -> None:
    present = [TOKENS]
    guard = Guard(HostNames("127.0.0.1"), lambda: present[0])
    heads = [RequestHead(hosts=HOST, tokens=[READER]), RequestHead(hosts=HOST, cookie=cookie_of(READER))]
    assert [guard.refusal(head) for head in heads] == [None, None]
    present[0] = Tokens({WORKER: Role.WORKER})
    assert [status_of(guard.refusal(head)) for head in heads] == [401, 401]


def test_a_cookie_does_not_reveal_the_token() -> None:
    assert READER not in cookie_of(READER)
    assert cookie_of(READER) != cookie_of(WORKER)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", ""])
def test_nothing_but_get_is_served(method: str) -> None:
    assert status_of(OPEN.refusal(RequestHead(method=method, hosts=HOST))) == 405


@pytest.mark.parametrize(
    "hosts",
    [
        (),
        ("",),
        ("evil.example",),
        ("evil.example:8222",),
        ("127.0.0.1.evil.example",),
        ("localhost.evil.example",),
        ("127.0.0.1@evil.example",),
        ("127.0.0.1:8222:8222",),
        ("127.0.0.1:port",),
        ("127.0.0.1, evil.example",),
        ("10.0.0.1",),  # an address, but not this one
        ("0.0.0.0",),
        ("[::1",),
        ("[::1]x",),
        ("[::1]:x",),
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "evil.example"),
    ],
)
def test_another_host_is_refused(hosts: Sequence[str]) -> None:
    for guard in (OPEN, CLOSED):
        assert status_of(guard.refusal(RequestHead(hosts=hosts, tokens=[READER]))) == 421


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:1", "localhost:8222", "LOCALHOST", "[::1]:8222", "localhost."]
)
def test_this_machine_has_its_names(host: str) -> None:
    assert OPEN.refusal(RequestHead(hosts=[host])) is None


def test_on_all_addresses_every_address_is_taken_and_only_the_given_names() -> None:
    guard = Guard(HostNames("0.0.0.0", ["Trainer.lan"]))
    for host in ("10.0.0.1:8222", "[fe80::1]:8222", "localhost", "trainer.lan:8222"):
        assert guard.refusal(RequestHead(hosts=[host])) is None
    for host in ("evil.example", "trainer", "10.0.0.1.evil.example"):
        assert status_of(guard.refusal(RequestHead(hosts=[host]))) == 421


def test_a_host_by_name_or_address_is_known_by_it() -> None:
    assert Guard(HostNames("10.1.2.3")).refusal(RequestHead(hosts=["10.1.2.3:8222"])) is None
    assert Guard(HostNames("trainer.lan")).refusal(RequestHead(hosts=["trainer.lan:8222"])) is None
    assert status_of(Guard(HostNames("10.1.2.3")).refusal(RequestHead(hosts=["10.1.2.4"]))) == 421


@given(st.text(max_size=40))
def test_a_host_header_is_read_or_refused(text: str) -> None:
    host = host_in(text)
    assert ":" not in host or text.strip().startswith("[")
    assert host in text.lower()


@pytest.mark.parametrize("target", ["http://evil.example/", "*", "evil.example:80", ""])
def test_a_request_for_another_server_is_refused(target: str) -> None:
    assert status_of(OPEN.refusal(RequestHead(target=target, hosts=HOST))) == 400


def test_a_request_with_a_body_is_refused() -> None:
    assert status_of(OPEN.refusal(RequestHead(hosts=HOST, has_body=True))) == 400


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200), ("", 200)]
)
def test_another_sites_page_may_link_to_what_people_read_and_gets_nothing_else(site: str, status: int) -> None:
    for path in ("/api/stream", "/api/status", "/static/main.js", "/favicon.ico"):
        assert status_of(OPEN.refusal(RequestHead(path=path, hosts=HOST, site=site))) == status
    for path in ("/", "/api"):
        assert OPEN.refusal(RequestHead(path=path, hosts=HOST, site=site)) is None


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("Trainer.lan.", ["trainer.lan:8222", "TRAINER.LAN."]),
        ("fe80:0::1", ["[fe80::1]:8222"]),
        ("[fe80::1]", ["[fe80::1]"]),
        ("my_host", ["my_host"]),
    ],
)
def test_a_name_is_taken_however_it_is_written(name: str, hosts: Sequence[str]) -> None:
    guard = Guard(HostNames("127.0.0.1", [name]))
    assert [guard.refusal(RequestHead(hosts=[host])) for host in hosts] == [None] * len(hosts)


@pytest.mark.parametrize(
    "text", ["", ".", "http://trainer.lan", "trainer.lan:8222", "trainer.lan/", "a b", "a..b", "ü.lan"]
)
def test_what_no_host_header_can_have_is_no_name(text: str) -> None:
    assert name_in(text) == ""
