"""Every command works over mutual TLS with tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ps_server.rules.authorization import Role
from tests.launched import TIMEOUT_S, Launched
from tests.prepared import Prepared
from tests.security.guarded import Files, flags_of, serving


def ps_server(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit code and lines of a command."""
    process = Prepared("ps_server", *arguments, pipes=True)
    try:
        out, errors = process.communicate(TIMEOUT_S)
    finally:
        process.kill()
    return process.wait(), out.splitlines(), errors.splitlines()


def test_commands_train_show_and_export_over_mutual_tls_with_tokens(files: Files, tmp_path: Path) -> None:
    of_server = files.of_server
    flags = [
        "--tls-cert",
        of_server.tls_cert,
        "--tls-key",
        of_server.tls_key,
        "--tls-client-ca",
        of_server.tls_client_ca,
    ]
    flags += ["--token-file", of_server.token_file, "--chief-token-file", of_server.chief_token_file]
    flags += ["--reader-token-file", of_server.reader_token_file]
    reader = flags_of(files.security(Role.READER))
    with serving("--bind", "127.0.0.1:0", *map(str, flags)) as address:
        train = ["ps_worker", "digits", "--ps-hosts", address, "--num-workers", "2", "--steps", "20"]
        train += ["--interval-steps", "10"]
        # The other worker gets its settings from the environment.
        environ = {**os.environ, **files.security(Role.WORKER).to_env()}
        chief = Prepared(*train, "--task-index", "0", *flags_of(files.security(Role.CHIEF)), pipes=True)
        worker = Prepared(*train, "--task-index", "1", pipes=True, environ=environ)
        try:
            printed = [each.communicate(TIMEOUT_S) for each in (chief, worker)]
        finally:
            chief.kill()
            worker.kill()
        assert [chief.returncode, worker.returncode] == [0, 0], printed
        code, lines, errors = ps_server("status", address, "--json", *reader)
        assert code == 0, errors
        assert json.loads("".join(lines))["global_step"] == 2
        out = tmp_path / "center.safetensors"
        code, _, errors = ps_server("export", address, str(out), *reader)
        assert code == 0, errors
        assert out.stat().st_size > 1000
        for command in (["status", address], ["export", address, str(out)]):
            code, _, errors = ps_server(*command, *flags_of(files.security(role=None)))
            assert code == 1
            assert len(errors) == 1
            assert "no token" in errors[0]
        assert ps_server("status", address, "--timeout-s", "0.5") == (
            1,
            [],
            [
                f"ps-server: {address} wants TLS; say which authority signed its certificate "
                "(Tls(ca_file=...) or MA_TLS_CA)"
            ],
        )


def test_a_script_finds_in_its_environment_what_the_command_was_told(files: Files, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from ma_client import Security\nprint(sorted(Security.from_env().to_env().values()))\n")
    security = files.security(Role.WORKER)
    run = ["-m", "ps_worker", "run", "--ps-hosts", "127.0.0.1:1", "--num-workers", "1", "--task-index", "0"]
    with Launched([*run, *flags_of(security), str(script)]) as ran:
        assert ran.ended() == 0, ran.printed()
    assert ran.lines == [str(sorted(security.to_env().values()))]
