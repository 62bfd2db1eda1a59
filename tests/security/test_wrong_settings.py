"""Files and flags that are missing or wrong are named at the start, and no token is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from ma_client import Security, SecurityError, Tls
from modelaverage.access.channels import Access
from ps_server.__main__ import main
from ps_server.rules.authorization import Role
from tests.security.guarded import TOKENS, Files


def test_files_that_are_missing_or_wrong_are_named_at_the_start_on_both_sides(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, missing, client, server = tmp_path / "text", tmp_path / "missing", files.client, files.server
    text.write_text("hello")
    ca, token = files.authority.ca, files.token(Role.WORKER)
    for cert, key, authority, words in (
        (missing, client.key, ca, [str(missing), "No such file"]),
        (text, client.key, ca, [str(text), "no certificate in PEM form"]),
        (client.cert, missing, ca, [str(missing), "No such file"]),
        (client.cert, client.cert, ca, [str(client.cert), "no private key"]),
        (client.cert, server.key, ca, [str(client.cert), str(server.key), "does not belong"]),
        (client.cert, client.key, missing, [str(missing), "No such file"]),
        (client.cert, client.key, client.key, [str(client.key), "no certificate in PEM form"]),
    ):
        flags = ["--tls-cert", str(cert), "--tls-key", str(key)]
        assert_refused(capsys, ["status", "127.0.0.1:1", "--tls-ca", str(authority), *flags], words)
        serve = ["serve", "--num-workers", "1", "--bind", "127.0.0.1:0"]
        assert_refused(capsys, [*serve, *flags, "--tls-client-ca", str(authority)], words)
    for content, words in (
        ("", ["has no token", "openssl rand"]),
        ("short", ["line 1", "16 to 512"]),
        ("two words of a token", ["line 1"]),
        (f"{TOKENS[Role.WORKER]}\nshort", ["line 2"]),
        ("ä" * 20, ["a character"]),
    ):
        text.write_text(content)
        assert_refused(capsys, ["status", "127.0.0.1:1", "--token-file", str(text)], [str(text), *words])
        assert_refused(capsys, [*serve, "--token-file", str(text)], [str(text), *words])
    both = ["--token-file", str(token), "--reader-token-file", str(token)]
    assert_refused(capsys, [*serve, *both], [str(token), "in common"])


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(files: Files) -> None:
    locked = files.authority.sign("locked", passphrase=b"secret")
    with pytest.raises(SecurityError, match=r"locked\.key.*passphrase"):
        Access(Security(Tls(cert_file=locked.cert, key_file=locked.key)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tls-cert", "x"], ["--tls-cert needs --tls-key"]),
        (["--tls-key", "x"], ["--tls-key needs --tls-cert"]),
        (["--tls-client-ca", "x"], ["--tls-client-ca needs --tls-cert"]),
        (["--chief-token-file", "x"], ["--chief-token-file needs --token-file"]),
        (["--reader-token-file", "x"], ["--reader-token-file needs --token-file"]),
        (["--bind", "0.0.0.0:0"], ["--bind 0.0.0.0:0", "--tls-cert", "--token-file", "--insecure"]),
        (["--bind", "[::]:0"], ["--bind [::]:0", "--insecure"]),
    ],
)
def test_flags_that_need_others_name_them(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: list[str]
) -> None:
    assert_refused(capsys, ["serve", "--num-workers", "1", *flags], words)


def assert_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not any(token in error for token in TOKENS.values())


def test_a_token_is_shown_nowhere() -> None:
    assert "secret" not in repr(Security(token="secret-secret-secret"))
    with pytest.raises(SecurityError) as refused:
        Security(token="secret secret")
    assert "secret" not in str(refused.value)
    with pytest.raises(SecurityError, match="has to be in a file"):
        Security(token="secret-secret-secret").to_env()
