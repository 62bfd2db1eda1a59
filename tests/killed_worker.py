"""A worker as a process for `tests.test_outer_kills`, which kills it: it trains from whatever center it finds.

python -m tests.killed_worker ADDRESS WORKER ROUNDS OUTER: prints the `global_step` after every round.
"""

from __future__ import annotations

import sys

import numpy as np

from ma_client import ParameterServerSession
from tests.faults import HANG_S, Model, trained

__all__ = ["START", "main"]

START: Model = {"w": np.zeros(3000, np.float32), "b": np.ones((), np.float32)}


def main(address: str, worker: int, rounds: int, outer: str) -> None:
    """Makes rounds until this ``global_step``."""
    with ParameterServerSession(
        [address],
        worker_id=f"worker-{worker}",
        is_chief=worker == 0,
        fragment_size_bytes=1024,
        reconnect_timeout_s=HANG_S,
        round_timeout_s=2 * HANG_S,
    ) as session:
        if worker == 0:
            session.initialize(START, outer_optimizer=outer)
        center, step = session.pull(expected=START)
        while step < rounds:
            result = session.push_and_average(trained(center, worker, step))
            center, step = result.center, result.global_step
            print(step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
