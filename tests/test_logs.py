"""Lines of the log: one table has every event and its fields; with --log-json every line is JSON."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from modelaverage.logs import COMMON_FIELDS, EVENTS
from tests.jobs import Job, of
from tests.prepared import Prepared
from tests.raw_client import RawClient, fragments_of, until
from tests.source_tree import MODULES, ROOT, tree_of
from tests.test_server_process import ServerProcess

TIMEOUT_S = 60


def calls(module: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))


def events_of(module: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for call in calls(module):
        if ast.unparse(call.func) == "event":
            assert len(call.args) == 1
            yield ast.literal_eval(call.args[0]), tuple(str(keyword.arg) for keyword in call.keywords)


def test_an_event_is_one_of_the_table_and_has_its_fields() -> None:
    told = [(module, name, fields) for module in MODULES for name, fields in events_of(module)]
    assert len(told) > len(EVENTS) / 2
    assert [(module, name, fields) for module, name, fields in told if EVENTS.get(name) != fields] == []


def test_every_line_of_the_log_names_its_event() -> None:
    for module in MODULES:
        for call in calls(module):
            if re.fullmatch(r"_log\.(debug|info|warning|error|exception|critical)", ast.unparse(call.func)):
                assert "extra" in {keyword.arg for keyword in call.keywords}, f"{module}: {ast.unparse(call)}"


def test_every_event_of_the_table_is_used() -> None:
    used = {name for module in MODULES for name, _ in events_of(module)}
    assert EVENTS.keys() - used == {"crashed", "other"}


def test_the_page_has_every_event_with_its_fields() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8").partition("## Logs")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE))
    assert {name: tuple(re.findall(r"`(\w+)`", fields)) for name, fields in rows.items()} == EVENTS


def lines_of(text: str) -> list[dict[str, Any]]:
    """All lines as JSON, each with its event's fields."""
    found = []
    for line in text.splitlines():
        fields = json.loads(line)
        assert tuple(fields) == COMMON_FIELDS + EVENTS[fields["event"]]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields["time"])
        found.append(fields)
    return found


def test_every_line_of_a_run_with_faults_is_json(tmp_path: Path) -> None:
    flags = ("--log-json", "--verbose", "--min-workers", "1", "--grace-s", "0.2", "--checkpoint-dir", str(tmp_path))
    with ServerProcess(*flags, "--metrics-bind", "127.0.0.1:0") as server:
        listening = json.loads(server.line)
        address = listening["addresses"][0]
        with RawClient(address) as client:
            job = Job(client, address)
            job.break_off("a\n{}", of(1), 1)
            stream, first = job.restarted("a\n{}")
            stream.give(fragments_of(of(2)), first)
            stream.half_close()
            stream.answer()  # alone: the round waits for the grace period
            assert refusal_of(client, b"\xff\xff") == "MESSAGE_MALFORMED"
            assert refusal_of(client, job.header("x" * 3000)) == "WORKER_ID_INVALID"
        server.signal(signal.SIGTERM)
        code, out, err = server.end()
    assert code == 0, err
    lines = lines_of(server.line + server.data_line + out + err)
    by_event = {line["event"]: line for line in lines}
    assert {
        "listening",
        "data_port_listening",
        "metrics_listening",
        "center_initialized",
        "round_committed",
        "call_refused",
    } <= by_event.keys()
    assert by_event["round_committed"]["workers"] == ["a\n{}"]
    assert by_event["round_committed"]["round"] == 3
    assert by_event["center_initialized"]["peer"].startswith("ipv4:127.0.0.1:")
    refused = {line["reason"]: line for line in lines if line["event"] == "call_refused"}
    assert refused["MESSAGE_MALFORMED"]["rpc"] == "PushAndAverage"
    assert refused["WORKER_ID_INVALID"]["worker"] == "x" * 2000 + "..."
    assert {line["program"] for line in lines} == {"ps-server"}
    assert "Traceback" not in err


