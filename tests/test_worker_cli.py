"""ps-worker, and the arguments of ma-launch, as a user types them: a mistake is answered with one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_worker.__main__ import main as ps_worker_main
from ps_worker.commands.stop_signals import STOP_SIGNALS
from ps_worker.demo.stopping import consequence
from ps_worker.launch import main as launch_main
from tests.conftest import StartServer
from tests.launched import Launched, said
from tests.prepared import Prepared
from tests.raw_client import RawClient, until
from tests.recorded import slurm, torchrun, without_a_cluster

TIMEOUT_S = 60
WORKER = ("-m", "ps_worker")
LAUNCH = ("-m", "ps_worker.launch")
CLUSTER = ("--ps-hosts", "127.0.0.1:1", "--num-workers", "2", "--task-index", "1")


def run(
    *command: str, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env={**without_a_cluster(os.environ), **(environ or {})},
        check=False,
    )


@pytest.fixture
def as_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undoes what a command does to its process, since it runs in the test's process here."""
    for name in os.environ.keys() - without_a_cluster(os.environ).keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


def exit_code(*command: str) -> int:
    """The exit code of a command, run in this process, which is half a second faster than in its own."""
    main = ps_worker_main if command[: len(WORKER)] == WORKER else launch_main
    try:
        return main(list(command[2:]))
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1


MISTAKES = {
    "no command": (WORKER, "COMMAND"),
    "unknown command": ((*WORKER, "fly"), "'fly'"),
    "no cluster": (
        (*WORKER, "run", __file__),
        "MA_PS_HOSTS, MA_NUM_WORKERS, MA_TASK_INDEX not set; start the script with",
    ),
    "no port": ((*WORKER, "run", "--ps-hosts", "somewhere", "x.py"), "'somewhere' is not HOST:PORT"),
    "no port of the second": ((*WORKER, "run", "--ps-hosts", "a:1,b", "x.py"), "'b' is not HOST:PORT"),
    "port too large": ((*WORKER, "run", "--ps-hosts", "a:65536", "x.py"), "'a:65536' is not HOST:PORT"),
    "no workers": ((*WORKER, "run", "--num-workers", "0", "x.py"), "'0' is not a whole number from 1 up"),
    "index too large": ((*WORKER, "run", *CLUSTER[:-1], "2", __file__), "task_index 2 is not from 0 to 1"),
    "no script": ((*WORKER, "run", *CLUSTER), "SCRIPT"),
    "missing script": ((*WORKER, "run", *CLUSTER, "no_such.py"), "there is no file 'no_such.py'"),
    "half a cluster": (
        (*WORKER, "digits", *CLUSTER[:-2]),
        "MA_TASK_INDEX not set, and what is set (--ps-hosts 127.0.0.1:1, --num-workers 2) does not say which worker",
    ),
    "no environment": ((*WORKER, "digits"), "MA_PS_HOSTS, MA_NUM_WORKERS, MA_TASK_INDEX not set"),
    "interval": (
        (*WORKER, "digits", "--alone", "--steps", "30"),
        "--steps 30 is not a multiple of --interval-steps 100",
    ),
    "learning rate": ((*WORKER, "digits", "--learning-rate", "nan"), "'nan' is not a number above 0"),
    "momentum": ((*WORKER, "digits", "--momentum", "1"), "'1' is not a number from 0 up and below 1"),
    "seed": ((*WORKER, "digits", "--seed", "-1"), "'-1' is not a whole number from 0 up"),
    "timeout": ((*WORKER, "digits", "--connect-timeout-s", "0"), "'0' is not a positive number of seconds"),
    "center": (
        (*WORKER, "digits", *CLUSTER, "--save-center", "/no/such/file"),
        "cannot write to the directory '/no/such'",
    ),
    "nothing to launch": (LAUNCH, "after --"),
    "launch without --": ((*LAUNCH, "digits"), "after --"),
    "launch no servers": ((*LAUNCH, "--ps", "none", "--", "digits"), "'none' is not a whole number from"),
    "unknown flag": ((*LAUNCH, "--wrokers", "2", "--", "digits"), "--wrokers"),
    "launch no workers": ((*LAUNCH, "--workers", "none", "--", "digits"), "'none' is not a whole number from 1 up"),
    "launch missing script": ((*LAUNCH, "--", "no_such.py"), "there is no file 'no_such.py'"),
    "launch interval": ((*LAUNCH, "--", "digits", "--steps", "30"), "--steps 30 is not a multiple"),
    "launch min": ((*LAUNCH, "--min-workers", "3", "--", "digits"), "--min-workers 3, --workers 2 have to ascend"),
    "launch grace": ((*LAUNCH, "--grace-s", "3", "--", "digits"), "--grace-s needs a --min-workers below --workers 2"),
    "launch timeout": ((*LAUNCH, "--round-timeout-s", "x", "--", "digits"), "--round-timeout-s: 'x' is not a positive"),
    "launch checkpoints": (
        (*LAUNCH, "--checkpoint-every-rounds", "2", "--", "digits"),
        "--checkpoint-every-rounds needs a --checkpoint-dir",
    ),
    "launch restarts": (
        (*LAUNCH, "--max-restarts", "-1", "--", "digits"),
        "--max-restarts: '-1' is not a whole number",
    ),
    "launch center is a file": ((*LAUNCH, "--checkpoint-dir", __file__, "--", "digits"), "Not a directory"),
    "outer": (
        (*WORKER, "digits", "--outer", "sgd:momentum=1"),
        "--outer: OuterSGD: momentum is 1.0; it must be from 0",
    ),
    "outer unknown": (
        (*WORKER, "digits", "--outer", "nesterov"),
        "--outer: outer optimizer 'nesterov' is not known here, only average, sgd, adam",
    ),
    "launch outer": ((*LAUNCH, "--", "digits", "--outer", "adam"), "--outer: outer optimizer 'adam' needs lr, such as"),
    "compression": (
        (*WORKER, "digits", "--compression", "zip"),
        "--compression: compression 'zip' is not known here, only none, bfloat16, int8, int4",
    ),
    "launch compression": ((*LAUNCH, "--", "digits", "--compression", "INT8"), "--compression: compression 'INT8' is"),
    "plain averages": ((*WORKER, "digits", *CLUSTER, "--plain-averages"), "--plain-averages needs --alone"),
    "all images": ((*WORKER, "digits", *CLUSTER, "--all-images"), "--all-images needs --alone"),
    "runs is a file": ((*LAUNCH, "--runs", __file__, "--", "digits"), __file__),
}


