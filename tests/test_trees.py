"""Nested dictionaries come back as they went in, whatever library their arrays are from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ma_client import ParameterServerSession
from ma_client.values.trees import as_arrays, nest, paths_of
from modelaverage.errors import ConflictError, InvalidRequestError
from tests.conftest import StartServer

KEYS = st.text(st.characters(blacklist_characters="/", blacklist_categories=["Cs"]), min_size=1, max_size=3)
TREES = st.recursive(
    st.integers(0, 9).map(float), lambda branch: st.dictionaries(KEYS, branch, min_size=1, max_size=3), max_leaves=9
)


@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=3))
def test_a_tree_comes_back_as_it_was(tree: dict[str, Any]) -> None:
    paths = paths_of(tree)
    assert nest(as_arrays(tree, paths), paths) == tree


def test_the_names_of_a_flat_model_stay_what_they_are() -> None:
    assert list(paths_of({"layer/kernel": 1.0, "layer.bias": 2.0})) == ["layer/kernel", "layer.bias"]


@pytest.mark.parametrize(("tree", "named"), [({"a": {"b": 1.0}, "a/b": 2.0}, "'a/b'"), ({"a": {1: 1.0}}, "1 is no")])
def test_a_tree_without_distinct_names_is_refused(tree: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        paths_of(tree)


class OnlyDLPack:
    """An array of a library that numpy does not know."""

    def __init__(self, values: list[float]) -> None:
        self._tensor = torch.tensor(values)

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


@pytest.fixture
def session(start_server: StartServer) -> Iterator[ParameterServerSession]:
    with ParameterServerSession([start_server(1).address], worker_id="worker-0", is_chief=True) as session:
        yield session


def test_a_session_gives_back_the_structure_that_it_was_given(session: ParameterServerSession) -> None:
    model = {
        "dense": {"kernel": np.ones((2, 3), np.float32), "bias": OnlyDLPack([1.0, 2.0])},
        "scale": torch.tensor(0.5),
    }
    session.initialize(model)
    center, _ = session.pull()
    result = session.push_and_average(model, untouched={"dense/bias"})
    for given_back in (center, result.center):
        assert given_back.keys() == model.keys()
        assert given_back["dense"].keys() == {"kernel", "bias"}
        assert given_back["dense"]["kernel"].shape == (2, 3)
        assert given_back["dense"]["bias"].tolist() == [1, 2]
        assert given_back["scale"] == 0.5
    assert result.untouched == {"dense/bias"}


def test_a_session_that_was_given_nothing_gives_flat_names(session: ParameterServerSession) -> None:
    session.initialize({"dense": {"bias": np.zeros(2)}})
    with ParameterServerSession(session.ps_hosts, worker_id="worker-1") as other:
        assert list(other.pull()[0]) == ["dense/bias"]
        assert other.pull(expected={"dense": {"bias": np.zeros(2)}})[0].keys() == {"dense"}


def test_another_tree_is_refused_by_the_name_of_the_variable(session: ParameterServerSession) -> None:
    session.initialize({"dense": {"bias": np.zeros(2)}})
    with pytest.raises(ConflictError, match="'dense/bias'"):
        session.push_and_average({"dense": {"bias": np.zeros(3)}})
