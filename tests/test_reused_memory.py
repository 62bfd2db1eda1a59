"""Copies that are handed out belong to those who have them; their memory is used again only when nobody has it."""

from __future__ import annotations

import gc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ma_client import ParameterServerSession
from ma_client.values.raw import LARGE_BYTES
from ma_client.values.reused import ReusedMemory
from tests.conftest import StartServer

SIZE = LARGE_BYTES // 4


def of(value: float, size: int = SIZE) -> dict[str, NDArray[Any]]:
    return {"x": np.full(size, value, np.float32)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0, 5), (LARGE_BYTES, 2)], ids=str)
def test_a_copy_has_the_same_bits_and_is_the_callers_own(shape: tuple[int, ...], dtype: Any) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    copy = ReusedMemory().copies({"x": array})["x"]
    assert (copy.dtype, copy.shape, copy.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert copy.flags.writeable
    assert not np.shares_memory(copy, array)


def test_memory_that_nobody_has_is_used_for_the_next_copy() -> None:
    memory = ReusedMemory()
    first = memory.copies(of(1.0))["x"].ctypes.data
    assert memory.copies(of(2.0))["x"].ctypes.data == first


def test_a_view_of_a_copy_keeps_its_memory() -> None:
    memory = ReusedMemory()
    views: list[Any] = [
        memory.copies(of(1.0))["x"][5:7],
        memory.copies(of(1.0))["x"].data[5:7],
        memory.copies(of(1.0))["x"].reshape(2, -1).T.view(np.int32)[5:7, 0].view(np.float32),
    ]
    gc.collect()
    for value in range(2, 9):
        memory.copies(of(float(value)))
    assert [list(view) for view in views] == [[1.0, 1.0]] * 3


def test_no_more_memory_is_kept_than_one_call_needs() -> None:
    memory = ReusedMemory()
    copies = [memory.copies(of(float(value))) for value in range(5)]
    addresses = {copy["x"].ctypes.data for copy in copies}
    copies.clear()
    held = [memory.copies(of(7.0))["x"] for _ in range(2)]
    assert len({array.ctypes.data for array in held}) == 2
    assert len(memory._free[held[0].nbytes]) == 0
    assert held[0].ctypes.data in addresses
    held.clear()
    assert len(memory._free[SIZE * 4]) == 1
    memory.forget()
    assert not memory._free


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "inline"])
def test_the_center_of_a_round_stays_as_it_is_in_later_rounds(start_server: StartServer, shared: bool) -> None:
    with ParameterServerSession(
        [start_server(1, shared=shared).address], worker_id="a", is_chief=True, shared_memory=shared
    ) as session:
        session.initialize(of(0.0))
        kept, addresses = [session.pull()[0]["x"]], set[int]()
        for value in range(1, 8):
            center = session.push_and_average(of(float(value))).center["x"]
            addresses.add(center.ctypes.data)
            if value % 3 == 0:
                kept.append(center)
            del center
        assert [set(array.tolist()) for array in kept] == [{0.0}, {3.0}, {6.0}]
        assert len(addresses) < 7  # the memory of those that were dropped
        kept[1][:] = -1.0  # the caller's own
        assert set(session.pull()[0]["x"].tolist()) == {7.0}
