"""A worker of `bench.versions`. It runs in the checkout that it measures, and works with every version of the session.

Arguments: rank, number of workers, address, transport, parameters. Its first line says that it is ready. After that it
answers every line with the seconds of a round, or with what is wrong with the center.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np


def main() -> None:
    """Runs the worker until standard input ends."""
    rank, workers, parameters = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
    address, transport = sys.argv[3:5]
    del sys.path[0]  # bench/ of the measuring checkout; what is measured comes from PYTHONPATH
    os.environ["GRPC_VERBOSITY"] = "NONE"
    from ma_client import ParameterServerSession

    common = np.arange(parameters, dtype=np.float32) % 1024
    values, mean = common + np.float32(rank), common + np.float32((workers - 1) / 2)
    repeat = max(1, 50_000 // parameters)  # many rounds of a tiny model make a turn: one is too short to be timed
    with ParameterServerSession(
        [address], worker_id=f"worker-{rank}", is_chief=rank == 0, shared_memory=transport == "shared memory"
    ) as session:
        if rank == 0:
            session.initialize({"x": values})
        session.pull(copy=False)
        print("ready", flush=True)
        for _ in sys.stdin:
            values += 1  # another mean each turn, so that an old center is noticed
            mean += 1
            began_s = time.perf_counter()
            for _ in range(repeat):
                result = session.push_and_average({"x": values}, copy=False)
            round_s = (time.perf_counter() - began_s) / repeat
            wrong = np.count_nonzero(result.center["x"] != mean)
            print(f"worker-{rank} finds {wrong:,} wrong elements in the center" if wrong else round_s, flush=True)


if __name__ == "__main__":
    main()
