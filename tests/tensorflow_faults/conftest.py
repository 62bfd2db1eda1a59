"""Fixtures for the tests of what TensorFlow's optimizer does wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.tensorflow_faults.cluster import Cluster, Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def cluster(pool: Pool) -> Iterator[Cluster]:
    with ExitStack() as stack:
        cluster = Cluster(stack, pool)
        yield cluster
        cluster.check_no_traceback()
