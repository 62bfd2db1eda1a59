"""SIGHUP from a closing terminal ends everything as SIGTERM does; under nohup it ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ma_client import ParameterServerSession
from tests.launched import Launched
from tests.test_server_process import ServerProcess

CENTER = {"w": np.zeros(4, np.float32)}
# Prints when its handlers are set, and how it ends; with the argument "nohup" it runs as if started by nohup.
UNWINDING = """
import signal, sys, time
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from ps_worker.commands.stop_signals import end_cleanly_on_signals, stop_signals
end_cleanly_on_signals()
try:
    print("ready", signal.SIGHUP in stop_signals(), flush=True)
    sys.stdin.readline()
    print("told", flush=True)
finally:
    print("unwound", flush=True)
"""


@pytest.fixture(autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Processes inherit whether SIGHUP is ignored, as it is if the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def worker(address: str) -> ParameterServerSession:
    return ParameterServerSession([address], worker_id="chief", is_chief=True, reconnect_timeout_s=0)


def test_sighup_ends_a_server_as_sigterm_does_with_its_last_rounds_written(tmp_path: Path) -> None:
    flags = ("--checkpoint-dir", str(tmp_path), "--checkpoint-every-rounds", "100")
    with ServerProcess(*flags, num_workers=1) as server:
        with worker(server.address) as session:
            session.initialize(CENTER)
            for _ in range(3):
                session.push_and_average(CENTER)
        os.kill(server.pid, signal.SIGHUP)
        assert server.end()[0] == 0
    assert max(path.name for path in tmp_path.glob("center-*")).startswith("center-00000000000000000003.")


def test_a_second_sighup_does_not_break_off_the_end() -> None:
    """The kernel sends one when a terminal closes, and the shell another."""
    code = """
import asyncio, os, signal
from ps_server.server import stop_on_signals
async def main():
    stop = asyncio.Event()
    stop_on_signals(stop)
    os.kill(os.getpid(), signal.SIGHUP)
    await stop.wait()
    os.kill(os.getpid(), signal.SIGHUP)
    print("ends in peace")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "ends in peace\n"), done.stderr


def test_a_server_that_was_started_with_nohup_outlives_its_terminal() -> None:
    program = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from ps_server.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["-c", program, "serve", "--bind", "127.0.0.1:0", "--num-workers", "1"]
    with Launched(arguments) as server:
        server.wait_for("listening on")
        address = next(line.split()[-1] for line in server.lines if "listening" in line)
        server.process.send_signal(signal.SIGHUP)
        with worker(address) as session:
            session.initialize(CENTER)
            assert session.push_and_average(CENTER).global_step == 1
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_worker_unwinds_on_either_signal(number: signal.Signals) -> None:
    with Launched(["-c", UNWINDING, "terminal"]) as process:
        process.wait_for("ready True")
        process.process.send_signal(number)
        assert process.ended() == 128 + number
        assert process.lines[-1] == "unwound"


def test_a_worker_under_nohup_goes_on() -> None:
    with Launched(["-c", UNWINDING, "nohup"]) as process:
        process.wait_for("ready False")
        process.process.send_signal(signal.SIGHUP)
        process.tell("go on")
        assert process.ended() == 0
        assert process.lines[-2:] == ["told", "unwound"]


def test_the_launcher_under_nohup_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal; os.kill(int(os.environ['LAUNCHER']), signal.SIGHUP); print('sent')\n")
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); os.environ['LAUNCHER'] = str(os.getpid())\n"
        "from ps_worker.launch import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--workers", "1", "--", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[worker-0] sent\n"), done.stderr
