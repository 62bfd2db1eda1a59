"""The session: numpy in, numpy out, and nothing of gRPC shows."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import Outcome, ParameterServerSession, PushResult
from ma_client.job.one_server import others_missing
from modelaverage import wire
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelAverageError,
    NotInitializedError,
    Reason,
)
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import StartServer
from tests.raw_client import RawClient, push_header, until

pytestmark = pytest.mark.in_memory

Array = NDArray[Any]
CENTER = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([0.5, -0.5])}
A = {name: value + 1 for name, value in CENTER.items()}
B = {name: value + 3 for name, value in CENTER.items()}
AVERAGE = {name: value + 2 for name, value in CENTER.items()}


def session_of(address: str, worker_id: str = "a", **options: Any) -> ParameterServerSession:
    return ParameterServerSession([address], worker_id=worker_id, **{"is_chief": worker_id == "a", **options})


def assert_same(center: Any, expected: dict[str, Array]) -> None:
    """The same names in the same order, and the same dtypes, shapes and bits."""
    assert list(center) == list(expected)
    for name, value in expected.items():
        assert isinstance(center[name], np.ndarray)
        assert (center[name].dtype, center[name].shape) == (value.dtype, value.shape)
        assert center[name].tobytes() == value.tobytes()


@pytest.fixture
def lone(start_server: StartServer) -> Iterator[ParameterServerSession]:
    """The chief of a job of one worker; nothing is initialized."""
    with session_of(start_server(1).address) as session:
        yield session


class Pair:
    """Two sessions of a job of two workers that have pulled CENTER."""

    def __init__(self, address: str, a: ParameterServerSession, b: ParameterServerSession, pool: ThreadPoolExecutor):
        self.address, self.a, self.b, self._pool = address, a, b, pool

    def start(self, call: Callable[..., PushResult], *arguments: Any, **options: Any) -> Future[PushResult]:
        """Calls the function in a separate thread; it has to end within 20 s."""
        return self._pool.submit(call, *arguments, **{"timeout_s": 20.0, **options})

    def round(self, a: dict[str, Array], b: dict[str, Array], **options: Any) -> tuple[PushResult, PushResult]:
        """Both push at once; ``options`` are those of a."""
        first = self.start(self.a.push_and_average, a, **options)
        second = self.b.push_and_average(b, timeout_s=20.0)
        return first.result(), second

    def waits(self, worker_id: str) -> None:
        """Returns once the worker is at the barrier."""
        until(lambda: any(w.waiting for w in self.b.status().workers if w.worker_id == worker_id), "it waits")


@contextmanager
def pair_of(start_server: StartServer, fragment_size_bytes: int = 8) -> Iterator[Pair]:
    address = start_server(2).address
    with (
        session_of(address, fragment_size_bytes=fragment_size_bytes) as a,
        session_of(address, "b") as b,
        ThreadPoolExecutor() as pool,
    ):
        a.initialize(CENTER)
        a.pull()
        b.pull()
        yield Pair(address, a, b, pool)


@pytest.fixture
def pair(start_server: StartServer) -> Iterator[Pair]:
    with pair_of(start_server) as pair:
        yield pair


# Values in and out.


def test_a_round_averages_and_both_workers_get_the_center(pair: Pair) -> None:
    for result in pair.round(A, B, local_step=20):
        assert (result.outcome, result.global_step) == (Outcome.COMMITTED, 1)
        assert result.contributors == ("a", "b")
        assert result.untouched == frozenset()
        assert result.waited_s >= 0
        assert_same(result.center, AVERAGE)
    center, step = pair.b.pull()
    assert step == 1
    assert_same(center, AVERAGE)
    assert pair.b.status().workers[0].local_step == 20


def test_one_worker_gets_its_own_values_back_round_after_round(lone: ParameterServerSession) -> None:
    assert lone.initialize(CENTER, global_step=5).global_step == 5
    for step in range(6, 9):
        values = {name: value * step for name, value in CENTER.items()}
        result = lone.push_and_average(values)
        assert (result.outcome, result.global_step, result.contributors) == (Outcome.COMMITTED, step, ("a",))
        assert_same(result.center, values)


ARRAYS = {
    "float64": np.linspace(-1, 1, 7),
    "float32": np.linspace(-1, 1, 7, dtype=np.float32),
    "float16": np.linspace(-1, 1, 7, dtype=np.float16),
    "bfloat16": np.linspace(-1, 1, 7).astype(ml_dtypes.bfloat16),
    "0-d": np.array(1.5, np.float32),
    "0-d bfloat16": np.array(1.5, ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "empty first": np.zeros((3, 0, 2)),
    "non-contiguous": np.arange(24, dtype=np.float32)[::2],
    "backwards": np.arange(5, dtype=np.float16)[::-1],
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "Fortran order": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "broadcast": np.broadcast_to(np.float32(2), (3, 2)),
    "negative zero": np.array([-0.0, 0.0]),
    "special": np.array([np.nan, np.inf, -np.inf, 5e-324]),
    "big": np.arange(1000, dtype=np.float32).reshape(10, 10, 10),
}


def test_every_kind_of_array_comes_back_as_it_went_in(lone: ParameterServerSession) -> None:
    expected = {kind: np.ascontiguousarray(value).reshape(value.shape) for kind, value in ARRAYS.items()}
    lone.initialize(ARRAYS)
    assert_same(lone.pull()[0], expected)
    assert_same(lone.push_and_average(ARRAYS).center, expected)


def test_big_endian_arrays_are_values_like_any_other(lone: ParameterServerSession) -> None:
    big = {dtype: np.array([1.0, -2.5, 3.0], dtype) for dtype in (">f4", ">f8", ">f2")}
    little = {dtype: value.astype(value.dtype.newbyteorder("<")) for dtype, value in big.items()}
    lone.initialize(big)
    assert_same(lone.pull()[0], little)
    assert_same(lone.push_and_average(big).center, little)


def test_python_floats_and_lists_are_float64(lone: ParameterServerSession) -> None:
    lone.initialize({"scalar": 1.5, "list": [0.5, 2.0]})
    result = lone.push_and_average({"scalar": 2.5, "list": [1.0, 4.0]})
    assert_same(result.center, {"scalar": np.array(2.5), "list": np.array([1.0, 4.0])})


def test_what_cannot_be_averaged_is_refused_by_name(lone: ParameterServerSession) -> None:
    for value in (1, True, "text", 1j, None, np.zeros(2, np.int32), np.zeros(1, np.complex64)):
        with pytest.raises(InvalidRequestError, match="variable 'x' has dtype") as refused:
            lone.initialize({"x": value})
        assert refused.value.reason is Reason.MANIFEST_INVALID


def test_the_order_of_a_push_does_not_matter(pair: Pair) -> None:
    backwards = dict(reversed(A.items()))
    assert list(backwards) != list(A)
    for result in pair.round(backwards, B):
        assert_same(result.center, AVERAGE)


def test_the_workers_weights_are_their_shares(pair: Pair) -> None:
    expected = {name: value + value.dtype.type(1.5) for name, value in CENTER.items()}
    for result in pair.round(A, B, weight=3.0):
        assert_same(result.center, expected)


def test_what_both_left_untouched_keeps_the_centers_values(pair: Pair) -> None:
    first = pair.start(pair.a.push_and_average, A, untouched=["b"])
    second = pair.b.push_and_average(B, untouched={"b", "w"}, timeout_s=20.0)
    for result in (first.result(), second):
        assert result.untouched == {"b"}
        assert_same(result.center, {"w": AVERAGE["w"], "b": CENTER["b"]})


def test_an_unknown_untouched_variable_is_refused_by_name(pair: Pair) -> None:
    with pytest.raises(InvalidRequestError, match="'nonsense'"):
        pair.a.push_and_average(A, untouched=["nonsense"])
    for result in pair.round(A, B):
        assert_same(result.center, AVERAGE)


def test_a_push_leaves_the_pushed_arrays_as_they_are(pair: Pair) -> None:
    local = {name: value.copy() for name, value in A.items()}
    for value in local.values():
        value.flags.writeable = False
    result, _ = pair.round(local, B)
    assert_same(local, A)
    assert not any(np.shares_memory(result.center[name], value) for name, value in local.items())


# copy=True and copy=False.


def test_a_copied_center_is_the_callers_own(pair: Pair) -> None:
    pulled, _ = pair.a.pull()
    result, _ = pair.round(A, B)
    assert_same(pulled, CENTER)
    result.center["w"][...] = 0
    assert_same(pair.a.pull()[0], AVERAGE)
    assert not result.center["w"].any()


def test_a_center_that_is_not_copied_is_overwritten_by_the_next_call(pair: Pair) -> None:
    pulled, _ = pair.a.pull(copy=False)
    assert_same(pulled, CENTER)
    result, _ = pair.round(A, B, copy=False)
    assert_same(result.center, AVERAGE)
    assert_same(pulled, AVERAGE)
    assert all(np.shares_memory(pulled[name], result.center[name]) for name in CENTER)


def test_a_center_that_is_not_copied_cannot_be_written_to(pair: Pair) -> None:
    pulled, _ = pair.a.pull(copy=False)
    result, _ = pair.round(A, B, copy=False)
    for center in (pulled, result.center):
        with pytest.raises(ValueError, match="read-only"):
            center["w"][...] = 0


@pytest.mark.in_memory(False)
def test_a_center_that_is_not_copied_is_pushed_whole_when_the_round_starts_over(pair: Pair) -> None:
    # Fragments of the void average come down before the restart; they must not become part of what is pushed again.
    center, _ = pair.a.pull(copy=False)
    average = {name: ((value.astype(float) + B[name]) / 2).astype(value.dtype) for name, value in CENTER.items()}
    manifest_id = pair.b.status().manifest_id
    pushing = pair.start(pair.a.push_and_average, center)
    pair.waits("a")
    with RawClient(pair.address) as gone:
        half = gone.open_push()
        half.send(push_header(manifest_id, "b"))
        half.admission()
        half.give([b"\0" * 8])
        assert half.receive().fragment.index == 0
    restarted = pair.start(push_when_free, pair.b, B)
    assert_same(restarted.result().center, average)
    assert_same(pushing.result().center, average)


def push_when_free(session: ParameterServerSession, variables: dict[str, Array], timeout_s: float) -> PushResult:
    """Pushes, once the server has noticed that the process that had this worker id before is gone."""
    while True:
        try:
            return session.push_and_average(variables, timeout_s=timeout_s)
        except ConflictError as error:
            if error.reason is not Reason.WORKER_ID_IN_USE:
                raise


# Initialize and pull.


def test_only_the_chief_initializes(start_server: StartServer) -> None:
    with session_of(start_server(1).address, "b") as session:
        with pytest.raises(InvalidRequestError, match="'b' is not the chief"):
            session.initialize(CENTER)
        with pytest.raises(NotInitializedError):
            session.pull(wait_initialized=False)


def test_a_second_initialize_changes_nothing_and_tells_the_step(pair: Pair) -> None:
    pair.round(A, B)
    again = pair.a.initialize(CENTER, global_step=100)
    assert (again.initialized, again.global_step) == (False, 1)
    center, step = pair.a.pull()
    assert step == 1
    assert_same(center, AVERAGE)


def test_another_model_is_refused_at_the_second_initialize(pair: Pair) -> None:
    with pytest.raises(ConflictError, match=r"'w' is float32\[3\] .* float32\[2, 3\]") as refused:
        pair.a.initialize({"w": np.zeros(3, np.float32), "b": CENTER["b"]})
    assert refused.value.reason is Reason.MANIFEST_MISMATCH
    assert_same(pair.a.pull()[0], CENTER)


def test_a_push_before_a_pull_is_refused(pair: Pair) -> None:
    with (
        session_of(pair.address, "late") as session,
        pytest.raises(NotInitializedError, match="pull the center"),
    ):
        session.push_and_average(A)


def test_a_chief_that_initialized_may_push_without_a_pull(lone: ParameterServerSession) -> None:
    assert lone.initialize(CENTER, global_step=5).initialized
    result = lone.push_and_average(A)
    assert (result.outcome, result.global_step) == (Outcome.COMMITTED, 6)
    assert_same(result.center, A)


def test_a_pull_waits_for_the_chief(start_server: StartServer) -> None:
    address = start_server(1).address
    with session_of(address) as chief, session_of(address, "b") as early, ThreadPoolExecutor() as pool:
        pulling = pool.submit(early.pull, timeout_s=20.0)
        until(lambda: [w.worker_id for w in chief.status().workers] == ["b"], "the pull waits")
        chief.initialize(CENTER, global_step=4)
        center, step = pulling.result()
    assert step == 4
    assert_same(center, CENTER)


def test_a_pull_that_waits_in_vain_ends_in_time(lone: ParameterServerSession) -> None:
    with pytest.raises(DeadlineExceededError, match=r"waited 0\.2 s"):
        lone.pull(timeout_s=0.2)
    lone.initialize(CENTER)
    assert_same(lone.pull(timeout_s=20.0)[0], CENTER)


@pytest.mark.parametrize(
    ("expected", "named"),
    [
        ({"w": np.zeros((2, 3)), "b": np.zeros(2)}, r"'w' is float64\[2, 3\] .* float32\[2, 3\]"),
        ({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3)}, r"'b' is float64\[3\] .* float64\[2\]"),
        ({"w": np.zeros((2, 3), np.float32)}, "'b'"),
        ({**CENTER, "more": np.zeros(1)}, "'more'"),
    ],
)
def test_a_pull_of_another_center_than_expected_is_refused(pair: Pair, expected: dict[str, Array], named: str) -> None:
    with pytest.raises(ConflictError, match=named) as refused:
        pair.a.pull(expected=expected)
    assert refused.value.reason is Reason.MANIFEST_MISMATCH
    for result in pair.round(A, B):
        assert_same(result.center, AVERAGE)


def test_the_order_of_what_a_pull_expects_does_not_matter(pair: Pair) -> None:
    center, _ = pair.a.pull(expected=dict(reversed(A.items())))
    assert_same(center, CENTER)


def test_a_session_tells_how_many_workers_a_round_has(pair: Pair) -> None:
    assert (pair.a.num_workers, pair.b.num_workers) == (2, 2)


# Ends.


def test_a_push_that_waits_in_vain_may_be_made_again(pair: Pair) -> None:
    local = {name: value.copy() for name, value in A.items()}
    with pytest.raises(DeadlineExceededError, match=r"base step 0.*waited 1 s"):
        pair.a.push_and_average(local, timeout_s=1.0)
    assert_same(local, A)
    assert pair.a.base_step == 0
    first, second = pair.round(local, B)
    # The server has the whole first try, and counts the worker once: the second try finds it counted, or its round
    # over.
    assert first.outcome in (Outcome.ALREADY_COUNTED, Outcome.STALE)
    assert second.outcome is Outcome.COMMITTED
    for result in (first, second):
        assert (result.global_step, result.contributors) == (1, ("a", "b"))
        assert_same(result.center, AVERAGE)
    # And the next round is like any other.
    for result in pair.round(A, B):
        assert (result.outcome, result.global_step) == (Outcome.COMMITTED, 2)


def test_a_push_that_waits_in_vain_is_counted_when_the_others_come(pair: Pair) -> None:
    with pytest.raises(DeadlineExceededError):
        pair.a.push_and_average(A, timeout_s=0.3)
    assert_same(pair.b.push_and_average(B, timeout_s=20.0).center, AVERAGE)
    late = pair.a.push_and_average(A, timeout_s=20.0)
    assert late.outcome in (Outcome.STALE, Outcome.ALREADY_COUNTED)
    assert late.global_step == pair.a.base_step == 1
    assert_same(late.center, AVERAGE)


WAITING_WORKER = """
import sys
import numpy as np
from ma_client import ParameterServerSession

