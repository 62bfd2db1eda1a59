"""Processes forked from a worker: torch's DataLoader workers, and others that a script makes. They print nothing, and
the parent continues to train, whatever they do with its session."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.test_server_process import ServerProcess

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")

TIMEOUT_S = 120
# Another thread makes rounds all the time, so gRPC would log a message at every fork.
BUSY = """
import sys, threading, os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, from 3.12 on: this process has threads
import numpy as np
from ma_client import ParameterServerSession
VALUES = {"w": np.zeros(1 << 18, np.float32)}
session = ParameterServerSession(
    [sys.argv[1]], worker_id="worker-0", is_chief=True, shared_memory=sys.argv[2] == "shared"
)
session.initialize(VALUES)
session.push_and_average(VALUES)
over, failures = threading.Event(), []

def train():
    try:
        while not over.is_set():
            session.push_and_average(VALUES, timeout_s=20)
    except BaseException as error:
        failures.append(error)

def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
FORKING = """
thread = threading.Thread(target=train)
thread.start()
for _ in range(40):
    forked(lambda: None)
over.set()
thread.join()
assert not failures, failures
session.close()
"""
LOADING = """
import torch
from torch.utils.data import DataLoader, TensorDataset
data = DataLoader(
    TensorDataset(torch.arange(64.0)), batch_size=8, num_workers=2, multiprocessing_context="fork"
)
thread = threading.Thread(target=train)
thread.start()
for _ in range(3):
    assert sum(float(batch.sum()) for batch, in data) == 2016
over.set()
thread.join()
assert not failures, failures
session.close()
"""
MEDDLING = """
def ends_its_session():
    with session:
        pass

def calls():
    try:
        session.push_and_average(VALUES)
    except Exception as error:
        assert f"process {parent}" in str(error), error
        assert "forked" in str(error)
    else:
        raise AssertionError("a round in a forked process")

def asks():
    try:
        session.status()
    except Exception as error:
        assert "forked" in str(error)
    else:
        raise AssertionError("a call in a forked process")

def wants_its_own():
    try:
        ParameterServerSession([sys.argv[1]], worker_id="looks", shared_memory=False)
    except Exception as error:
        assert f"forked from process {parent}" in str(error), error
        assert "spawn" in str(error)
    else:
        raise AssertionError("a session in a forked process")

def is_garbage():
    global session
    del session
    import gc
    gc.collect()

def ends_normally():
    sys.exit(0)

parent = os.getpid()
step = session.base_step
for work in (ends_its_session, calls, asks, wants_its_own, is_garbage):
    forked(work)
    step += 1
    assert session.push_and_average(VALUES, timeout_s=20).global_step == step, work
pid = os.fork()
if pid == 0:
    sys.exit(0)  # with all that an interpreter does at its end
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert session.push_and_average(VALUES, timeout_s=20).global_step == step + 1
(worker,) = (one for one in session.status().workers if one.worker_id == "worker-0")
assert not worker.has_left and worker.pushes_counted == step + 1
session.close()
"""


def plain(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The environment of a user's script: without the variables that the commands of this project set."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("kind", ["shared", "inline"])
@pytest.mark.parametrize("script", [FORKING, MEDDLING], ids=["forks", "meddles"])
def test_a_forked_process_prints_nothing_and_harms_nothing(script: str, kind: str) -> None:
    with ServerProcess(num_workers=1) as server:
        done = plain(BUSY + script, server.address, kind)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


OWN = """
from ma_client import ParameterServerSession

def look(worker_id):
    with ParameterServerSession([sys.argv[1]], worker_id=worker_id, shared_memory=False) as own:
        own.status()
"""


@pytest.mark.parametrize(
    ("opens_before", "support", "works"),
    [
        pytest.param(False, "", True, id="forked before the first session"),
        pytest.param(True, "", False, id="forked after it"),
        pytest.param(True, "0", False, id="forked after it, without gRPC's handlers"),
        pytest.param(True, "1", True, id="forked after it, with gRPC's handlers"),
    ],
)
def test_a_forked_process_has_a_session_of_its_own_or_is_told_why_not(
    opens_before: bool, support: str, works: bool
) -> None:
    script = f"""
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
if {support!r}:
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = {support!r}
{OWN}
if {opens_before}:
    look("parent")
pid = os.fork()
if pid == 0:
    try:
        look("child")
    except Exception as error:
        print(error, flush=True)
        os._exit(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    with ServerProcess(num_workers=1) as server:
        done = plain(script, server.address)
    assert (done.returncode, done.stderr) == (0 if works else 1, "")
    assert ("gRPC does not work in it" in done.stdout) is not works


@pytest.mark.long
def test_the_workers_of_a_data_loader_print_nothing() -> None:
    with ServerProcess(num_workers=1) as server:
        done = plain(BUSY + LOADING, server.address, "shared")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_the_user_says_of_grpcs_messages_counts_and_nothing_is_left_in_the_environment() -> None:
    code = "import ma_client, os; print(os.environ.get('GRPC_VERBOSITY'))"
    assert plain(code).stdout == "None\n"
    said = f"import os; os.environ['GRPC_VERBOSITY'] = 'NONE'\n{code}"
    assert plain(said).stdout == "NONE\n"
