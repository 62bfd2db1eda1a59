"""A model beyond protobuf's limit of 2 GiB a message, over both transports at once. Slow: `make bench` runs it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ma_client import ParameterServerSession
from tests.conftest import StartServer

PARAMETERS = 625_000_000  # 2.5 GB of float32
NEEDED_BYTES = 18 << 30


@pytest.mark.slow
def test_a_model_of_2_5_gb_is_averaged(start_server: StartServer) -> None:
    available_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available_bytes < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free memory; there are {available_bytes >> 30}")
    server = start_server(2, max_model_bytes=3 << 30, shared=True)
    values = np.arange(PARAMETERS, dtype=np.float32)
    values %= 1024
    others = values + np.float32(2)
    with (
        ParameterServerSession([server.address], worker_id="a", is_chief=True) as a,
        ParameterServerSession([server.address], worker_id="b", shared_memory=False) as b,
        ThreadPoolExecutor() as pool,
    ):
        a.initialize({"x": values})
        b.pull(copy=False)
        pushes = (
            pool.submit(a.push_and_average, {"x": values}, copy=False),
            pool.submit(b.push_and_average, {"x": others}, copy=False),
        )
        centers = [push.result().center["x"] for push in pushes]
        others -= 1
        for center in centers:
            assert np.array_equal(center, others)
        assert a.status().shared_bytes == 2 * values.nbytes