@pytest.mark.parametrize(("command", "named"), MISTAKES.values(), ids=MISTAKES.keys())
@pytest.mark.usefixtures("as_alone")
def test_wrong_arguments_give_one_line(
    command: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*command) in (1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert named in line


@pytest.mark.parametrize(
    "command", [WORKER, (*WORKER, "run"), (*WORKER, "digits"), LAUNCH, (*LAUNCH, "--", "digits")], ids=" ".join
)
@pytest.mark.usefixtures("as_alone")
def test_every_command_has_help(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*command, "--help") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: ")
    assert printed.err == ""


@pytest.mark.parametrize("mistake", ["outer", "outer unknown", "launch outer", "compression", "launch compression"])
@pytest.mark.usefixtures("as_alone")
def test_a_wrong_outer_optimizer_or_compression_is_a_usage_error(mistake: str) -> None:
    assert exit_code(*MISTAKES[mistake][0]) == 2


@pytest.mark.parametrize("mistake", ["no environment", "launch missing script"])
def test_wrong_arguments_give_one_line_from_a_real_process(mistake: str) -> None:
    command, named = MISTAKES[mistake]
    result = run(*command)
    assert result.returncode in (1, 2)
    (line,) = result.stderr.splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (("--ps-hosts", "a:1,b:1", "--num-workers", "2", "--task-index", "1"), {}),
        (("--ps-hosts", "a:1,b:1", "--num-workers", "2", "--task-index", "1"), slurm(0)),
        (("--ps-hosts", "a:1,b:1"), slurm(1)),
        (("--num-workers", "2"), {**torchrun(1), "MA_PS_HOSTS": "a:1,b:1"}),
        ((), {"MA_PS_HOSTS": "a:1,b:1", "MA_NUM_WORKERS": "2", "MA_TASK_INDEX": "1"}),
    ],
    ids=["flags", "flags within Slurm", "flags and Slurm", "flags and torchrun", "environment"],
)
def test_run_passes_the_cluster_and_the_arguments_to_the_script(
    tmp_path: Path, flags: tuple[str, ...], environ: Mapping[str, str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(*(os.environ[f'MA_{name}'] for name in ('PS_HOSTS', 'NUM_WORKERS', 'TASK_INDEX')), sys.argv)"
    )
    result = run(*WORKER, "run", *flags, "script.py", "--epochs", "3", cwd=tmp_path, environ=environ)
    assert result.stderr == ""
    assert result.stdout == "a:1,b:1 2 1 ['script.py', '--epochs', '3']\n"


def test_exit_code_of_run_is_that_of_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit(7)")
    assert run(*WORKER, "run", *CLUSTER, str(script)).returncode == 7


@pytest.mark.parametrize("command", [("run", __file__), ("digits",)], ids=["run", "digits"])
@pytest.mark.usefixtures("as_alone")
def test_a_flag_that_contradicts_the_launcher_gives_one_line(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in torchrun().items():
        monkeypatch.setenv(name, value)
    assert exit_code(*WORKER, command[0], *CLUSTER[:2], "--num-workers", "3", *command[1:]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ps-worker: --num-workers 3 and WORLD_SIZE='2' contradict each other")


@pytest.mark.usefixtures("as_alone")
def test_server_that_is_not_there_is_named_after_a_bounded_wait(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*WORKER, "digits", *CLUSTER, "--connect-timeout-s", "0.5") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no parameter server answers at 127.0.0.1:1 (waited 0.5 s)" in line


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("torch", "from ps_worker.__main__ import main; sys.exit(main(['digits', '--alone']))"),
        ("rich", "from ps_worker.launch import main; sys.exit(main(['--', 'digits']))"),
    ],
)
def test_missing_extra_gives_one_line_that_says_what_to_install(module: str, start: str) -> None:
    result = run("-c", f"import sys; sys.modules[{module!r}] = None; {start}")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"{module} not installed; run: pip install 'torch-model-average[demo]'")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_worker_that_waits_at_the_barrier_which_says_what_follows_and_gives_its_place_back(
    number: signal.Signals, start_server: StartServer
) -> None:
    address = start_server(2, rejoin_timeout_s=600.0).address
    with RawClient(address) as raw:
        flags = ("--ps-hosts", address, "--task-index", "auto", "--interval-steps", "10")
        worker = Prepared("ps_worker", "digits", *flags, pipes=True)
        try:
            until(lambda: raw.worker("worker-0").waiting, "its first round")
            worker.send_signal(number)
            _, errors = worker.communicate(timeout_s=TIMEOUT_S)
        finally:
            worker.kill()
        assert worker.returncode == 128 + number
        what_follows = "local step 10 of 1200; the server waits for worker-0 until it returns"
        assert errors.splitlines()[-1:] == [f"ps-worker: stopped by {number.name}; {what_follows}"]
        assert "Traceback" not in errors
        assert raw.worker("worker-0").has_left
        joined = raw.open_join()
        joined.send(pb.JoinRequest(incarnation=bytes(16)))
        joined.half_close()
        assert joined.receive().task_index == 0


