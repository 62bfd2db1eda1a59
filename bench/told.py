"""Workers and a reader that report each of their calls, and the transcript of their reports."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Deed", "Line", "Seat", "Transcript", "play"]

WORKERS = 2
_PAUSE_S = 0.2
_PULL_EVERY_S = 1.0
_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Seat:
    """What a process is told.

    Args:
        rank: the worker's number, from 0; None: the process is the reader.
        ps_host: the server's address.
        parameters: float32, of the model.
        one_host: whether workers may use shared memory, as if all were on one host; the reader then asks for centers
            that it never reads, too.
    """

    rank: int | None
    ps_host: str
    parameters: int
    one_host: bool


@dataclass(frozen=True)
class Deed:
    """A push or a pull that is over, on the monotonic clock that all processes of a machine share.

    Args:
        what: "push" or "pull".
        from_s: when it began.
        to_s: when it ended.
        error: what it raised; None: nothing.
        right: whether the received values are those of their step.
        beside: whether the worker's bytes go beside the messages by now.
    """

    what: str
    from_s: float
    to_s: float
    error: str | None = None
    right: bool = True
    beside: bool = False


@dataclass(frozen=True)
class Line:
    """One line that a process wrote, or, with an empty text, its end."""

    at_s: float
    who: str
    text: str
    deed: Deed | None


class Transcript:
    """All reported lines, in order of arrival. May be used from any thread."""

    def __init__(self) -> None:
        self._lines: list[Line] = []
        self._changed = threading.Condition()

    def listen(self, who: str, process: subprocess.Popen[str]) -> None:
        """Records every further line of the process's stdout."""
        threading.Thread(target=self._listen, args=(who, process), daemon=True).start()

    @property
    def lines(self) -> list[Line]:
        """The lines so far."""
        with self._changed:
            return list(self._lines)

    def until(self, happened: Callable[[list[Line]], bool], timeout_s: float) -> bool:
        """Waits until the condition holds for the lines; returns whether it does."""
        with self._changed:
            return self._changed.wait_for(lambda: happened(self._lines), timeout_s)

    def _listen(self, who: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            self._note(who, text.rstrip())
        self._note(who, "")

    def _note(self, who: str, text: str) -> None:
        deed = Deed(**json.loads(text)) if text.startswith("{") else None
        with self._changed:
            self._lines.append(Line(time.monotonic(), who, text, deed))
            self._changed.notify_all()


def play(seat: Seat) -> None:
    """A process of the job, until it is killed: prints its calls as JSON, and whatever it logs."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s")
    values = np.arange(seat.parameters, dtype=np.float32) % 1024
    for deed in _read(seat, values) if seat.rank is None else _push(seat, seat.rank, values):
        print(json.dumps(asdict(deed)), flush=True)


def _push(seat: Seat, rank: int, values: NDArray[np.float32]) -> Iterator[Deed]:
    from ma_client import ParameterServerSession
    from modelaverage.errors import ModelAverageError
    from modelaverage.v1 import parameter_server_pb2 as pb

    worker_id, beside = f"worker-{rank}", False
    # Namespaces of one kernel could use shared memory, separate hosts cannot.
    with ParameterServerSession(
        [seat.ps_host], worker_id=worker_id, is_chief=rank == 0, shared_memory=seat.one_host
    ) as session:
        if rank == 0:
            session.initialize({"x": values})
        session.pull()
        while True:
            from_s, step = time.monotonic(), session.base_step or 0
            try:
                result = session.push_and_average({"x": values + np.float32(2 * rank + step)}, copy=False)
            except ModelAverageError as error:
                yield Deed("push", from_s, time.monotonic(), error=str(error))
            else:
                to_s = time.monotonic()
                right = _is_right(result.center["x"], values, result.global_step)
                if not beside:
                    mine = [worker for worker in session.status().workers if worker.worker_id == worker_id]
                    wanted = pb.TRANSPORT_SHARED_MEMORY if seat.one_host else pb.TRANSPORT_DATA_CONNECTION
                    beside = [worker.transport for worker in mine] == [wanted]
                yield Deed("push", from_s, to_s, right=right, beside=beside)
            time.sleep(_PAUSE_S)


def _read(seat: Seat, values: NDArray[np.float32]) -> Iterator[Deed]:
    from ma_client import ParameterServerSession
    from modelaverage.errors import ModelAverageError

    if seat.one_host:
        threading.Thread(target=_ask_and_never_read, args=(seat.ps_host,), daemon=True).start()
    while True:
        from_s = time.monotonic()
        try:
            with ParameterServerSession(
                [seat.ps_host], worker_id="reader", connect_timeout_s=_CONNECT_TIMEOUT_S, shared_memory=False
            ) as session:
                center, step = session.pull()
        except ModelAverageError as error:
            yield Deed("pull", from_s, time.monotonic(), error=str(error))
        else:
            yield Deed("pull", from_s, time.monotonic(), right=_is_right(center["x"], values, step))
        time.sleep(_PULL_EVERY_S)


def _ask_and_never_read(ps_host: str) -> None:
    """Begins pulls, all on one connection."""
    import grpc

    from modelaverage import wire
    from modelaverage.v1 import parameter_server_pb2 as pb

    # A window of 64 KiB that does not grow, so that the server has to keep most of what was asked for.
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    channel = grpc.insecure_channel(ps_host, options=options)
    pull = channel.unary_stream(f"/{wire.SERVICE}/Pull", pb.PullRequest.SerializeToString, bytes)
    never_read = list[object]()
    while True:
        never_read.append(pull(pb.PullRequest(worker_id="never-reads")))
        time.sleep(_PULL_EVERY_S)


def _is_right(center: NDArray[np.float32], values: NDArray[np.float32], step: int) -> bool:
    """Whether a center is the average of what all workers gave in the round before ``step``, or the initial one."""
    mean = values if step == 0 else values + np.float32(step - 1 + WORKERS - 1)
    return np.array_equal(center, mean)
