"""A push that is a single message is handed to the carrier as one: gRPC needs a thread to send a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ma_client import ParameterServerSession
from ma_client.transports.calls import Exchange, Requests
from ma_client.transports.grpc_calls import GrpcCalls
from modelaverage.runtime.deadline import Deadline
from tests.conftest import StartServer

pytestmark = pytest.mark.in_memory(False)
FRAGMENT_SIZE_BYTES = 64


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every push over gRPC, whether it was a single message."""
    seen = list[bool]()
    exchange = GrpcCalls.exchange

    @contextmanager
    def watched(self: GrpcCalls, rpc: str, requests: Requests, deadline: Deadline, late: str) -> Iterator[Exchange]:
        if rpc == "PushAndAverage":
            seen.append(isinstance(requests, bytes))
        with exchange(self, rpc, requests, deadline, late) as messages:
            yield messages

    monkeypatch.setattr(GrpcCalls, "exchange", watched)
    return seen


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        pytest.param(16, [False, True, True], id="one fragment"),  # the first push waits for its admission
        pytest.param(17, [False, False, False], id="two fragments"),
        pytest.param(0, [False, True, True], id="no values"),
    ],
)
def test_a_push_of_one_fragment_that_need_not_wait_is_one_message(
    start_server: StartServer, single: list[bool], elements: int, expected: list[bool]
) -> None:
    address = start_server(1).address
    with ParameterServerSession(
        [address], worker_id="a", is_chief=True, shared_memory=False, fragment_size_bytes=FRAGMENT_SIZE_BYTES
    ) as session:
        session.initialize({"w": np.zeros(elements, np.float32)})
        for number in range(3):
            pushed = session.push_and_average({"w": np.full(elements, number, np.float32)})
            assert np.array_equal(pushed.center["w"], np.full(elements, number, np.float32))
    assert single == expected
