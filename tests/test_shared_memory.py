"""Shared memory is only where bytes lie: rounds, errors and accounts are those of inline bytes."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode

from ma_client import Outcome, ParameterServerSession, PushResult
from modelaverage.errors import ServerUnavailableError
from modelaverage.runtime.shared_memory import Segment, SegmentAddress
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.raw_client import Arrays, RawClient, Stream, fragments_of, push_header, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory needs Linux's memfd")

CENTER: Arrays = {
    "w": np.arange(40, dtype=np.float32),
    "scale": np.array(0.5),
    "half": np.arange(9, dtype=np.float16).reshape(3, 3),
}
COUNT = len(fragments_of(CENTER))


def of(value: float) -> Arrays:
    return {name: (array * 0 + value).astype(array.dtype) for name, array in CENTER.items()}


class Cluster:
    """Sessions of one server that have the center; some of them in shared memory, some inline."""

    def __init__(self, address: str, shared: list[bool], center: Arrays = CENTER) -> None:
        self.address = address
        self.workers = [
            ParameterServerSession(
                [address], worker_id=f"w{i}", is_chief=i == 0, shared_memory=use, fragment_size_bytes=64
            )
            for i, use in enumerate(shared)
        ]
        self.workers[0].initialize(center)
        for session in self.workers:
            session.pull()
        self._pool = ThreadPoolExecutor(len(shared))

    def round(self, values: list[Arrays], weights: list[float] | None = None) -> list[PushResult]:
        """All push at once."""
        pushes = [
            self._pool.submit(session.push_and_average, arrays, weight)
            for session, arrays, weight in zip(self.workers, values, weights or [1.0] * len(values), strict=True)
        ]
        return [push.result(timeout=20) for push in pushes]

    def close(self) -> None:
        for session in self.workers:
            session.close()
        self._pool.shutdown()


@pytest.fixture(params=[[True, True], [True, False], [False, True], [False, False]], ids=str)
def cluster(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[Cluster]:
    made = Cluster(start_server(2, shared=True).address, request.param)
    yield made
    made.close()


def test_a_round_gives_the_average_wherever_the_bytes_lie(cluster: Cluster) -> None:
    for turn in range(3):
        for result in cluster.round([of(1.0 + turn), of(2.0 + turn)]):
            assert result.outcome is Outcome.COMMITTED
            assert result.global_step == turn + 1
            for name, expected in of(1.5 + turn).items():
                assert result.center[name].tobytes() == expected.tobytes()


def test_weights_and_values_that_are_not_finite_count_wherever_the_bytes_lie(cluster: Cluster) -> None:
    broken = of(4.0)
    broken["w"][[3, 7]] = np.inf
    first, _ = cluster.round([broken, of(8.0)], weights=[1.0, 3.0])
    assert first.center["scale"] == 7.0
    assert np.isinf(first.center["w"]).sum() == 2
    status = cluster.workers[0].status()
    assert [worker.nonfinite_values for worker in status.workers] == [2, 0]


def test_bytes_in_shared_memory_are_accounted_as_inline_ones_are(start_server: StartServer) -> None:
    totals = []
    for shared in ([True, True], [False, False]):
        cluster = Cluster(start_server(2, shared=True).address, shared)
        cluster.round([of(1.0), of(2.0)])
        status = cluster.workers[0].status()
        totals.append((status.received_bytes, status.sent_bytes))
        assert (status.shared_bytes > 0) == shared[0]
        cluster.close()
    assert totals[0] == totals[1]


def test_one_message_may_name_more_fragments_than_one_could_carry(start_server: StartServer) -> None:
    many: Arrays = {"w": np.arange(3000, dtype=np.float32)}  # 188 fragments; a message carries 64
    cluster = Cluster(start_server(2, shared=True).address, [True, True], many)
    for turn in (1, 2):  # the second time all of them are filled before the admission comes
        for result in cluster.round([{"w": many["w"] + turn}, {"w": many["w"] - turn}]):
            assert result.outcome is Outcome.COMMITTED
            assert result.center["w"].tobytes() == many["w"].tobytes()
    cluster.close()


def test_a_variable_that_all_left_untouched_keeps_the_centers_bytes(start_server: StartServer) -> None:
    cluster = Cluster(start_server(1, shared=True).address, [True])
    result = cluster.workers[0].push_and_average(of(9.0), untouched=["scale"])
    assert result.center["scale"] == CENTER["scale"]
    assert (result.center["w"] == 9.0).all()
    cluster.close()


def waits(watcher: RawClient, worker_id: str) -> bool:
    return watcher.worker(worker_id).waiting


def test_all_in_shared_memory_are_summed_in_the_order_of_their_names(start_server: StartServer) -> None:
    # Chosen so that every order of the three gives a different float32 sum.
    parts = [np.float32(1e8), np.float32(-1e8), np.float32(1.0)]
    expected = ((parts[0] + parts[1]) + parts[2]) / np.float32(3)
    assert expected != ((parts[1] + parts[2]) + parts[0]) / np.float32(3)
    cluster = Cluster(start_server(3, shared=True).address, [True] * 3)
    with RawClient(cluster.address) as watcher, ThreadPoolExecutor(3) as pool:
        for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
            pushes = []
            for number in order:
                values = {**of(0.0), "w": np.full(40, parts[number])}
                pushes.append(pool.submit(cluster.workers[number].push_and_average, values))
                if number != order[-1]:
                    until(partial(waits, watcher, f"w{number}"), "the push is complete")
            for push in pushes:
                assert push.result(timeout=20).center["w"].tolist() == [expected] * 40
    cluster.close()


def test_a_worker_that_restarts_gets_memory_of_its_own(start_server: StartServer) -> None:
    server = start_server(1, shared=True)
    for value in (1.0, 2.0):
        cluster = Cluster(server.address, [True])
        assert (cluster.round([of(value)])[0].center["w"] == value).all()
        assert cluster.workers[0].status().shared_bytes > 0
        cluster.close()


# Hostile input: what is refused inline is refused here, and changes nothing.


def shared(first: int, count: int) -> pb.PushAndAverageRequest:
    return pb.PushAndAverageRequest(shared=pb.SharedFragments(first=first, count=count))


def opened(client: RawClient, address: str, accepts: bool) -> Stream[pb.PushAndAverageResponse]:
    with ParameterServerSession([address], worker_id="w0", is_chief=True, fragment_size_bytes=64) as chief:
        chief.initialize(CENTER)
    header, _ = client.pull()
    stream = client.open_push()
    stream.send(push_header(header.manifest_id, "w0", base_step=0, accepts_shared_memory=accepts))
    return stream


@pytest.mark.parametrize(
    ("accepts", "first", "count", "reason"),
    [
        (False, 0, 1, "MESSAGE_OUT_OF_ORDER"),
        (True, 0, 0, "MESSAGE_OUT_OF_ORDER"),
        (True, 1, 1, "FRAGMENT_MISPLACED"),
        (True, 0, COUNT + 1, "FRAGMENT_EXTRA"),
        (True, COUNT, 1, "FRAGMENT_EXTRA"),
        (True, 2**32 - 1, 2**32 - 1, "FRAGMENT_EXTRA"),
    ],
)
def test_shared_fragments_that_do_not_come_next_are_refused(
    accepts: bool, first: int, count: int, reason: str, start_server: StartServer
) -> None:
    server = start_server(1, shared=True)
    with RawClient(server.address) as client:
        stream = opened(client, server.address, accepts)
        admission = stream.receive().admission
        assert admission.HasField("contribution") == accepts
        stream.send(shared(first, count))
        refusal = stream.refusal()
        assert refusal.reason == reason
        assert refusal.code is StatusCode.INVALID_ARGUMENT
        assert client.status().global_step == 0
    with ParameterServerSession([server.address], worker_id="w0") as session:
        session.pull()
        assert (session.push_and_average(of(3.0)).center["w"] == 3.0).all()


def test_a_push_may_go_on_inline_and_again_in_shared_memory(start_server: StartServer) -> None:
    server = start_server(1, shared=True)
    fragments = fragments_of(of(5.0))
    with RawClient(server.address) as client:
        stream = opened(client, server.address, accepts=True)
        offer = stream.receive().admission.contribution
        segment = Segment.open(SegmentAddress(offer.path, offer.nonce), sum(map(len, fragments)), writable=True)
        assert segment is not None
        segment.body[:] = np.frombuffer(b"".join(fragments), np.uint8)
        stream.send(shared(0, 1))
        stream.give(fragments, 1, 2)
        stream.send(shared(2, COUNT - 2))
        last = stream.receive()
        while not last.HasField("outcome"):
            last = stream.receive()
        assert last.outcome.outcome == pb.OUTCOME_COMMITTED
        _, center = client.pull()
        assert center == b"".join(fragments)


# Segments.


def test_a_segment_is_opened_only_at_its_address_with_its_nonce_and_size(tmp_path: Path) -> None:
    segment = Segment.create(100, for_clients_to_write=True)
    segment.body[:] = 7
    address = segment.address
    opened_again = Segment.open(address, 100, writable=True)
    assert opened_again is not None
    assert (opened_again.body == 7).all()
    opened_again.body[3] = 8
    assert segment.body[3] == 8
    (tmp_path / "file").write_bytes(bytes(8192))
    for path, nonce, size in (
        (address.path, bytes(16), 100),
        (address.path, address.nonce[:-1], 100),
        (address.path, address.nonce, 99),
        (f"/proc/{os.getpid()}/fd/9999", address.nonce, 100),
        ("/proc/self/mem", address.nonce, 100),
        ("", address.nonce, 100),
        (str(tmp_path / "file"), bytes(16), 4096),
    ):
        assert Segment.open(SegmentAddress(path, nonce), size, writable=True) is None


def test_memory_that_could_be_taken_away_is_not_used() -> None:
    # Reading a mapping beyond the end of its file kills the process, so a file that may shrink is not mapped.
    descriptor = os.memfd_create("not sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 8192)
    address = SegmentAddress(f"/proc/{os.getpid()}/fd/{descriptor}", bytes(16))
    assert Segment.open(address, 4096, writable=False) is None
    os.close(descriptor)


def test_a_worker_cannot_write_to_the_center() -> None:
    segment = Segment.create(100, for_clients_to_write=False)
    assert Segment.open(segment.address, 100, writable=False) is not None
    assert Segment.open(segment.address, 100, writable=True) is None
    with open(segment.address.path, "r+b", buffering=0) as file:
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), 0)
        with pytest.raises(PermissionError):
            file.write(b"x")
        with pytest.raises(PermissionError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_segments_vanish_with_a_server_that_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", "1"]
    with subprocess.Popen([*command, "--ready-file", str(ready)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        values = {"w": np.ones(1 << 20, np.float32)}
        with ParameterServerSession(
            [json.loads(ready.read_text())["address"]], worker_id="w", is_chief=True, reconnect_timeout_s=0
        ) as session:
            session.initialize(values)
            held = session.push_and_average(values, copy=False).center["w"]
            assert session.status().shared_bytes > 0
            mapped = Path(f"/proc/{process.pid}/maps").read_text()
            assert "/memfd:" in mapped
            assert "/dev/shm/" not in mapped, "a name there would outlive the server"
            process.send_signal(signal.SIGKILL)
            process.wait()
            with pytest.raises(ServerUnavailableError):
                session.push_and_average(values)
            assert (held == 1).all()
        assert not Path(f"/proc/{process.pid}").exists()


def test_a_server_may_be_told_to_lend_nothing(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "ps_server", "serve", "--bind", "127.0.0.1:0", "--num-workers", "1"]
    command += ["--no-shared-memory", "--ready-file", str(ready)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        values = {"w": np.ones(1 << 20, np.float32)}
        with ParameterServerSession(
            [json.loads(ready.read_text())["address"]], worker_id="w", is_chief=True
        ) as session:
            session.initialize(values)
            assert (session.push_and_average(values).center["w"] == 1).all()
            assert session.status().shared_bytes == 0
        process.terminate()
