"""Two workers that make rounds, each on its own thread; their averages are checked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from ma_client import DataSettings, ParameterServerSession, PushResult, Security
from modelaverage.v1 import parameter_server_pb2 as pb
from tests.raw_client import Arrays, until

__all__ = ["FRAGMENT_SIZE_BYTES", "MODEL", "Pair", "SETTINGS"]

_TIMEOUT_S = 20.0
FRAGMENT_SIZE_BYTES = 256
MODEL: Arrays = {"w": np.arange(701, dtype=np.float32), "b": np.array(2.0), "e": np.zeros(0, np.float16)}
# Small models use data connections, too, and soon use them again after a break.
SETTINGS = DataSettings(least_bytes=0, pause_s=0.0)


class Pair:
    """A job of two workers.

    Args:
        address: of the server.
        settings: of their data connections.
        model: their center's initial values.
        reconnect_timeout_s: 0: the server never goes away.
        security: None: no TLS and no token.
        session_class: of the workers.
    """

    def __init__(
        self,
        address: str,
        settings: DataSettings = SETTINGS,
        model: Arrays = MODEL,
        reconnect_timeout_s: float = 0.0,
        security: Security | None = None,
        session_class: type[ParameterServerSession] = ParameterServerSession,
    ) -> None:
        self._model = model
        self.sessions = [
            session_class(
                [address],
                worker_id=f"worker-{rank}",
                is_chief=rank == 0,
                fragment_size_bytes=FRAGMENT_SIZE_BYTES if model is MODEL else None,
                shared_memory=False,
                reconnect_timeout_s=reconnect_timeout_s,
                data_connections=settings,
                security=security,
            )
            for rank in range(2)
        ]
        self.sessions[0].initialize(model)
        self.sessions[1].pull()
        self._threads = ThreadPoolExecutor(2)
        self.rounds = 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def round(self) -> list[PushResult]:
        """Makes a round and checks its results."""
        local = [{name: v + v.dtype.type(2 * rank + self.rounds) for name, v in self._model.items()} for rank in (0, 1)]
        results = list(
            self._threads.map(lambda s, v: s.push_and_average(v, timeout_s=_TIMEOUT_S), self.sessions, local)
        )
        for result in results:
            for name, value in self._model.items():
                assert np.array_equal(result.center[name], value + value.dtype.type(1 + self.rounds))
            assert result.global_step == self.rounds + 1
        self.rounds += 1
        return results

    def until_connected(self) -> None:
        """Makes rounds until both workers have a data connection."""
        until(lambda: self.round() != [] and self.transports == {pb.TRANSPORT_DATA_CONNECTION}, "both are connected")

    @property
    def transports(self) -> set[pb.Transport]:
        """The transports of the workers' last pushes, as the server reports them."""
        return {worker.transport for worker in self.sessions[0].status().workers}

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self._threads.shutdown()
