"""`compression` of the optimizer: a job that sends int4 trains like one that sends its models as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ma_client import Reason
from modelaverage.errors import ConflictError, InvalidRequestError
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Worker, start_all, together

pytestmark = pytest.mark.in_memory
COUNT = 3000
CODED = ("bfloat16", "int8", "int4")


class Wide(torch.nn.Module):
    """Two variables that are large enough to be coded."""

    def __init__(self) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(1)
        self.w = torch.nn.Parameter(torch.randn(COUNT, generator=chance))
        self.b = torch.nn.Parameter(torch.randn(40, COUNT // 40, generator=chance))


def pair(start_server: StartServer, join: Join, *options: dict[str, Any]) -> list[Worker]:
    server = start_server(2)
    workers = [join(server, Wide(), index=index, num_worker=2, **options[index]) for index in range(2)]
    start_all(workers)
    return workers


def bits(worker: Worker, name: str) -> bytes:
    return worker.model.get_parameter(name).detach().numpy().tobytes()


def moved(worker: Worker, name: str = "w") -> torch.Tensor:
    """By how much each element is less than at the beginning."""
    return Wide().get_parameter(name).detach() - worker.model.get_parameter(name).detach()


def loss_of_a_convex_problem(compression: str, start_server: StartServer, join: Join) -> tuple[float, int]:
    """Each worker minimizes the distance to its own target. Returns the mean distance of the last center, and the
    bytes of a round."""
    server = start_server(2)
    chance = torch.Generator().manual_seed(2)
    targets = [torch.randn(COUNT, generator=chance) for _ in range(2)]
    workers = [
        join(
            server,
            Wide(),
            index=index,
            num_worker=2,
            compression=compression if index == 0 else None,
            interval_steps=5,
            local=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
        for index in range(2)
    ]
    start_all(workers)

    def train(worker: Worker, target: torch.Tensor) -> None:
        for _ in range(100):
            worker.opt.zero_grad()
            (0.5 * (worker.model.get_parameter("w") - target).square().sum()).backward()  # type: ignore[no-untyped-call]
            worker.opt.step()

    together(lambda: train(workers[0], targets[0]), lambda: train(workers[1], targets[1]))
    assert bits(workers[0], "w") == bits(workers[1], "w")
    center = workers[0].model.get_parameter("w").detach()
    losses = [0.5 * (center - target).square().mean().item() for target in targets]
    status = workers[0].session.status()
    return sum(losses) / 2, (status.received_bytes + status.sent_bytes) // status.global_step


def test_a_job_in_int4_trains_like_a_raw_one_in_a_fraction_of_the_bytes(start_server: StartServer, join: Join) -> None:
    raw, raw_bytes = loss_of_a_convex_problem("none", start_server, join)
    coded, coded_bytes = loss_of_a_convex_problem("int4", start_server, join)
    assert raw < 0.3  # a half less than at the beginning
    assert coded < 1.01 * raw
    assert coded_bytes < 0.3 * raw_bytes  # with the initial values, which are raw


@pytest.mark.parametrize("compression", CODED)
def test_the_chief_chooses_and_all_workers_get_the_same_bits(
    compression: str, start_server: StartServer, join: Join
) -> None:
    first, second = pair(start_server, join, {"compression": compression}, {})
    assert first.session.compression == second.session.compression == compression
    chance = torch.Generator().manual_seed(3)
    for _ in range(3):
        for worker in (first, second):
            worker.give(w=1.0)
            worker.model.get_parameter("w").grad = torch.randn(COUNT, generator=chance)
        together(first.opt.step, second.opt.step)
        assert bits(first, "w") == bits(second, "w")


def test_none_is_a_choice_and_the_default(start_server: StartServer, join: Join) -> None:
    for worker in (*pair(start_server, join, {"compression": "none"}, {}), *pair(start_server, join, {}, {})):
        assert worker.session.compression == "raw"


@pytest.mark.parametrize(("chiefs", "other"), [("int8", "int4"), ("int8", "none"), (None, "int8")])
def test_a_worker_that_names_another_compression_is_refused(
    chiefs: str | None, other: str, start_server: StartServer, join: Join
) -> None:
    server = start_server(2)
    chief = join(server, Wide(), index=0, num_worker=2, compression=chiefs)
    chief.start()
    with pytest.raises(ConflictError, match="give all workers the same one") as refused:
        join(server, Wide(), index=1, num_worker=2, compression=other).start()
    assert refused.value.reason is Reason.COMPRESSION_MISMATCH
    join(server, Wide(), index=1, num_worker=2, compression=chiefs).start()


def test_a_name_that_there_is_not_is_refused_before_anything_is_sent(start_server: StartServer, join: Join) -> None:
    server = start_server(1)
    with pytest.raises(
        InvalidRequestError, match="'zip' is not known here, only none, bfloat16, int8, int4"
    ) as refused:
        join(server, Wide(), compression="zip")
    assert refused.value.reason is Reason.CODEC_UNKNOWN
    with pytest.raises(TypeError, match="compression is 8"):
        join(server, Wide(), compression=8)


@pytest.mark.parametrize("compression", CODED)
def test_weights_count_in_coded_pushes(compression: str, start_server: StartServer, join: Join) -> None:
    first, second = pair(start_server, join, {"compression": compression, "weight": 3}, {})
    together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
    for worker in (first, second):
        torch.testing.assert_close(moved(worker), torch.full((COUNT,), 5.0), atol=0.02, rtol=0)  # (3 * 4 + 8) / 4


@pytest.mark.parametrize("compression", CODED)
def test_a_worker_that_abstains_poisons_nobody(compression: str, start_server: StartServer, join: Join) -> None:
    options = {"nonfinite": "abstain"}
    first, second = pair(start_server, join, {"compression": compression, **options}, options)
    together(lambda: first.step(w=4.0), lambda: second.step(w=np.nan))
    assert second.opt.last_round is not None
    assert second.opt.last_round.contributors == ("worker-0",)
    for expected in (4.0, 10.0):  # the next round counts both
        torch.testing.assert_close(moved(second), torch.full((COUNT,), expected), atol=0.05, rtol=0)
        assert bits(first, "w") == bits(second, "w")
        together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))


@pytest.mark.parametrize("compression", CODED)
def test_untouched_variables_keep_their_bits(compression: str, start_server: StartServer, join: Join) -> None:
    first, second = pair(start_server, join, {"compression": compression}, {})
    for _ in range(3):
        together(lambda: first.step(w=4.0), lambda: second.step(w=8.0))
        assert bits(first, "b") == bits(second, "b") == Wide().b.detach().numpy().tobytes()
    assert bits(first, "w") != Wide().w.detach().numpy().tobytes()
    together(lambda: first.step(b=4.0), lambda: second.step())
    torch.testing.assert_close(moved(second, "b"), torch.full((40, COUNT // 40), 2.0), atol=0.05, rtol=0)
