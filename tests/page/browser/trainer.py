"""A worker that trains nothing much, for the page to show: its variables are noise, its loss falls.

python -m tests.page.browser.trainer ADDRESS WORKER ROUNDS PAUSE_S [CODEC]: makes rounds, and pauses between them, until
this `global_step`; then it has finished. WORKER 0 is the chief.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from ma_client import ParameterServerSession

__all__ = ["main"]

_STEPS = 10


def main(address: str, worker: int, rounds: int, pause_s: float, compression: str = "none") -> None:
    """Trains."""
    start = {"w": np.zeros(200_000, np.float32), "b": np.ones((), np.float32)}
    random = np.random.default_rng(worker)
    with ParameterServerSession([address], worker_id=f"worker-{worker}", is_chief=worker == 0) as session:
        if worker == 0:
            session.initialize(start, compression=compression)
        center, step = session.pull(expected=start)
        while step < rounds:
            time.sleep(pause_s * random.uniform(0.7, 1.3))
            local = {name: value + random.standard_normal(value.shape, np.float32) for name, value in center.items()}
            loss = 2.3 / (1 + step / 30) + 0.05 * worker + float(random.normal(0, 0.03))
            done = session.push_and_average(local, loss=loss, local_step=(step + 1) * _STEPS, interval_steps=_STEPS)
            center, step = done.center, done.global_step
        session.finish()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:])
