"""A worker as a process for `tests.test_compression_kills`, which kills it: it trains from whatever center it finds.

python -m tests.compressed_worker '{"addresses": [...], "worker": 1, "rounds": 20, "way": "data", "codec": "int4"}':
prints the `global_step` and a hash of the center whenever it gets one.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ma_client import DataSettings, OuterSGD, ParameterServerSession
from ma_client.job import center_arrays, one_server
from modelaverage.codecs import RAW
from tests.faults import HANG_S

__all__ = ["MODEL", "START", "WAYS", "Arrays", "hash_of", "local"]

Arrays = Mapping[str, NDArray[Any]]
# Variables that are coded and raw; several fragments, in which variables begin and end.
MODEL: Arrays = {
    "w": np.linspace(-1.0, 1.0, 6000, dtype=np.float32).reshape(60, 100),
    "scale": np.array(0.5),
    "h": np.linspace(-2.0, 2.0, 4000).astype(np.float16),
    "few": np.arange(37, dtype=np.float32),
    "b": np.linspace(-2.0, 2.0, 4100).astype(ml_dtypes.bfloat16),
}
WAYS: dict[str, dict[str, Any]] = {
    "shared": {"shared_memory": True},
    "data": {"shared_memory": False, "data_connections": DataSettings(least_bytes=0)},
    "messages": {"shared_memory": False},
    "raw": {"shared_memory": False},  # like a client of a version that knows no codec
    "late": {"shared_memory": False},  # its pushes are often stale
}
START = {**MODEL, "large": np.linspace(-1.0, 1.0, 60_000, dtype=np.float32)}  # enough for shared memory
_LATE_S = 0.05


def hash_of(center: Mapping[str, Any]) -> str:
    """Of all bits, in the order of names."""
    return hashlib.sha256(b"".join(np.asarray(center[name]).tobytes() for name in sorted(center))).hexdigest()[:16]


def local(center: Arrays, worker: int, step: int) -> dict[str, NDArray[Any]]:
    """What a worker has made of the center."""
    chance = np.random.default_rng((worker, step))
    return {
        name: (np.asarray(array).astype(np.float64) * 0.9 + chance.normal(size=array.shape)).astype(array.dtype)
        for name, array in center.items()
    }


def _work(addresses: Sequence[str], worker: int, rounds: int, way: str, codec: str) -> None:
    if way == "raw":
        for module in (center_arrays, one_server):
            module.known_codec = lambda _: RAW  # type: ignore[attr-defined]
    with ParameterServerSession(
        addresses,
        worker_id=f"worker-{worker}",
        is_chief=worker == 0,
        fragment_size_bytes=1 << 14,
        connect_timeout_s=HANG_S,
        reconnect_timeout_s=HANG_S,
        round_timeout_s=2 * HANG_S,
        **WAYS[way],
    ) as session:
        if worker == 0:
            session.initialize(START, compression=codec, outer_optimizer=OuterSGD(0.7, 0.9, nesterov=True))
        center, step = session.pull(expected=START)
        print(step, hash_of(center), flush=True)
        while step < rounds:
            if way == "late" and step % 2:
                time.sleep(_LATE_S)  # not a synchronization: it makes the worker late
            result = session.push_and_average(local(center, worker, step), copy=step % 3 > 0 and way != "late")
            center, step = result.center, result.global_step
            print(step, hash_of(center), flush=True)
        session.finish()


if __name__ == "__main__":
    _work(**json.loads(sys.argv[1]))