with ParameterServerSession([sys.argv[1]], worker_id="c") as session:
    center, _ = session.pull()
    try:
        session.push_and_average(center)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.in_memory(False)
def test_ctrl_c_ends_a_push_that_waits_at_the_barrier(pair: Pair) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING_WORKER, pair.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            pair.waits("c")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=5)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (0, "interrupted\n", "")


# The server goes down, the session is closed.


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
def test_a_session_that_begins_while_the_server_goes_down_waits_for_the_next_one(code: grpc.StatusCode) -> None:
    looks = list[int]()

    def status(_: bytes, context: grpc.ServicerContext) -> bytes:
        looks.append(1)
        if len(looks) < 3:
            context.abort(code, "going down")
        return pb.GetStatusResponse().SerializeToString()

    methods = {"GetStatus": grpc.unary_unary_rpc_method_handler(status)}
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with ParameterServerSession([f"127.0.0.1:{port}"], worker_id="w", connect_timeout_s=20):
            assert len(looks) == 3
    finally:
        server.stop(None).wait()


CALLS: dict[str, Callable[[ParameterServerSession], object]] = {
    "initialize": lambda session: session.initialize(CENTER),
    "pull": lambda session: session.pull(),
    "push_and_average": lambda session: session.push_and_average(A),
    "begin_push": lambda session: session.begin_push(A),
    "finish": lambda session: session.finish(),
    "wait_for_others": lambda session: session.wait_for_others(1.0),
    "status": lambda session: session.status(),
    "statuses": lambda session: session.statuses(),
    "check_intact": lambda session: session.check_intact(),
    "unchanged": lambda session: session.unchanged(A),
}
CLOSED = "^the session of 'a' is closed; open another one$"


