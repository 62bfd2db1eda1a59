"""Times that a user gives: which values are refused, and how."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ma_client import ClusterError, ClusterSpec, DataSettings, ParameterServerSession
from ma_client.job.ticket import PushTicket
from modelaverage.checks import MAX_TIMEOUT_S
from modelaverage.errors import InvalidRequestError
from tests.conftest import StartServer

pytestmark = pytest.mark.in_memory

CENTER = {"w": np.zeros(3, np.float32)}
Call = Callable[[ParameterServerSession, Any], object]
CALLS: dict[str, Call] = {
    "initialize": lambda session, time_s: session.initialize(CENTER, timeout_s=time_s),
    "pull": lambda session, time_s: session.pull(timeout_s=time_s),
    "push_and_average": lambda session, time_s: session.push_and_average(CENTER, timeout_s=time_s),
    "begin_push": lambda session, time_s: session.begin_push(CENTER, timeout_s=time_s).result(),
    "finish": lambda session, time_s: session.finish(time_s),
    "status": lambda session, time_s: session.status(time_s),
    "statuses": lambda session, time_s: session.statuses(time_s),
    "wait_for_others": lambda session, time_s: session.wait_for_others(time_s),
    "result": lambda _, time_s: PushTicket(lambda: None, "a").result(time_s),  # type: ignore[arg-type, return-value]
}
TAKE_ZERO = {"wait_for_others", "result"}
NO_TIMES = [-1.0, -math.inf, math.nan, "soon"]


@pytest.fixture
def session(start_server: StartServer) -> ParameterServerSession:
    session = ParameterServerSession([start_server(1).address], worker_id="a", is_chief=True)
    session.initialize(CENTER)
    session.pull()
    return session


@pytest.mark.parametrize(
    ("call", "time_s"),
    [(call, time_s) for call in CALLS for time_s in [*NO_TIMES, *([] if call in TAKE_ZERO else [0])]],
)
def test_a_call_refuses_a_time_that_is_none_by_name_and_value(
    call: str, time_s: object, session: ParameterServerSession
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^timeout_s is {time_s!r}; give a number of seconds above 0"):
        CALLS[call](session, time_s)


@pytest.mark.parametrize("call", [call for call in CALLS if call != "wait_for_others"])
def test_a_call_takes_a_long_time_and_refuses_one_that_would_count_as_over(
    call: str, session: ParameterServerSession
) -> None:
    CALLS[call](session, MAX_TIMEOUT_S)
    with pytest.raises(InvalidRequestError, match=r"timeout_s is inf; .* up to 1e\+09, .*or None \("):
        CALLS[call](session, math.inf)


def test_zero_means_not_to_wait_where_a_wait_is_asked_for(session: ParameterServerSession) -> None:
    ticket = session.begin_push(CENTER)
    ticket.result()
    assert ticket.result(0).global_step == 1
    session.finish()
    assert session.wait_for_others(0)


@pytest.mark.parametrize(
    ("name", "time_s"),
    [
        *[("connect_timeout_s", time_s) for time_s in [*NO_TIMES, 0]],
        *[("reconnect_timeout_s", time_s) for time_s in NO_TIMES],
        *[("round_timeout_s", time_s) for time_s in [*NO_TIMES, 0]],
    ],
)
def test_a_session_refuses_a_time_that_is_none_by_name_and_value(name: str, time_s: object) -> None:
    options: dict[str, Any] = {name: time_s}
    with pytest.raises(InvalidRequestError, match=f"^{name} is {time_s!r}; give a number of seconds above 0"):
        ParameterServerSession(["127.0.0.1:1"], worker_id="a", **options)


@pytest.mark.parametrize("name", ["connect_timeout_s", "silence_timeout_s", "pause_s"])
def test_data_settings_refuse_a_time_that_is_none(name: str) -> None:
    options: dict[str, Any] = {name: math.nan}
    with pytest.raises(InvalidRequestError, match=f"^{name} is nan"):
        DataSettings(**options)
    with pytest.raises(InvalidRequestError, match=f"^{name} is -1"):
        DataSettings(**{name: -1})


@pytest.mark.parametrize("time_s", [0, -1.0, math.nan])
@pytest.mark.parametrize("index", ["auto", 0])
def test_a_cluster_refuses_a_time_that_is_none_whether_it_needs_it_or_not(index: Any, time_s: float) -> None:
    with pytest.raises(ClusterError, match=f"^join_timeout_s is {time_s!r}; give a number of seconds above 0$"):
        ClusterSpec.resolve({}, ps_hosts=("ps:1",), num_workers=1, task_index=index, join_timeout_s=time_s)


def test_a_time_from_numpy_is_one() -> None:
    assert DataSettings(pause_s=np.float32(0.5)).pause_s == 0.5
