"""How many bytes of a round cross a socket, counted by relays that all connections go through."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from ma_client import DataSettings, ParameterServerSession
from modelaverage.addresses import parse
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.conftest import RunningServer, StartServer
from tests.raw_client import Arrays, until
from tests.stopcock import Stopcock, data_through

ROUNDS = 2
MODEL: Arrays = {
    "w": np.random.default_rng(0).normal(size=(400, 1500)).astype(np.float32),
    "b": np.zeros(400, np.float32),  # small: raw with every codec
}
MOST = {"bfloat16": 0.51, "int8": 0.265, "int4": 0.14}


@contextmanager
def workers_through(
    relay: Stopcock, server: RunningServer, compression: str, on_data_connections: bool
) -> Iterator[list[ParameterServerSession]]:
    """Two workers; all bytes of their calls go through the relay."""
    relay.target_port = parse(server.address).port
    settings = DataSettings() if on_data_connections else DataSettings(least_bytes=1 << 40)
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(
                ParameterServerSession(
                    [f"127.0.0.1:{relay.port}"],
                    worker_id=f"worker-{rank}",
                    is_chief=rank == 0,
                    shared_memory=False,
                    data_connections=settings,
                )
            )
            for rank in range(2)
        ]
        sessions[0].initialize(MODEL, compression=compression)
        for session in sessions:
            session.pull()
        yield sessions


def bytes_of_a_round(
    compression: str, on_data_connections: bool, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """Bytes to the server and back, of two workers in one round."""
    chance = np.random.default_rng(1)
    wanted = pb.TRANSPORT_DATA_CONNECTION if on_data_connections else pb.TRANSPORT_TCP
    with (
        Stopcock() as calls,
        Stopcock() as data,
        monkeypatch.context() as patch,
        ThreadPoolExecutor(2) as threads,
    ):
        data_through(data, patch)
        with workers_through(calls, start_server(2), compression, on_data_connections) as sessions:

            def round_() -> None:
                local = [
                    {
                        name: values + chance.normal(size=values.shape).astype(np.float32)
                        for name, values in MODEL.items()
                    }
                    for _ in sessions
                ]
                first, second = threads.map(lambda s, v: s.push_and_average(v, timeout_s=60), sessions, local)
                assert all(np.array_equal(first.center[name], second.center[name]) for name in MODEL)

            def is_settled() -> bool:
                round_()
                return {worker.transport for worker in sessions[0].status().workers} == {wanted}

            until(is_settled, "both use that transport")
            ways = [(relay.up, relay.down) for relay in (calls, data)]
            before = [sum(way.passed_bytes for way in same) for same in zip(*ways, strict=True)]
            for _ in range(ROUNDS):
                round_()
            after = [sum(way.passed_bytes for way in same) for same in zip(*ways, strict=True)]
    up, down = ((late - early) / ROUNDS for late, early in zip(after, before, strict=True))
    return up, down


@pytest.mark.parametrize("on_data_connections", [False, True], ids=["messages", "data connections"])
def test_a_coded_round_has_so_few_bytes_on_the_wire_both_ways(
    on_data_connections: bool, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        compression: bytes_of_a_round(compression, on_data_connections, start_server, monkeypatch)
        for compression in ("none", *MOST)
    }
    raw_up, raw_down = found["none"]
    model_bytes = sum(values.nbytes for values in MODEL.values())
    assert raw_up > 2 * model_bytes  # the relays see everything
    assert raw_down > 2 * model_bytes
    for compression, most in MOST.items():
        up, down = found[compression]
        assert 0 < up / raw_up <= most, compression
        assert 0 < down / raw_down <= most, compression
