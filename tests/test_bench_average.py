"""What `bench.average` measures: models of the sizes asked for, and rounds that it checks."""

from __future__ import annotations

import pytest

from bench.average import OPTIMIZER, SESSION, TLS, Case, measure, table
from bench.sides import sizes_of


@pytest.mark.parametrize("tensors", [1, 2, 3, 150, 2_000])
def test_a_model_has_as_many_tensors_and_parameters_as_asked(tensors: int) -> None:
    sizes = sizes_of(1_000_003, tensors)
    assert (len(sizes), sum(sizes), min(sizes) > 0) == (tensors, 1_000_003, True)


@pytest.mark.long
@pytest.mark.parametrize("call", [OPTIMIZER, SESSION])
@pytest.mark.parametrize("transport", ["shared memory", TLS])
def test_a_row_has_the_costs_of_worker_and_server(call: str, transport: str) -> None:
    result = measure(Case(call, transport, 10_000, 4, 2), rounds=1)
    costs = (result.round_ms, result.gloo_ms, result.worker_cpu_ms, result.server_cpu_ms, result.gloo_cpu_ms)
    assert min(costs) > 0
    assert result.ratio == result.round_ms / result.gloo_ms
    assert table([result]).row_count == 1
