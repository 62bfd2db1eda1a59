"""The page as users start it: `ps-server serve`, `ma-launch`, and what docs/observability.md says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ps_server.__main__ import main as server_main
from ps_worker import launch
from tests.launched import Launched
from tests.page.described import check_document
from tests.page.reading import document

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time
from ma_client import ClusterSpec
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
"""


def test_a_server_prints_its_page_as_a_line_of_json_too() -> None:
    bind = ["--bind", "127.0.0.1:0", "--page-bind", "127.0.0.1:0"]
    with Launched(["-m", "ps_server", "serve", "--num-workers", "2", "--log-json", *bind]) as server:
        server.wait_for("page_listening")
        line = json.loads(server.lines[-1])
        assert line["message"] == f"page at {line['url']}"
        found = document(line["url"], "/api/status")
        assert found["status"]["phase"] == "PHASE_UNINITIALIZED"
        server.process.terminate()
        assert server.ended() == 0
        assert server.errors == []


def test_a_further_name_needs_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert server_main(["serve", "--num-workers", "1", "--page-host", "trainer.lan"]) == 1
    assert capsys.readouterr().err == "ps-server: --page-host needs --page-bind\n"


def test_another_shard_needs_a_page_and_authorities_need_tls(capsys: pytest.CaptureFixture[str]) -> None:
    serve = ["serve", "--num-workers", "1", "--page-shard", "127.0.0.1:1"]
    assert server_main(serve) == 1
    assert capsys.readouterr().err == "ps-server: --page-shard needs --page-bind\n"
    assert server_main([*serve[:3], "--page-bind", "127.0.0.1:0", "--page-shard-ca", "ca.pem"]) == 1
    assert capsys.readouterr().err == "ps-server: --page-shard-ca needs --page-shard\n"
    assert server_main([*serve, "--page-bind", "127.0.0.1:0", "--page-shard-ca", "ca.pem"]) == 1
    assert capsys.readouterr().err.startswith("ps-server: --page-shard-ca needs --tls-cert: ")


def test_ma_launch_prints_one_page_which_shows_all_servers(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["-m", "ps_worker.launch", "--ps", "2", "--workers", "2", "--", "script.py", "go"]
    with Launched(command, cwd=tmp_path) as launched:
        launched.wait_for("ma-launch: page: http://127.0.0.1:")
        (url,) = (line.split()[-1] for line in launched.errors if line.startswith("ma-launch: page"))
        shards = document(url, "/api/status")["shards"]
        assert len({shard["address"] for shard in shards}) == 2
        (tmp_path / "go").touch()
        assert launched.ended() == 0


def test_ma_launch_leaves_the_page_out_if_told_to(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("print('done')")
    with Launched(["-m", "ps_worker.launch", "--no-page", "--", "script.py"], cwd=tmp_path) as launched:
        assert launched.ended() == 0
        assert not [line for line in launched.errors if "page" in line]


def test_ma_launch_without_aiohttp_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ps_worker.commands.extras.find_spec", lambda _: None)
    assert not launch._can_have_page()
    said = capsys.readouterr().err
    assert said == (
        "ma-launch: no page: aiohttp not installed; run: pip install 'torch-model-average[page]' (--no-page: without "
        "this line)\n"
    )


def test_the_documents_in_the_manual_are_as_described() -> None:
    chapter = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8").partition("## The page")[2]
    status, rounds = re.findall(r"^```json\n(.*?)^```", chapter.partition("## Metrics")[0], re.MULTILINE | re.DOTALL)
    check_document("Status", json.loads(status))
    check_document("Rounds", json.loads(rounds))
