"""One session, two threads: the second call fails, the first is not affected. Any thread may call `close`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest

from ma_client import ParameterServerSession
from modelaverage.errors import ModelAverageError, SessionInUseError
from tests.conftest import RunningServer, StartServer
from tests.optimizer.workers import TIMEOUT_S, Running, wait_for_status

pytestmark = pytest.mark.in_memory

CENTER = {"w": np.zeros(3, np.float32)}
CALLS: dict[str, Callable[[ParameterServerSession], Any]] = {
    "push_and_average": lambda session: session.push_and_average(CENTER),
    "pull": lambda session: session.pull(),
    "initialize": lambda session: session.initialize(CENTER),
    "statuses": lambda session: session.status(),
    "check_intact": lambda session: session.check_intact(),
    "unchanged": lambda session: session.unchanged(CENTER),
}


def started(server: RunningServer, worker_id: str = "chief") -> ParameterServerSession:
    session = ParameterServerSession([server.address], worker_id=worker_id, is_chief=worker_id == "chief")
    if session.is_chief:
        session.initialize(CENTER)
    session.pull(timeout_s=TIMEOUT_S)
    return session


def at_the_barrier(server: RunningServer, session: ParameterServerSession) -> Running[Any]:
    """A push that waits for another worker."""
    push = Running(lambda: session.push_and_average(CENTER, copy=True))
    wait_for_status(server, lambda status: any(w.worker_id == session.worker_id and w.waiting for w in status.workers))
    return push


@pytest.mark.parametrize("call", CALLS)
def test_a_second_thread_is_told_and_the_first_is_not_harmed(call: str, start_server: StartServer) -> None:
    server = start_server(2)
    with started(server) as session, started(server, "other") as other:
        push = at_the_barrier(server, session)
        with pytest.raises(
            SessionInUseError, match=rf"called {call} on the session of 'chief' while .* was in its push_and_average: "
        ) as told:
            CALLS[call](session)
        assert threading.current_thread().name in str(told.value)
        other.push_and_average({"w": np.ones(3, np.float32) * 4})
        assert push.result().center["w"].tolist() == [2.0] * 3


def test_threads_may_use_a_session_one_after_the_other(start_server: StartServer) -> None:
    with started(start_server(1)) as session:
        steps = [Running(lambda: session.push_and_average(CENTER).global_step).result() for _ in range(3)]
        assert steps == [1, 2, 3]


def test_a_call_that_failed_leaves_the_session_to_others(start_server: StartServer) -> None:
    with started(start_server(1)) as session:
        with pytest.raises(ModelAverageError):
            session.push_and_average({"other": np.zeros(3)})
        assert Running(session.status).result().global_step == 0


def waiting(every: list[RunningServer], session: ParameterServerSession) -> None:
    """Returns when the session's push waits on all servers."""
    for server in every:
        wait_for_status(
            server, lambda status: any(w.worker_id == session.worker_id and w.waiting for w in status.workers)
        )


@pytest.fixture(params=[1, 2], ids=["one server", "two servers"])
def lonely(request: pytest.FixtureRequest, start_server: StartServer) -> Iterator[tuple[Any, ...]]:
    """Servers of two workers, and the session of one, with variables to push."""
    every = [start_server(2) for _ in range(request.param)]
    variables = {name: np.zeros(300, np.float32) for name in "wv"}
    with ParameterServerSession([server.address for server in every], worker_id="chief", is_chief=True) as session:
        session.initialize(variables)
        session.pull(timeout_s=TIMEOUT_S)
        yield every, session, variables


def test_another_thread_may_close_a_session_that_waits(lonely: tuple[Any, ...]) -> None:
    every, session, variables = lonely
    push = Running(lambda: session.push_and_average(variables))
    waiting(every, session)
    Running(session.close).result()
    with pytest.raises(ModelAverageError):
        push.result()
    with pytest.raises(ModelAverageError, match="closed"):
        session.pull()


def test_a_signal_handler_may_close_a_session_that_waits(lonely: tuple[Any, ...]) -> None:
    every, session, variables = lonely

    def close(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        session.close()

    def interrupt() -> None:
        waiting(every, session)
        signal.pthread_kill(main.ident or 0, signal.SIGUSR1)

    main = threading.main_thread()
    before = signal.signal(signal.SIGUSR1, close)
    try:
        interrupts = Running(interrupt)
        with pytest.raises(ModelAverageError):
            session.push_and_average(variables, timeout_s=TIMEOUT_S)
        interrupts.result()
    finally:
        signal.signal(signal.SIGUSR1, before)
