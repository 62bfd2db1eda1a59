"""The script of docs/slurm.md runs: on one machine, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.raw_client import until

SCRIPT = re.findall(r"```bash\n(.*?)```", (Path(__file__).parents[1] / "docs/slurm.md").read_text(), re.DOTALL)[0]
TIMEOUT_S = 60.0
TRAIN = """\
import sys
import numpy as np
from ma_client import ClusterSpec, ParameterServerSession
cluster = ClusterSpec.from_env()
with ParameterServerSession.from_env() as session:
    if cluster.is_chief:
        session.initialize({"w": np.zeros(4, np.float32)})
    center, step = session.pull()
    while step < 3:
        step = session.push_and_average({"w": center["w"] + 1 + 2 * cluster.task_index}).global_step
        center, _ = session.pull()
sys.exit(int(open("code").read()))
"""
COMMANDS = {
    "hostname": "echo 127.0.0.1",
    "scontrol": 'echo "$@" >> requeued',
    "srun": 'SLURM_PROCID=0 "$@" & one=$!\nSLURM_PROCID=1 "$@" & two=$!\nwait $one || exit; wait $two',
}


@contextmanager
def job(tmp_path: Path, code: int) -> Iterator[subprocess.Popen[bytes]]:
    """The script as Slurm starts it; its workers end with this code."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
    for package, name in (("ps_server", "ps-server"), ("ps_worker", "ps-worker")):
        (commands / name).write_text(f'#!/bin/bash\nexec {sys.executable} -m {package} "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "code").write_text(str(code))
    (tmp_path / "job").write_text(SCRIPT)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    environ = {**os.environ, **slurm, "PATH": f"{commands}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "job"], env=environ, cwd=tmp_path, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.long
def test_the_script_trains_to_the_end_and_leaves_the_center(tmp_path: Path) -> None:
    with job(tmp_path, 0) as process:
        assert process.wait(TIMEOUT_S) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert load_file(run / "center.safetensors")["w"].tolist() == [6.0] * 4  # three rounds of the mean of 1 and 3
    assert (run / "token").stat().st_mode & 0o077 == 0


def test_shortly_before_its_time_is_over_the_job_asks_to_be_requeued_and_trains_on(tmp_path: Path) -> None:
    with job(tmp_path, 0) as process:
        until(lambda: any(tmp_path.glob("runs/*/checkpoints/*")), "the server runs")
        process.send_signal(signal.SIGUSR1)
        until((tmp_path / "requeued").exists, "a requeue")
        assert process.wait(TIMEOUT_S) == 0
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.long
def test_the_script_fails_when_a_worker_does(tmp_path: Path) -> None:
    with job(tmp_path, 7) as process:
        assert process.wait(TIMEOUT_S) == 7
    assert not list(tmp_path.glob("runs/*/center.safetensors"))
