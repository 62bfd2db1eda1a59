"""The test hosts of the bench: what their links let through, and that nothing outlives their context."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.hosts import Network, unavailable_because
from bench.stream import stream_mb_per_s
from tests.launched import Launched, all_gone

RATE_MBIT = 80
RATE_BYTES_PER_S = RATE_MBIT * 1_000_000 // 8
SIZE_BYTES = 8_000_000
# Prints the processes that it has started, and waits.
KEEPING = f"""
import os, signal
from pathlib import Path
from bench.hosts import Network
with Network(2, {RATE_MBIT}) as network:
    network.hosts[0].popen(["sleep", "infinity"])
    print("made", Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
    signal.pause()
"""


@pytest.fixture(autouse=True, scope="module")
def where_hosts_can_be() -> None:
    reason = unavailable_because()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(3, RATE_MBIT) as network:
        yield network


def children() -> set[int]:
    """Pids of this process's children."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def namespaces(pids: set[int]) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}


@contextmanager
def nothing_remains() -> Iterator[None]:
    """Checks that no process is left, without which no namespace is, and no interface of the machine's own."""
    processes, interfaces = children(), os.listdir("/sys/class/net")
    yield
    assert children() <= processes
    assert os.listdir("/sys/class/net") == interfaces


def test_a_stream_gets_the_rate_of_a_link_and_no_more(network: Network) -> None:
    mb_per_s = stream_mb_per_s(network.hosts[0], network.hosts[1], SIZE_BYTES)
    assert 0.8 < mb_per_s * 1e6 / RATE_BYTES_PER_S < 1.03


@pytest.mark.parametrize(
    "ways", [((0, 1), (0, 2)), ((0, 2), (1, 2))], ids=["from one host to two", "from two hosts to one"]
)
def test_streams_at_the_same_end_of_a_link_share_its_rate(network: Network, ways: tuple[tuple[int, int], ...]) -> None:
    began = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        streams = [
            pool.submit(stream_mb_per_s, network.hosts[sender], network.hosts[receiver], SIZE_BYTES)
            for sender, receiver in ways
        ]
    assert all(stream.result() > 0 for stream in streams)
    assert time.perf_counter() - began > 0.97 * len(ways) * SIZE_BYTES / RATE_BYTES_PER_S


def test_every_host_and_the_bridge_have_a_namespace_of_their_own() -> None:
    before = children()
    with Network(2, RATE_MBIT):
        assert len(namespaces(children() - before) - namespaces({os.getpid()})) == 3


def test_nothing_remains_of_a_network_when_its_context_ends() -> None:
    with nothing_remains(), Network(2, RATE_MBIT) as network:
        network.hosts[0].popen(["sleep", "infinity"])


def test_nothing_remains_of_a_network_when_its_context_fails() -> None:
    def fail() -> None:
        with Network(2, RATE_MBIT) as network:
            network.hosts[0].popen(["sleep", "infinity"])
            raise ZeroDivisionError

    with nothing_remains(), pytest.raises(ZeroDivisionError):
        fail()


def test_nothing_remains_of_a_network_that_could_not_be_made() -> None:
    with nothing_remains(), pytest.raises(subprocess.CalledProcessError):
        Network(2, RATE_MBIT, congestion_control="no such").__enter__()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_remains_of_a_network_when_its_process_is_ended(number: signal.Signals) -> None:
    with Launched(["-c", KEEPING]) as launched:
        launched.wait_for("made")
        pids = [int(pid) for pid in launched.lines[0].split()[1:]]
        assert len(pids) == 4  # the bridge's, the hosts', and one more
        launched.process.send_signal(number)
        assert all_gone(pids, timeout_s=10)
