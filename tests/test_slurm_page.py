"""The script of docs/slurm.md runs: on one machine, with commands of Slurm's names that do what Slurm's would."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file

SCRIPT = re.findall(r"```bash\n(.*?)```", (Path(__file__).parents[1] / "docs/slurm.md").read_text(), re.DOTALL)[0]
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


def run_job(tmp_path: Path, code: int) -> int:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    for package, name in (("ps_server", "ps-server"), ("ps_worker", "ps-worker")):
        (commands / name).write_text(f'#!/bin/bash\nexec {sys.executable} -m {package} "$@"\n')
        (commands / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "code").write_text(str(code))
    (tmp_path / "job").write_text(SCRIPT)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    job = subprocess.Popen(
        ["bash", "job"],
        env={**os.environ, **slurm, "PATH": f"{commands}:{os.environ['PATH']}"},
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        return job.wait(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def test_the_script_trains_to_the_end_and_leaves_the_center(tmp_path: Path) -> None:
    assert run_job(tmp_path, 0) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert load_file(run / "center.safetensors")["w"].tolist() == [6.0] * 4  # three rounds of the mean of 1 and 3
    assert (run / "token").stat().st_mode & 0o077 == 0


def test_the_script_fails_when_a_worker_does(tmp_path: Path) -> None:
    assert run_job(tmp_path, 7) == 7
    assert not list(tmp_path.glob("runs/*/center.safetensors"))
