"""A worker that is a group of ranks trains like a worker of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ma_client.torch.groups import worker_group
from tests.conftest import StartServer
from tests.groups.plays import Values, train, train_plain
from tests.groups.ranks import RANKS_PER_WORKER, Rank, Ranks

STEPS = 8


def plain(start_server: StartServer, ranks: Ranks, **options: Any) -> Values:
    """The end of the same training with workers of one process."""
    first: Values
    second: Values
    first, second = ranks.run(train_plain, start_server(2).address, STEPS, options)[::RANKS_PER_WORKER]
    assert all(np.array_equal(first[name], second[name]) for name in first)
    return first


def test_ddp_groups_end_with_the_bits_of_workers_of_one_process(start_server: StartServer, ranks: Ranks) -> None:
    expected = plain(start_server, ranks)
    for end in ranks.run(train, start_server(2).address, "ddp", STEPS, {}):
        assert (end["global_step"], end["local_step"]) == (3, STEPS)
        assert end["values"].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(end["values"][name], value, name)


@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
def test_sharded_groups_end_as_workers_of_one_process(wrapper: str, start_server: StartServer, ranks: Ranks) -> None:
    expected = plain(start_server, ranks)
    ends = ranks.run(train, start_server(2).address, wrapper, STEPS, {})
    for end in ends:
        assert (end["global_step"], end["local_step"]) == (3, STEPS)
        for name, value in expected.items():
            if "running" not in name:
                np.testing.assert_allclose(end["values"][name], value, atol=1e-6, err_msg=name)


def train_with_a_backend_for_gpus_alone(rank: Rank, address: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_group, "_has_way_for_cpus", lambda _: False)
        return train(rank, address, "ddp", STEPS, {})


def test_a_group_whose_backend_has_no_way_for_cpus_gets_one_beside_it(start_server: StartServer, ranks: Ranks) -> None:
    ends = ranks.run(train_with_a_backend_for_gpus_alone, start_server(2).address)
    for end in ends:
        assert end["global_step"] == 3
        for name, value in ends[0]["values"].items():
            np.testing.assert_array_equal(end["values"][name], value, name)
