"""What a real server does when the machine refuses it descriptors, memory or threads, and when readers take nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage import wire
from modelaverage.errors import Reason, ServerUnavailableError, refusal, told_reason
from modelaverage.outcome import Outcome
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.center.center import MAX_OLD_BUFFERS
from ps_server.machine.connections import cut
from ps_server.machine.reserve import Reserve
from tests.launched import Launched
from tests.raw_client import RawClient

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process, and /proc")

SIZE = 4 << 20  # elements: 16 MiB, more than gRPC has on its way to a client that takes nothing
MODEL_BYTES = 4 * SIZE
_NO_READING_AHEAD = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
# Breaks a round's arithmetic once, and then the way to start over.
BROKEN_TWICE = """
import sys
from ps_server.center.center import Center
from ps_server.rules.round import Round
finish, left = Center.finish, [2]
def broken(self, *arguments):
    left[0] -= 1
    if left[0] == 0:
        raise ArithmeticError("a test broke this")
    return finish(self, *arguments)
def broken_too(self, *arguments):
    raise RuntimeError("and this")
Center.finish, Round.abandon = broken, broken_too
from ps_server.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def serving(
    directory: Path, *flags: str, program: tuple[str, ...] = ("-m", "ps_server")
) -> Iterator[tuple[Launched, str]]:
    """A server process for two workers, and its address."""
    ready = directory / "ready.json"
    ready.unlink(missing_ok=True)
    with Launched([*program, "serve", "--bind", "127.0.0.1:0", "--ready-file", str(ready), *flags]) as server:
        server.wait_for("listening")
        yield server, json.loads(ready.read_text())["address"]


def descriptors(server: Launched) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def shared_bytes(server: Launched) -> int:
    """Shared memory that the process has touched."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))


class Pair:
    """Two workers in messages."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        self.sessions = [
            stack.enter_context(
                ParameterServerSession([address], worker_id=f"w{i}", is_chief=i == 0, shared_memory=False)
            )
            for i in range(2)
        ]
        self.sessions[0].initialize({"w": np.zeros(SIZE, np.float32)})
        self.sessions[1].pull()
        self.threads = stack.enter_context(ThreadPoolExecutor(2))

    def round(self, value: float) -> None:
        """Both push; both get the average, and nothing but that."""

        def push(worker: int) -> None:
            values = {"w": np.full(SIZE, value + 2 * worker, np.float32)}
            result = self.sessions[worker].push_and_average(values, timeout_s=30)
            assert result.outcome in (Outcome.COMMITTED, Outcome.ALREADY_COUNTED)
            assert (result.center["w"] == value + 1).all()

        for done in [self.threads.submit(push, worker) for worker in range(2)]:
            done.result()