def refusal_of(client: RawClient, message: Message | bytes) -> str:
    stream = client.open_push()
    stream.send(message)
    return stream.refusal().reason


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("ps_server", "serve", "--num-workers", "2", "--bind", "nonsense"), "nonsense"),
        (("ps_server", "serve", "--num-workers", "2", "--metrics-bind", "nonsense"), "--metrics-bind 'nonsense'"),
        (("ps_server", "serve", "--num-workers", "2", "--bind", "127.0.0.1:0", "--metrics-bind", "256.0.0.1:1"), "256"),
        (("ps_server", "serve", "--num-workers", "2", "--min-workers", "3"), "--min-workers 3"),
        (("ps_worker", "digits", "--alone", "--save-center", "/no/such/dir/x"), "/no/such/dir"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_without_a_traceback(command: tuple[str, ...], what: str) -> None:
    for as_json in (True, False):
        process = Prepared(*command, *(["--log-json"] if as_json else []), pipes=True, cwd=ROOT)
        try:
            out, errors = process.communicate(TIMEOUT_S)
        finally:
            process.kill()
        assert (process.returncode, out) == (1, "")
        assert len(errors.splitlines()) == 1
        assert what in errors
        assert "Traceback" not in errors
        if as_json:
            (line,) = lines_of(errors)
            assert (line["event"], line["level"]) == ("failed", "error")
            assert what in line["cause"]


def test_a_defect_is_one_line_too() -> None:
    code = "from modelaverage.logs import log_json; log_json('p'); import threading\n"
    for raising in ("1 / 0", "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()"):
        done = python("-c", code + raising)
        (line,) = lines_of(done.stderr)
        assert (line["event"], line["program"], line["message"]) == ("crashed", "p", "division by zero")
        assert "ZeroDivisionError" in line["traceback"]


def test_a_line_has_numbers_that_json_has_not_as_words_and_an_end() -> None:
    code = (
        "from modelaverage.logs import log_json, event; log_json('p'); import logging\n"
        "cause = float('nan')\n"
        "logging.getLogger('x').error('y' * 9000, extra=event('failed', cause=cause))\n"
    )
    (line,) = lines_of(python("-c", code).stderr)
    assert line["cause"] == "nan"
    assert len(line["message"]) == 2003


def test_a_worker_says_which_server_is_away_and_for_whom_it_waits() -> None:
    code = (
        "import sys, logging; from modelaverage.logs import log_json; log_json('w')\n"
        "from ma_client import ParameterServerSession as S; import numpy as np\n"
        "s = S([sys.argv[1]], worker_id='a', is_chief=True, reconnect_timeout_s=0.2)\n"
        "s.initialize({'w': np.zeros(3, np.float32)})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: s.push_and_average({'w': np.zeros(3, np.float32)})\n"
        "except Exception as e: logging.getLogger().error('%s', type(e).__name__)\n"
    )
    with ServerProcess() as server:
        worker = subprocess.Popen(
            [sys.executable, "-c", code, server.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        server.signal(signal.SIGKILL)
        server.end()
        _, err = worker.communicate("go\n", timeout=TIMEOUT_S)
    lines = lines_of(err)
    assert [line["event"] for line in lines] == ["server_away", "other"]
    assert lines[0]["peer"] == server.address
    assert lines[1]["message"] == "ServerUnavailableError"


def test_no_line_has_a_value_of_a_tensor_in_it() -> None:
    secret = 1234.5678
    with ServerProcess("--log-json", "--verbose", num_workers=1) as server:
        address = json.loads(server.line)["addresses"][0]
        with RawClient(address) as client:
            values = {"w": np.full(8, secret, np.float32)}
            client.initialize(values)
            client.open_push().send(b"\x12\x08" + values["w"].tobytes()[:8])
            until(lambda: client.status().received_bytes > 0, "the center came")
        server.signal(signal.SIGTERM)
        _, out, err = server.end()
    text = server.line + out + err
    assert lines_of(text)
    assert str(secret)[:6] not in text
