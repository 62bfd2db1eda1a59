"""Every command works over mutual TLS with tokens."""

from __future__ import annotations

import json
from pathlib import Path

from ps_server.rules.authorization import Role
from tests.launched import Launched
from tests.security.guarded import Files, flags_of, serving


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
        train = ["-m", "ps_worker", "digits", "--ps-hosts", address, "--num-workers", "2", "--steps", "20"]
        train += ["--interval-steps", "10"]
        with (
            Launched([*train, "--task-index", "0", *flags_of(files.security(Role.CHIEF))]) as chief,
            # The other worker gets its settings from the environment.
            Launched([*train, "--task-index", "1"], environ=files.security(Role.WORKER).to_env()) as worker,
        ):
            assert [chief.ended(), worker.ended()] == [0, 0], chief.printed() + worker.printed()
        with Launched(["-m", "ps_server", "status", address, "--json", *reader]) as status:
            assert status.ended() == 0, status.printed()
            assert json.loads("".join(status.lines))["global_step"] == 2
        out = tmp_path / "center.safetensors"
        with Launched(["-m", "ps_server", "export", address, str(out), *reader]) as export:
            assert export.ended() == 0, export.printed()
        assert out.stat().st_size > 1000
        for command in (["status", address], ["export", address, str(out)]):
            without_token = flags_of(files.security(role=None))
            with Launched(["-m", "ps_server", *command, *without_token]) as refused:
                assert refused.ended() == 1
                assert len(refused.errors) == 1
                assert "no token" in refused.errors[0]
        with Launched(["-m", "ps_server", "status", address, "--timeout-s", "0.5"]) as refused:
            assert refused.ended() == 1
            assert refused.errors == [
                f"ps-server: {address} wants TLS; say which authority signed its certificate "
                "(Tls(ca_file=...) or MA_TLS_CA)"
            ]


def test_a_script_finds_in_its_environment_what_the_command_was_told(files: Files, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from ma_client import Security\nprint(sorted(Security.from_env().to_env().values()))\n")
    security = files.security(Role.WORKER)
    run = ["-m", "ps_worker", "run", "--ps-hosts", "127.0.0.1:1", "--num-workers", "1", "--task-index", "0"]
    with Launched([*run, *flags_of(security), str(script)]) as ran:
        assert ran.ended() == 0, ran.printed()
    assert ran.lines == [str(sorted(security.to_env().values()))]
