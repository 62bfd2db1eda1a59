"""A broken output ends no server, training or launcher; commands that only show something end quietly."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ps_worker.demo.metrics_file import MetricsFile
from tests.jobs import CENTER
from tests.launched import Launched
from tests.long_plays import long_except
from tests.raw_client import RawClient
from tests.test_limits import serving

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")

TIMEOUT_S = 60
HELP = ["ps_server --help", "ps_server serve --help", "ps_worker --help", "ps_worker.launch --help"]
# `sh` can close descriptors of a child, which Python would not.
REDIRECTIONS = {"full": ">/dev/full", "closed": ">&-", "all closed": "<&- >&- 2>&-", "both full": ">/dev/full 2>&1"}
LOSING = """
import logging, os, resource, sys
from modelaverage.logs import keep_logging, log_json
from modelaverage.runtime.output import OnLoss
if sys.argv[2] == "json":
    log_json("p")
keep_logging("p", OnLoss.GO_ON)
if sys.argv[2] == "json":
    log_json("p")  # its handler writes to the stream that is kept
os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
print("before", flush=True)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as a disk that is full
for number in range(5):
    print("lost", number, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
print("after", flush=True)
print("and on", flush=True)
"""


def shell(command: tuple[str, ...], redirection: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *command]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def into_a_closed_pipe(command: tuple[str, ...], read_lines: int) -> tuple[int, str]:
    """The command's exit code and standard error when its reader leaves after this many lines."""
    with Launched(["-m", *command], read_lines=read_lines) as process:
        return process.ended(), "\n".join(process.errors)


@pytest.mark.parametrize("command", long_except(["ps_server --help"], HELP))
def test_help_that_nobody_reads_ends_quietly(command: str) -> None:
    words = tuple(command.split())
    assert into_a_closed_pipe(words, 0) == (0, "")
    for redirection in REDIRECTIONS.values():
        done = shell(words, redirection)
        assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def looked_at(directory: Path) -> Iterator[str]:
    with serving(directory, "--num-workers", "2") as (_, address), RawClient(address) as client:
        client.initialize(CENTER, 3)
        yield address


def test_a_status_whose_reader_goes_ends_quietly_as_shells_expect(tmp_path: Path) -> None:
    with looked_at(tmp_path) as address:
        for flags, read_lines in (
            ((), 0),
            (("--json",), 0),
            (("--watch", "0.1"), 1),  # nothing changes: no line comes that could fail
            (("--watch", "0.1", "--json"), 1),
        ):
            ended = into_a_closed_pipe(("ps_server", "status", address, *flags), read_lines)
            assert ended == (128 + signal.SIGPIPE, ""), flags


def test_a_status_that_cannot_be_written_says_so_and_fails(tmp_path: Path) -> None:
    with looked_at(tmp_path) as address:
        done = shell(("ps_server", "status", address), ">/dev/full")
        assert (done.returncode, done.stderr) == (
            1,
            "ps-server: cannot write to standard output: No space left on device\n",
        )
        assert shell(("ps_server", "status", address), "2>/dev/full").returncode == 0
        assert shell(("ps_server", "status", address), ">&- 2>&-").returncode == 0


def test_an_export_is_written_even_if_nobody_reads_its_output(tmp_path: Path) -> None:
    out = tmp_path / "center.safetensors"
    with looked_at(tmp_path) as address:
        for redirection in REDIRECTIONS.values():
            done = shell(("ps_server", "export", address, str(out)), redirection)
            assert (done.returncode, done.stderr) == (0, "")
            assert out.stat().st_size > 100
            out.unlink()
        assert into_a_closed_pipe(("ps_server", "export", address, str(out)), 0) == (0, "")
        assert out.exists()


@pytest.mark.parametrize("name", long_except(["full", "all closed"], REDIRECTIONS))
def test_a_server_serves_wherever_its_log_goes(name: str, tmp_path: Path) -> None:
    redirection = REDIRECTIONS[name]
    ready = tmp_path / "ready.json"
    os.mkfifo(ready.with_suffix(".fifo"))
    command = [sys.executable, "-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", "1", "--verbose"]
    with Launched(
        [
            "-c",
            "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[1], 'sh', *sys.argv[2:]])",
            f'exec "$@" {redirection}',
            *command,
            "--ready-file",
            str(ready),
        ]
    ) as server:
        while not ready.exists():
            assert server.process.poll() is None, server.printed()
        address = json.loads(ready.read_text())["address"]
        for number in range(3):
            assert os.readlink(f"/proc/{server.process.pid}/fd/{number}").startswith(("/dev/", "pipe:"))
        with RawClient(address) as client:
            client.initialize(CENTER)
            assert client.status().global_step == 0
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        assert "Traceback" not in server.printed()
        if redirection == ">/dev/full":
            lost = [line for line in server.errors if "standard output cannot be written" in line]
            assert len(lost) == 1, "the log says so once"


@pytest.mark.long
def test_a_training_goes_on_when_nobody_reads_its_lines() -> None:
    code, errors = into_a_closed_pipe(("ps_worker", "digits", "--alone", "--steps", "5", "--interval-steps", "5"), 0)
    assert code == 0, errors
    assert "Traceback" not in errors


SCRIPT = """
import multiprocessing, pathlib, pickle, sys
import beside
class Thing: pass
def work(value): return value + 1
if __name__ == "__main__":
    for number in range(100):
        print("a line", number, "x" * 1000, flush=True)  # more than a pipe holds
    assert sys.argv[1:] == ["--flag", "x"], sys.argv
    assert type(pickle.loads(pickle.dumps(Thing()))) is Thing
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(work, [1]) == [2]
    assert not {"main", "annotations", "SourceFileLoader"} & globals().keys()
    pathlib.Path(__file__).with_name("done").write_text(f"{__name__} {beside.NAME} {__doc__} {__spec__}")
    raise SystemExit(3)
"""


def test_a_script_goes_on_when_nobody_reads_its_lines_and_otherwise_runs_as_usual(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    cluster = ("--ps-hosts", "127.0.0.1:1", "--num-workers", "1", "--task-index", "0")
    command = ("ps_worker", "run", *cluster, str(folder / "train.py"), "--flag", "x")
    code, errors = into_a_closed_pipe(command, 1)
    assert code == 3, errors
    assert (
        errors
        == "ps-worker: standard output cannot be written (Broken pipe): later lines are lost, and the work goes on"
    )
    assert (folder / "done").read_text() == "__main__ beside None None"


def test_metrics_that_cannot_be_written_cost_whole_lines_only(tmp_path: Path) -> None:
    said = list[str]()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, said.append) as metrics:
        metrics.write("1" * 20)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))  # as a disk that is full
            for number in range(3):
                metrics.write(f"{number}" * 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.write("2" * 20)
    assert path.read_text().splitlines() == ["1" * 20, "2" * 20]
    assert said == [
        f"cannot write {path}: File too large; the run goes on without its lines",
        f"{path} can be written again; 3 lines of it are lost",
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_lines_that_were_lost_are_counted_once_there_is_room_again(form: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-c", LOSING, str(log), form], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-2:] == ["after", "and on"]
    (said,) = (line for line in lines if "lines of it are lost" in line)
    (first,) = done.stderr.splitlines()
    if form == "json":
        fields = json.loads(said)
        assert (fields["event"], fields["stream"], fields["lines"]) == ("output_lost", "stdout", 5)
        assert json.loads(first)["event"] == "output_lost"
    else:
        assert said == "p: standard output could not be written (File too large): 5 lines of it are lost"
        assert first.startswith("p: standard output cannot be written (File too large)")
