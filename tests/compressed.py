"""A job with a codec: rounds after which every worker and every server must hold the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import DataSettings, ParameterServerSession, PushResult
from ma_client.transports.pushing import Pushing
from modelaverage.outer import AVERAGE, OuterOptimizer
from tests.optimizer.workers import together

__all__ = ["DATA", "MESSAGES", "MODEL", "SHARED", "CompressedJob", "Seen", "bits", "local", "seen_by"]

Arrays = Mapping[str, NDArray[Any]]
MODEL: Arrays = {
    "w": np.linspace(-1.0, 1.0, 6000, dtype=np.float32).reshape(60, 100),
    "scale": np.array(0.5),
    "h": np.linspace(-2.0, 2.0, 4000).astype(np.float16),
    "few": np.arange(37, dtype=np.float32),
    "b": np.linspace(-2.0, 2.0, 4100).astype(ml_dtypes.bfloat16),
}
MESSAGES: dict[str, Any] = {"shared_memory": False}
SHARED: dict[str, Any] = {"shared_memory": True}
DATA: dict[str, Any] = {"shared_memory": False, "data_connections": DataSettings(least_bytes=0)}


def bits(center: Arrays) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in center.items()}


def local(center: Arrays, worker: int, step: int) -> dict[str, NDArray[Any]]:
    """What a worker has made of the center."""
    chance = np.random.default_rng((worker, step))
    return {
        name: (np.asarray(array).astype(np.float64) * 0.9 + chance.normal(size=array.shape)).astype(array.dtype)
        for name, array in center.items()
    }


class CompressedJob:
    """Workers as threads of this process, and the centers that they hold.

    Args:
        addresses: of the servers.
        codec: the codec that the chief chooses.
        session_class: of all sessions.
        options: of all sessions.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        codec: str = "int8",
        session_class: type[ParameterServerSession] = ParameterServerSession,
        **options: Any,
    ) -> None:
        self.addresses, self.codec = list(addresses), codec
        self._session_class = session_class
        self._options = options
        self._sessions = ExitStack()
        self.workers = dict[int, ParameterServerSession]()
        self.centers = dict[int, Arrays]()

    def __enter__(self) -> CompressedJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._sessions.close()

    def join(self, worker: int, pulls: bool = True, outer: OuterOptimizer = AVERAGE, **options: Any) -> None:
        """A worker joins; worker 0 is the chief."""
        session = self._session_class(
            self.addresses,
            worker_id=f"worker-{worker}",
            is_chief=worker == 0,
            **{"fragment_size_bytes": 1024, **MESSAGES, **self._options, **options},
        )
        self.workers[worker] = self._sessions.enter_context(session)
        if worker == 0:
            session.initialize(MODEL, compression=self.codec, outer_optimizer=outer)
        if pulls:
            self.pull(worker)

    def pull(self, worker: int) -> None:
        self.centers[worker], _ = self.workers[worker].pull()

    def push(self, worker: int, step: int = 0, **options: Any) -> PushResult:
        """One push of any values. ``step`` makes them different."""
        given = local(self.centers[worker], worker, step)
        result = self.workers[worker].push_and_average(given, timeout_s=20, **options)
        self.centers[worker] = result.center
        return result

    def round(self, step: int = 0, weights: Mapping[int, float] = {}, **options: Any) -> list[PushResult]:
        """One round of all workers; checks the bits that it leaves."""
        results = together(
            *(
                lambda worker=worker: self.push(worker, step, weight=weights.get(worker, 1.0), **options)
                for worker in self.workers
            )
        )
        self.check()
        return results

    def check(self) -> dict[str, bytes]:
        """Raises AssertionError unless all workers and the servers have the same bits; returns them."""
        with ParameterServerSession(self.addresses, worker_id="reader", shared_memory=False) as reader:
            expected = bits(reader.pull(catch_up=False)[0])
        for worker, center in self.centers.items():
            differing = [name for name, data in bits(center).items() if data != expected[name]]
            assert not differing, f"worker {worker} has another {', '.join(differing)}"
        return expected


class Seen:
    """The codecs of the pushes that sessions of this process have made, by worker; "!" marks those that failed."""

    def __init__(self) -> None:
        self.pushes = list[tuple[str, str]]()

    def take(self) -> Counter[tuple[str, str]]:
        """Since the last time."""
        taken, self.pushes = self.pushes, []
        return Counter(taken)


@contextmanager
def seen_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Notes the codec of every push."""
    seen, push = Seen(), Pushing.push

    def noted(self: Pushing, header: Any, *arguments: Any) -> Any:
        codec, fails = header.codec or "raw", "!"
        try:
            answer = push(self, header, *arguments)
            fails = ""
            return answer
        finally:
            seen.pushes.append((header.worker_id, codec + fails))

    with monkeypatch.context() as patch:
        patch.setattr(Pushing, "push", noted)
        yield seen
