"""A worker of a job on several servers, as a process that a test kills:

python -m tests.shard_worker '{"worker": 0, "addresses": ["127.0.0.1:2222", "127.0.0.1:2223"], "rounds": 10}'

It makes rounds until `global_step` is ``rounds`` and writes a line with the step after each. With ``"hold": [1, 2, 5]``
the second server never gets more than two fragments of its push from base step 5.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from ma_client import ParameterServerSession
from ma_client.transports.base import OutgoingPush
from ma_client.transports.connection import Connection
from ma_client.transports.pushing import Answer
from tests.faults import HANG_S, Model, trained
from tests.worker_process import START_TIMEOUT_S, Process

__all__ = ["START", "ShardWorker"]

# By the placement round_robin, a variable for each of two servers; 3 fragments each.
START: Model = {"a": np.zeros(192, np.float32), "b": np.ones((64, 3), np.float32)}
_FRAGMENT_SIZE_BYTES = 256


# The test's side.


class ShardWorker(Process):
    """A worker process.

    Args:
        worker: its number.
        addresses: of the servers.
        rounds: the step at which it is done.
        hold: index of a server, how many fragments it gets, and the base step of the push that is held back.
    """

    def __init__(
        self, worker: int, addresses: Sequence[str], rounds: int, hold: tuple[int, int, int] | None = None
    ) -> None:
        told = {"worker": worker, "addresses": list(addresses), "rounds": rounds, "hold": hold}
        super().__init__("tests.shard_worker", json.dumps(told))

    def comes_to(self, step: int) -> None:
        """Waits until it has the center of this step."""
        while int(self.line(START_TIMEOUT_S)) < step:
            pass

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)


# The worker's side.


def _hold(address: str, count: int, base_step: int) -> None:
    """Never sends fragments from ``count`` on to this server."""
    original = Connection.push_and_average

    held = list[Sequence[memoryview]]()

    def push_and_average(self: Connection, header: Any, variables: Sequence[memoryview], *others: Any) -> Answer:
        if self.address == address and header.base_step == base_step:
            held.append(variables)
        return original(self, header, variables, *others)

    def holding(encoded: Any) -> Any:
        def fragment(self: OutgoingPush, index: int) -> Any:
            if index >= count and any(self.variables is each for each in held):
                threading.Event().wait()
            return encoded(self, index)

        return fragment

    Connection.push_and_average = push_and_average  # type: ignore[assignment, method-assign]
    OutgoingPush.fragment = holding(OutgoingPush.fragment)  # type: ignore[method-assign]
    OutgoingPush.raw_fragment = holding(OutgoingPush.raw_fragment)  # type: ignore[method-assign]


def _work(worker: int, addresses: Sequence[str], rounds: int) -> None:
    with ParameterServerSession(
        addresses,
        worker_id=f"worker-{worker}",
        is_chief=worker == 0,
        shared_memory=False,
        fragment_size_bytes=_FRAGMENT_SIZE_BYTES,
        placement="round_robin",
        connect_timeout_s=HANG_S,
        reconnect_timeout_s=HANG_S,
    ) as session:
        if worker == 0:
            session.initialize(START)
        center, step = session.pull()
        print(step, flush=True)
        while step < rounds:
            result = session.push_and_average(trained(center, worker, step))
            center, step = result.center, result.global_step
            print(step, flush=True)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    if told["hold"] is not None:
        shard, count, base_step = told["hold"]
        _hold(told["addresses"][shard], count, base_step)
    _work(told["worker"], told["addresses"], told["rounds"])
