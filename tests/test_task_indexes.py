"""Task indexes that the server assigns: which process gets which index, and when another process may get it."""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ma_client import ClusterError, ClusterSpec, ParameterServerSession
from ma_client.cluster import joining as client
from modelaverage.errors import DeadlineExceededError, ServerUnavailableError
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.rules.policy import RoundPolicy
from ps_server.rules.task_indexes import TaskIndexes
from tests.conftest import StartServer
from tests.faults import RestartedServer
from tests.jobs import CENTER, of, worker
from tests.raw_client import RawClient, Stream, initialize_header, manifest_of, until
from tests.strategies import thorough

TIMEOUT_S = 20.0
REJOIN_TIMEOUT_S = 5.0

# The rules.


@dataclass
class Slot:
    process: bytes
    call: int
    ended_at_s: float | None = None


class Oracle:
    """An oracle: the rules again, by a look at every slot."""

    def __init__(self, num_workers: int, closed_until_s: float) -> None:
        self.slots: list[Slot | None] = [None] * num_workers
        self.used = [False] * num_workers
        self.closed_until_s = closed_until_s

    def expire(self, now_s: float) -> None:
        for index, slot in enumerate(self.slots):
            if slot is not None and slot.ended_at_s is not None and now_s - slot.ended_at_s >= REJOIN_TIMEOUT_S:
                self.slots[index] = None

    def heard(self, index: int, now_s: float) -> None:
        if index < len(self.slots):
            slot = self.slots[index]
            if slot is not None and slot.ended_at_s is not None and now_s - slot.ended_at_s >= REJOIN_TIMEOUT_S:
                self.expire(now_s)
            self.used[index] = self.used[index] or self.slots[index] is None

    def gone(self, index: int) -> None:
        if index < len(self.slots):
            self.used[index] = False

    def take(self, process: bytes, call: int, wanted: int | None, now_s: float) -> int | None:
        self.expire(now_s)
        for index, slot in enumerate(self.slots):
            if slot is not None and slot.process == process:
                self.slots[index] = Slot(process, call)
                return index
        for index, slot in enumerate(self.slots):
            is_free = now_s >= self.closed_until_s and not self.used[index]
            allowed = is_free if wanted is None else index == wanted
            if slot is None and allowed:
                self.slots[index], self.used[index] = Slot(process, call), False
                return index
        return None

    def ended(self, process: bytes, call: int, now_s: float) -> None:
        for slot in self.slots:
            if slot is not None and (slot.process, slot.call) == (process, call):
                slot.ended_at_s = now_s

    def leave(self, process: bytes) -> None:
        self.slots = [None if slot is not None and slot.process == process else slot for slot in self.slots]


PROCESSES = st.sampled_from([b"a", b"b", b"c", b"d"])
EVENTS = st.one_of(
    st.tuples(st.just("take"), PROCESSES, st.none() | st.integers(0, 2)),
    st.tuples(st.just("ended"), PROCESSES, st.integers(0, 3)),
    st.tuples(st.just("leave"), PROCESSES, st.none()),
    st.tuples(st.just("heard"), PROCESSES, st.integers(0, 3)),
    st.tuples(st.just("gone"), PROCESSES, st.integers(0, 3)),
)


@thorough
@given(
    st.integers(1, 3), st.sampled_from([-math.inf, 4.0]), st.lists(st.tuples(EVENTS, st.integers(0, 6)), max_size=40)
)
def test_everybody_gets_the_index_that_the_rules_give(
    num_workers: int, closed_until_s: float, events: list[tuple[tuple[str, bytes, int | None], int]]
) -> None:
    indexes, oracle = TaskIndexes(num_workers, REJOIN_TIMEOUT_S, closed_until_s), Oracle(num_workers, closed_until_s)
    now_s, calls = 0.0, dict.fromkeys((b"a", b"b", b"c", b"d"), 0)
    has: dict[bytes, int] = {}
    for (what, process, number), passed_s in events:
        now_s += passed_s
        if what == "take":
            wanted = None if number is None else min(number, num_workers - 1)
            calls[process] += 1
            expected = oracle.take(process, calls[process], wanted, now_s)
            assert indexes.take(process, calls[process], wanted, now_s) == expected
            has.pop(process, None)
            if expected is not None:
                has = {p: index for p, index in has.items() if index != expected} | {process: expected}
        elif what == "ended":
            call = calls[process] - (number or 0)
            oracle.ended(process, call, now_s)
            indexes.ended(process, call, now_s)
        elif what == "heard":
            oracle.heard(number or 0, now_s)
            indexes.heard(number or 0, now_s)
        elif what == "gone":
            oracle.gone(number or 0)
            indexes.gone(number or 0)
        else:
            oracle.leave(process)
            indexes.leave(process)
        due_at_s = indexes.due_at_s(now_s)
        ends_s = [slot.ended_at_s + REJOIN_TIMEOUT_S for slot in oracle.slots if slot and slot.ended_at_s is not None]
        assert due_at_s == min([*ends_s, *([closed_until_s] if now_s < closed_until_s else [])], default=math.inf)