class Reader:
    """A reader that pulls on its own connection and takes only the header."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        channel: Any = stack.enter_context(grpc.insecure_channel(address, _NO_READING_AHEAD))
        request = pb.PullRequest(worker_id="reader").SerializeToString()
        self._pull: Any = channel.unary_stream(f"/{wire.SERVICE}/Pull")(request)
        self.step = pb.PullResponse.FromString(next(self._pull)).header.global_step

    def reads_on(self) -> tuple[bytes, str]:
        """Everything that still comes, and why the call ends; empty: everything has come."""
        came = bytearray()
        try:
            for data in self._pull:
                came += pb.PullResponse.FromString(data).fragment.data
        except grpc.RpcError as error:
            metadata: Any = error.trailing_metadata()
            return bytes(came), told_reason(metadata) or error.code().name
        return bytes(came), ""


def until(what: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def test_rounds_are_right_where_strangers_have_taken_every_descriptor(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2"))
        pair = Pair(address, stack)
        pair.round(1.0)
        reader = Reader(address, stack)
        limit = descriptors(server) + 3
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        strangers = stack.enter_context(ExitStack())
        host, _, port = address.rpartition(":")

        def full() -> bool:
            strangers.enter_context(socket.create_connection((host, int(port))))
            return descriptors(server) >= limit

        until(full)
        for value in range(10, 40, 10):  # the first needs a new buffer: the reader has the old one
            pair.round(value)
        strangers.close()
        until(lambda: descriptors(server) < limit - 1)
        pair.round(100.0)
        _, why = reader.reads_on()
        assert reader.step == 1
        assert why in ("", "READER_TOO_SLOW", "UNAVAILABLE")


def test_a_round_commits_right_where_there_is_no_memory_for_a_new_buffer(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2"))
        pair = Pair(address, stack)
        for value in range(3):
            pair.round(value)
        before = shared_bytes(server)
        reader = Reader(address, stack)
        used = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
        # Less than a buffer: the rounds already have everything else that they need.
        resource.prlimit(server.process.pid, resource.RLIMIT_AS, (used + MODEL_BYTES // 2, resource.RLIM_INFINITY))
        for value in range(10, 40, 10):
            pair.round(value)
        assert shared_bytes(server) == before, "the reader was ended, and its buffer taken"
        assert reader.reads_on()[1] in ("READER_TOO_SLOW", "UNAVAILABLE")


def test_readers_that_take_nothing_cost_two_models_at_most_and_are_told(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2"))
        pair = Pair(address, stack)
        pair.round(0.0)
        readers = list[Reader]()
        for value in range(1, 9):
            readers += [Reader(address, stack), Reader(address, stack)]
            pair.round(value)
            assert shared_bytes(server) <= (2 + MAX_OLD_BUFFERS) * (MODEL_BYTES + 4096)
        ends = [reader.reads_on() for reader in readers]
        whole = [(reader.step, came) for reader, (came, why) in zip(readers, ends, strict=True) if why == ""]
        assert {why for _, why in ends} - {""} <= {"READER_TOO_SLOW", "UNAVAILABLE"}
        assert len(whole) < len(readers)
        for step, came in whole:
            assert (np.frombuffer(came, np.float32) == step).all(), "the round of value v made step v + 1: v + 1"


def test_a_client_that_takes_nothing_of_a_call_that_was_ended_loses_its_connection(tmp_path: Path) -> None:
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2"))
        pair = Pair(address, stack)
        pair.round(0.0)
        readers = list[Reader]()
        for value in range(MAX_OLD_BUFFERS + 2):
            readers.append(Reader(address, stack))
            pair.round(value)
        server.wait_for("its connection is cut")


def test_a_connection_is_cut_by_the_name_that_grpc_gives_it() -> None:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            listener = socket.create_server((host, 0), family=family)
        except OSError:  # no IPv6 here
            continue
        with listener, socket.create_connection(listener.getsockname()[:2]) as client, listener.accept()[0]:
            port = client.getsockname()[1]
            name = f"ipv4:{host}:{port}" if family is socket.AF_INET else f"ipv6:%5B{host}%5D:{port}"
            assert not cut(name.replace(str(port), "1"))
            assert cut(name)
            assert client.recv(1) == b""
    assert not cut("unix:")
    assert not cut("ipv4:nonsense")


def test_a_reserve_gives_up_descriptors_for_the_server_only_and_takes_them_back() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserve, taken = Reserve(3), list[int]()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert not reserve.is_short
        mine = [reserve.open(lambda: os.open(os.devnull, os.O_RDONLY)) for _ in range(3)]
        assert reserve.is_short
        with pytest.raises(OSError, match="Too many open files"):
            reserve.open(lambda: os.open(os.devnull, os.O_RDONLY))
        for descriptor in mine:
            os.close(descriptor)
        assert not reserve.is_short
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reserve.close()
        for descriptor in taken:
            os.close(descriptor)


def test_a_server_that_cannot_start_its_round_over_ends_with_a_line_that_says_why(tmp_path: Path) -> None:
    checkpoints = ("--checkpoint-dir", str(tmp_path / "checkpoints"))
    with ExitStack() as stack:
        flags = ("--num-workers", "1", *checkpoints)
        server, address = stack.enter_context(serving(tmp_path, *flags, program=("-c", BROKEN_TWICE)))
        session = stack.enter_context(
            ParameterServerSession([address], worker_id="w", is_chief=True, reconnect_timeout_s=0)
        )
        session.initialize({"w": np.zeros(4, np.float32)})
        assert session.push_and_average({"w": np.ones(4, np.float32)}).global_step == 1
        with pytest.raises(ServerUnavailableError):
            session.push_and_average({"w": np.full(4, 7, np.float32)})
        assert server.ended() == 70
        assert "round 1 failed (ArithmeticError: a test broke this), and could not be started over" in server.printed()
        assert "(RuntimeError: and this)" in server.printed()
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, *flags))
        session = stack.enter_context(ParameterServerSession([address], worker_id="w"))
        center, step = session.pull()
        assert (step, center["w"].tolist()) == (1, [1, 1, 1, 1])


def test_an_event_that_fails_starts_the_round_over_and_the_same_pushes_make_it(tmp_path: Path) -> None:
    once = BROKEN_TWICE.replace("Center.finish, Round.abandon = broken, broken_too", "Center.finish = broken")
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2", program=("-c", once)))
        pair = Pair(address, stack)
        for value in range(4):
            pair.round(value)
        assert server.printed().count("starts over, because the server failed: ArithmeticError: a test broke this") == 1


def test_a_push_whose_header_fails_is_told_so_and_made_again(tmp_path: Path) -> None:
    broken = """
import sys
from ps_server.seen.roster import Roster
heard, left = Roster.heard_push_of, [3]
def broken(self, *arguments):
    left[0] -= 1
    if left[0] == 0:
        raise MemoryError
    return heard(self, *arguments)
Roster.heard_push_of = broken
from ps_server.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2", program=("-c", broken)))
        pair = Pair(address, stack)
        for value in range(3):
            pair.round(value)
        assert server.printed().count("starts over, because the server failed: MemoryError") == 1


def test_a_failure_of_one_call_is_that_calls_only(tmp_path: Path) -> None:
    broken = """
import sys
from ps_server.flow import pulls
async def broken(*_):
    raise MemoryError
pulls.send_buffer = broken
from ps_server.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    with ExitStack() as stack:
        server, address = stack.enter_context(serving(tmp_path, "--num-workers", "2", program=("-c", broken)))
        with RawClient(address) as client:
            client.initialize({"w": np.zeros(4, np.float32)})
            pull = client.open_pull()
            pull.send(pb.PullRequest(worker_id="w"))
            refusal = pull.refusal()
            assert (refusal.reason, refusal.code.name) == ("SERVER_OVERLOADED", "UNAVAILABLE")
            assert client.status().global_step == 0
        server.wait_for("Pull failed: MemoryError")


def test_reasons_of_a_server_that_runs_short_are_tried_again_by_the_client() -> None:
    for reason in (Reason.SERVER_OVERLOADED, Reason.READER_TOO_SLOW):
        assert isinstance(refusal(reason, "for a test"), ServerUnavailableError)
