"""Ranks for the tests of worker groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.groups.ranks import Ranks, started_ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with started_ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started