# Over the wire.


def join(raw: RawClient, process: str, wanted: int | None = None) -> Stream[pb.JoinResponse]:
    stream = raw.open_join()
    stream.send(pb.JoinRequest(incarnation=process.encode().ljust(16), task_index=wanted))
    stream.half_close()
    return stream


def leave(raw: RawClient, process: str) -> None:
    stream = raw.open_leave()
    stream.send(pb.LeaveRequest(worker_id="w", incarnation=process.encode().ljust(16)))
    stream.half_close()
    stream.receive()


def index_of(stream: Stream[pb.JoinResponse]) -> int | None:
    response = stream.receive()
    return response.task_index if response.HasField("task_index") else None


def test_processes_get_the_lowest_indexes_that_are_free_and_then_wait(start_server: StartServer) -> None:
    server = start_server(2)
    with RawClient(server.address) as raw:
        assert [index_of(join(raw, "a")), index_of(join(raw, "b"))] == [0, 1]
        third = join(raw, "c")
        assert index_of(third) is None
        leave(raw, "a")
        assert index_of(third) == 0


def test_the_process_that_has_waited_longest_is_served_first(start_server: StartServer) -> None:
    with RawClient(start_server(1).address) as raw:
        assert index_of(join(raw, "0")) == 0
        waiting = {}
        for process in "12345":
            waiting[process] = join(raw, process)
            assert index_of(waiting[process]) is None
        for leaving, process in zip("01234", "12345", strict=True):
            leave(raw, leaving)
            assert index_of(waiting[process]) == 0


def test_a_broken_call_keeps_its_index_for_its_process_and_then_gives_it_to_a_waiting_one(
    start_server: StartServer,
) -> None:
    server = start_server(1, rejoin_timeout_s=1.0)
    with RawClient(server.address) as raw:
        first, began_s = join(raw, "a"), time.monotonic()
        assert index_of(first) == 0
        second = join(raw, "b")
        assert index_of(second) is None
        first.cancel()
        again = join(raw, "a", wanted=0)
        assert index_of(again) == 0
        again.cancel()
        assert index_of(second) == 0
        assert time.monotonic() - began_s >= 1.0


def test_a_newer_call_of_a_process_takes_the_place_of_the_older_one(start_server: StartServer) -> None:
    with RawClient(start_server(2).address) as raw:
        older = join(raw, "a")
        assert index_of(older) == 0
        assert index_of(join(raw, "a", wanted=0)) == 0
        assert older.refusal().reason == "PUSH_SUPERSEDED"


def leaves(session: ParameterServerSession) -> None:
    session.close()


def finishes(session: ParameterServerSession) -> None:
    session.finish()
    assert session.pull()[1] == 1  # a worker that has finished may read


@pytest.mark.parametrize("ends", [leaves, finishes])
def test_the_index_of_a_worker_that_was_started_with_it_is_assigned_only_when_that_worker_is_gone(
    ends: Callable[[ParameterServerSession], None], start_server: StartServer
) -> None:
    address = start_server(RoundPolicy(3, 1, 3, grace_s=0.0)).address
    with RawClient(address) as raw, worker(address, "worker-1") as trains, worker(address, "worker-2") as is_new:
        raw.initialize(CENTER)
        for session in (trains, is_new):  # a worker that has not pushed yet is one, too
            session.pull()
        trains.push_and_average(of(1))
        assert index_of(join(raw, "a")) == 0
        waiting = join(raw, "b")
        assert index_of(waiting) is None
        ends(trains)
        assert index_of(waiting) == 1


def test_the_index_of_a_chief_that_still_sends_the_center_is_not_assigned(start_server: StartServer) -> None:
    with RawClient(start_server(2).address) as raw:

        def the_next_index_is_1() -> bool:
            # Again each time: a header that comes while "a" has the index says nothing.
            raw.open_initialize().send(initialize_header(manifest_of(CENTER), "worker-0"))
            index = index_of(join(raw, "a"))
            leave(raw, "a")
            return index == 1

        until(the_next_index_is_1, "the server has the chief's header")


def test_a_process_takes_an_index_in_use_by_naming_it(start_server: StartServer) -> None:
    address = start_server(1).address
    with RawClient(address) as raw, worker(address, "worker-0") as its_own:
        raw.initialize(CENTER)
        its_own.pull()
        assert index_of(join(raw, "a", wanted=0)) == 0


def test_readers_take_no_index(start_server: StartServer) -> None:
    address = start_server(1).address
    with RawClient(address) as raw, worker(address, "worker-0") as reader:
        raw.initialize(CENTER)
        reader.pull(catch_up=False)
        assert index_of(join(raw, "a")) == 0


def test_an_index_that_the_job_does_not_have_is_refused(start_server: StartServer) -> None:
    with RawClient(start_server(2).address) as raw:
        refusal = join(raw, "a", wanted=2).refusal()
        assert refusal.reason == "ROUND_FULL"
        assert "--num-workers 2" in refusal.message