def test_ctrl_c_while_a_worker_starts_is_one_line() -> None:
    with Launched(["-m", "ps_worker", "digits", "--alone"], environ={"PYTHONUNBUFFERED": "1"}) as worker:
        worker.wait_for("importing torch")
        worker.process.send_signal(signal.SIGINT)
        assert worker.ended() == 130
        assert said(worker) == ["ps-worker: stopped by SIGINT"]


def test_a_worker_that_waits_for_the_chief_says_so_and_ctrl_c_ends_the_wait(start_server: StartServer) -> None:
    cluster = ["--ps-hosts", start_server(2).address, "--num-workers", "2", "--task-index", "1"]
    worker = Prepared("ps_worker", "digits", *cluster, pipes=True)
    assert worker.stderr is not None
    try:
        waits = "ps-worker: waits for worker-0, the chief, to initialize the center (2 s so far)\n"
        assert waits in iter(worker.stderr.readline, "")
        worker.send_signal(signal.SIGINT)
        _, errors = worker.communicate(timeout_s=TIMEOUT_S)
    finally:
        worker.kill()
    assert worker.returncode == 130
    assert errors.splitlines()[-1] == "ps-worker: stopped by SIGINT; local step 0 of 1200"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"phase": pb.PHASE_UNINITIALIZED, "num_workers": 2, "min_workers": 2}, ""),
        ({"phase": pb.PHASE_IDLE, "num_workers": 2, "min_workers": 2}, "; the server waits for w until it returns"),
        ({"phase": pb.PHASE_IDLE, "num_workers": 3, "min_workers": 2}, "; rounds of 2 workers or more go on without w"),
        ({"phase": pb.PHASE_IDLE, "num_workers": 2, "min_workers": 2, "job_over": True}, ""),
    ],
)
def test_what_a_worker_says_of_the_server_that_it_leaves_is_true(status: dict[str, Any], said: str) -> None:
    assert consequence(pb.GetStatusResponse(**status), "w") == said
    finished = [pb.WorkerStatus(worker_id="w", has_finished=True)]
    assert consequence(pb.GetStatusResponse(**status, workers=finished), "w") == ""
