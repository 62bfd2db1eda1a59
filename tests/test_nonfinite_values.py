"""Rules: values that are not finite are counted one by one, wherever they stand and however large the others are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps_server.center.nonfinite import count_nonfinite

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
SIZES = (0, 1, 1000, 8191, 8192, 8193, 20_000, 3 * 8192)
BAD = (np.nan, np.inf, -np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.sampled_from(SIZES), st.data())
def test_each_is_counted(dtype: type[np.generic], size: int, data: st.DataObject) -> None:
    values = np.ones(size, dtype)
    places = data.draw(st.sets(st.integers(0, max(0, size - 1)), max_size=min(size, 5)))
    for place in places:
        values[place] = data.draw(st.sampled_from(BAD))
    assert count_nonfinite(values) == len(places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_largest_finite_values_are_finite(dtype: type[np.generic], size: int) -> None:
    largest = np.full(size, np.nextafter(dtype(np.inf), dtype(0)), dtype)
    assert count_nonfinite(largest) == 0
    largest[::2] *= -1
    assert count_nonfinite(largest) == 0


def test_values_at_any_alignment_are_counted() -> None:
    room = bytearray(4 * 20_000 + 1)
    values = np.frombuffer(room, np.float32, 20_000, offset=1)
    assert count_nonfinite(values) == 0
    room[1 + 4 * 19_999 : 1 + 4 * 20_000] = np.float32(np.nan).tobytes()
    assert count_nonfinite(values) == 1