def test_a_server_that_stops_does_not_wait_for_those_who_have_an_index(start_server: StartServer) -> None:
    server = start_server(1)
    with RawClient(server.address) as raw:
        stream = join(raw, "a")
        assert index_of(stream) == 0
        began_s = time.monotonic()
        server.stop()
        assert stream.refusal().reason == "SERVER_STOPPING"
        assert time.monotonic() - began_s < 1.5  # its grace is 2 s


def test_after_a_restart_from_a_checkpoint_newcomers_wait_for_those_who_come_back(
    start_server: StartServer, tmp_path: Path
) -> None:
    before = start_server(2, checkpoints=CheckpointPolicy(tmp_path))
    with RawClient(before.address) as raw:
        raw.initialize(CENTER)
    before.stop()
    after = start_server(2, checkpoints=CheckpointPolicy(tmp_path), rejoin_timeout_s=1.0)
    with RawClient(after.address) as raw:
        newcomer = join(raw, "new")
        assert index_of(newcomer) is None
        assert index_of(join(raw, "old", wanted=0)) == 0
        assert index_of(newcomer) == 1


# In a worker.


def test_the_cluster_has_the_index_and_the_number_of_workers_that_the_server_says(start_server: StartServer) -> None:
    address = start_server(3).address
    environ = {"MA_PS_HOSTS": address, "MA_TASK_INDEX": "auto"}
    try:
        assert ClusterSpec.from_env(environ) == ClusterSpec((address,), 3, 0)
        assert ClusterSpec.resolve({}, ps_hosts=(address,), task_index="auto") == ClusterSpec((address,), 3, 0)
        with pytest.raises(ClusterError, match=r"MA_NUM_WORKERS='2'.*--num-workers 3"):
            ClusterSpec.from_env({**environ, "MA_NUM_WORKERS": "2"})
    finally:
        client._end((os.getpid(), address))


def test_a_worker_that_gets_no_index_in_time_says_what_it_waited_for(start_server: StartServer) -> None:
    address = start_server(1).address
    with RawClient(address) as raw:
        assert index_of(join(raw, "a")) == 0
        with pytest.raises(DeadlineExceededError, match=f"all 1 of {address} are taken"):
            ClusterSpec.resolve({}, ps_hosts=(address,), task_index="auto", join_timeout_s=0.5)


def test_a_worker_whose_server_is_not_there_says_so() -> None:
    with pytest.raises(ServerUnavailableError, match=r"127\.0\.0\.1:1"):
        ClusterSpec.resolve({}, ps_hosts=("127.0.0.1:1",), task_index="auto", join_timeout_s=0.5)


def test_auto_is_handed_on_to_a_child_as_it_is() -> None:
    environ = {"MA_PS_HOSTS": "ps:1", "MA_TASK_INDEX": "auto"}
    assert ClusterSpec.env_for_child(environ) == environ
    assert ClusterSpec.env_for_child({"MA_TASK_INDEX": "1"}, ps_hosts=("ps:1",), num_workers=2) == {
        "MA_PS_HOSTS": "ps:1",
        "MA_NUM_WORKERS": "2",
        "MA_TASK_INDEX": "1",
    }


class AutoWorker:
    """A process that prints its task index and lives until its stdin ends."""

    def __init__(self, address: str) -> None:
        code = "import sys, ma_client\nprint(ma_client.ClusterSpec.from_env().task_index, flush=True)\nsys.stdin.read()"
        environ = {**os.environ, "MA_PS_HOSTS": address, "MA_TASK_INDEX": "auto"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> AutoWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def index(self) -> int:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], TIMEOUT_S)[0], "never said its index"
        return int(self.process.stdout.readline())

    def end(self) -> int:
        self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode


def test_workers_that_start_at_the_same_time_get_different_indexes_and_a_killed_ones_goes_to_the_next(
    start_server: StartServer,
) -> None:
    address = start_server(2).address
    with AutoWorker(address) as one, AutoWorker(address) as two:
        indexes = {one.index(): one, two.index(): two}
        assert sorted(indexes) == [0, 1]
        indexes[1].process.send_signal(signal.SIGKILL)
        with AutoWorker(address) as three:
            assert three.index() == 1


def test_a_worker_that_ends_well_gives_its_index_back_at_once(start_server: StartServer) -> None:
    address = start_server(1, rejoin_timeout_s=600.0).address
    with AutoWorker(address) as one:
        assert one.index() == 0
        assert one.end() == 0
        with AutoWorker(address) as two:
            assert two.index() == 0


def test_workers_keep_their_indexes_when_the_server_is_killed_and_started_again(tmp_path: Path) -> None:
    with RestartedServer(tmp_path, "--num-workers", "2") as server:
        server.listens()
        with RawClient(server.address) as raw:
            raw.initialize(CENTER)
        with AutoWorker(server.address) as one, AutoWorker(server.address) as two:
            last = {one.index(): one, two.index(): two}[1]
            server.kill()
            server.listens()
            with RawClient(server.address) as raw:
                newcomer = join(raw, "new")
                assert index_of(newcomer) is None
                assert last.end() == 0
                assert index_of(newcomer) == 1