@pytest.mark.parametrize("servers", [1, 2])
def test_every_call_to_a_closed_session_is_refused_at_once_in_the_same_words(
    servers: int, start_server: StartServer
) -> None:
    addresses = [start_server(1).address for _ in range(servers)]
    session = ParameterServerSession(addresses, worker_id="a", is_chief=True)
    session.initialize(CENTER)
    session.pull()
    session.close()
    for call in CALLS.values():
        with pytest.raises(ModelAverageError, match=CLOSED) as raised:
            call(session)
        assert type(raised.value) is ModelAverageError
    session.close()


@pytest.mark.in_memory(False)
@pytest.mark.parametrize("servers", [1, 2])
def test_a_push_that_waits_when_its_session_is_closed_ends_in_the_same_words(
    servers: int, start_server: StartServer
) -> None:
    addresses = [start_server(2).address for _ in range(servers)]
    session = ParameterServerSession(addresses, worker_id="a", is_chief=True)
    session.initialize(CENTER)
    session.pull()
    ticket = session.begin_push(A)
    with RawClient(addresses[-1]) as raw:
        until(lambda: raw.worker("a").fragments_given > 0, "the push waits for the other worker")
    session.close()
    with pytest.raises(ModelAverageError, match=CLOSED):
        ticket.result()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"b": A["b"]}, "variable 'w' exists only in the center"),
        ({"w": A["w"]}, "variable 'b' exists only in the center"),
        ({**A, "x": A["b"]}, "variable 'x' exists only here"),
        ({"x": A["w"], "b": A["b"]}, "variable 'w' exists only in the center, and 'x' only here"),
    ],
)
def test_a_push_names_the_variable_that_is_missing_or_too_many(
    variables: dict[str, Array], said: str, lone: ParameterServerSession
) -> None:
    lone.initialize(CENTER)
    with pytest.raises(ConflictError, match=f"^{said}; give all workers the same model"):
        lone.push_and_average(variables)


def test_a_push_that_is_given_up_names_the_workers_that_it_waited_for(start_server: StartServer) -> None:
    address = start_server(3).address
    with session_of(address) as a, session_of(address, "b") as b:
        a.initialize(CENTER)
        a.pull()
        with pytest.raises(DeadlineExceededError, match=r"base step 0.*; the round waits for 2 not heard from yet$"):
            a.push_and_average(A, timeout_s=0.2)
        b.pull()
        with pytest.raises(DeadlineExceededError, match=r"; the round waits for 'b', 1 not heard from yet$"):
            a.push_and_average(A, timeout_s=0.2)


def test_who_is_missing_after_a_wait_is_told_without_the_worker_itself_and_only_of_its_round() -> None:
    status = pb.GetStatusResponse(global_step=3, waiting_for=["a", "b"])
    status.workers.add(worker_id="b", last_seen_age_s=20.0)
    assert others_missing(status, "a", 3) == "; the round waits for 'b' (last heard from 20 s ago)"
    assert others_missing(status, "a", 2) == ""
    assert others_missing(pb.GetStatusResponse(global_step=3, waiting_for=["a"]), "a", 3) == ""
