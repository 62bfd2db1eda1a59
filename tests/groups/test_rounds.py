"""Rounds of worker groups: what their ranks do together, and what happens when that fails."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from logging.handlers import QueueHandler
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ma_client import (
    ClusterError,
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelAverageCustomGetter,
    ModelAverageOptimizer,
    NotInitializedError,
    Outcome,
)
from ma_client.torch.groups import leader
from ps_server.rules.policy import RoundPolicy
from tests.conftest import StartServer
from tests.groups.plays import close, joined, net, sgd, step, train, whole
from tests.groups.ranks import RANKS_PER_WORKER, Rank, Ranks


def error_of(work: Callable[[], object]) -> tuple[type[BaseException], str]:
    """The error that this raises."""
    try:
        work()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


# Options.


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp1"])
@pytest.mark.parametrize(
    "options", [{"overlap_steps": 2}, {"outer_optimizer": "sgd:lr=0.7,momentum=0.9,nesterov"}, {"compression": "int8"}]
)
def test_all_ranks_end_with_the_center(
    wrapper: str, options: dict[str, Any], start_server: StartServer, ranks: Ranks
) -> None:
    first, *others = ranks.run(train, start_server(2).address, wrapper, 8, options)
    assert first["global_step"] == 3
    for other in others:
        assert (other["global_step"], other["local_step"]) == (3, 8)
        for name, value in first["values"].items():
            if "running" not in name:  # under FSDP each rank has statistics of its own until the next round
                np.testing.assert_array_equal(other["values"][name], value, name)


def weighted(rank: Rank, address: str) -> list[float]:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0 * rank.worker)
    counts = [1.0, 2.0] if rank.worker == 0 else [2.0, 3.0]
    _, opt = joined(rank, address, "ddp", model, weight=lambda: counts[rank.rank])
    try:
        opt.begin()
        with torch.no_grad():
            model.weight.fill_(8.0 * rank.worker)
        opt.average()
        return model.weight.flatten().tolist()
    finally:
        close(opt, rank)


def test_a_function_as_weight_is_added_up_over_the_ranks(start_server: StartServer, ranks: Ranks) -> None:
    # 3 of 0 and 5 of 8
    assert ranks.run(weighted, start_server(2).address) == [[5.0]] * 4


def abstaining(rank: Rank, address: str) -> dict[str, Any]:
    model, opt = joined(rank, address, "ddp", net(), num_worker=1, nonfinite="abstain", interval_steps=1)
    try:
        opt.begin()
        step(model, opt, rank, 0)
        good = whole(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.nan)
        opt.step()
        assert opt.last_round is not None
        return {
            "is_back": all(np.array_equal(value, good[name]) for name, value in whole(model).items()),
            "state": len([slots for slots in opt.state.values() if slots]),
            "contributors": opt.last_round.contributors,
        }
    finally:
        close(opt, rank)


def test_a_group_that_abstains_drops_the_optimizers_state_in_all_ranks(start_server: StartServer, ranks: Ranks) -> None:
    for found in ranks.run(abstaining, start_server(1).address, workers=1):
        assert found == {"is_back": True, "state": 0, "contributors": ()}


# What a rank other than 0 has.


def members(rank: Rank, address: str) -> dict[str, Any]:
    model, opt = joined(rank, address, "ddp", net(), num_worker=1)
    shown = torch.zeros((), dtype=torch.int64)
    try:
        before = error_of(lambda: step(model, opt, rank, 0))
        opt.begin()
        opt._shown.tensor = shown
        for number in range(4):
            step(model, opt, rank, number)
        saved = opt.state_dict()["model_average"]
        opt.load_state_dict(opt.state_dict())
        for number in range(4, 6):
            step(model, opt, rank, number)
        assert opt.last_round is not None
        return {
            "before": before[0],
            "session": None if rank.is_leader else error_of(lambda: opt.session),
            "shown": shown.item(),
            "steps": (opt.global_step, opt.local_step),
            "saved": saved,
            "outcome": opt.last_round.outcome,
            "has_center": bool(opt.last_round.center),
        }
    finally:
        close(opt, rank)


def test_every_rank_knows_where_the_worker_is(start_server: StartServer, ranks: Ranks) -> None:
    first, second = ranks.run(members, start_server(1).address, workers=1)
    assert second.pop("session") == (
        ValueError,
        "rank 1 of the worker group has no session: rank 0 talks to the servers",
    )
    assert (first.pop("session"), first.pop("has_center"), second.pop("has_center")) == (None, True, False)
    assert first == second
    assert first["before"] is NotInitializedError
    assert (first["shown"], first["steps"], first["outcome"]) == (2, (2, 6), Outcome.COMMITTED)
    assert first["saved"] == {
        "local_step": 4,
        "touched": first["saved"]["touched"],
        "steps_since_round": 1,
        "base_step": 1,
    }


def on_its_own(rank: Rank, address: str) -> list[str]:
    """A group whose model is not wrapped."""
    records = queue.SimpleQueue[logging.LogRecord]()
    handler = QueueHandler(records)
    log = logging.getLogger("ma_client")
    log.addHandler(handler)
    model, opt = joined(rank, address, "none", net(), num_worker=1)
    try:
        with opt.make_session_run_hook():
            for number in range(7):
                step(model, opt, rank, number)
        said = [records.get() for _ in range(records.qsize())]
        return [record.getMessage() for record in said if getattr(record, "modelaverage_event", "") == "ranks_differ"]
    finally:
        log.removeHandler(handler)
        close(opt, rank)


def test_ranks_that_train_models_of_their_own_are_warned_about_once(start_server: StartServer, ranks: Ranks) -> None:
    (warning,), nothing = ranks.run(on_its_own, start_server(1).address, workers=1)
    assert warning.startswith("rank 1 of the worker group has other parameters than rank 0: only those of rank 0")
    assert nothing == []


def test_a_process_of_a_node_that_is_one_worker_needs_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MA_WORKER_PER", "node")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    getter = ModelAverageCustomGetter("cpu")
    model = getter(net())
    with pytest.raises(ClusterError, match=r"MA_WORKER_PER='node' makes the 2 processes of this node one worker"):
        ModelAverageOptimizer(torch.optim.SGD(model.parameters()), 1, True, getter)


def from_the_environment(rank: Rank, environ: Mapping[str, str]) -> str:
    """What an optimizer says whose session is made from the environment."""
    getter = ModelAverageCustomGetter("cpu")
    model = getter(net())
    with mock.patch.dict(os.environ, {**environ, "RANK": str(rank.rank)}):
        try:
            opt = ModelAverageOptimizer(sgd(model.parameters()), None, None, getter, process_group=rank.group)
        except ClusterError as error:
            return str(error)
    opt.close()
    return "made"


def test_a_group_is_not_the_worker_of_the_index_that_torchrun_gives_to_a_process(
    start_server: StartServer, ranks: Ranks
) -> None:
    launched = {"MA_PS_HOSTS": start_server(2).address, "WORLD_SIZE": "2"}
    for said in ranks.run(from_the_environment, launched, workers=1):
        assert said.startswith("RANK='0' is the index of one process, but the 2 ranks of the process_group are one")
        assert "set MA_TASK_INDEX to the worker's index" in said
    said_by_hand = {"MA_NUM_WORKERS": "2", "MA_TASK_INDEX": "1"}
    nodes = {"MA_WORKER_PER": "node", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1"}
    for told in (said_by_hand, nodes):
        assert ranks.run(from_the_environment, {**launched, **told}, workers=1) == ["made", "made"]


# Errors.


def test_an_error_of_rank_0_is_raised_in_all_ranks_and_the_round_can_be_tried_again(
    start_server: StartServer, ranks: Ranks
) -> None:
    server = start_server(RoundPolicy.strict(2, round_timeout_s=0.3))
    found = ranks.run(late, server.address, workers=2)
    assert {kind for kind, _, _ in found[:RANKS_PER_WORKER]} == {DeadlineExceededError}
    assert len({text for _, text, _ in found[:RANKS_PER_WORKER]}) == 1
    assert "worker-1" in found[0][1]
    assert [steps for _, _, steps in found] == [1, 1, 1, 1]


def late(rank: Rank, address: str) -> tuple[type[BaseException] | None, str, int]:
    """Worker 1 comes to the barrier when worker 0 has given up once."""
    model, opt = joined(rank, address, "ddp", net(), interval_steps=1)
    try:
        opt.begin()
        before = whole(model)
        found: tuple[type[BaseException] | None, str] = None, ""
        if rank.worker == 0:
            found = error_of(opt.average)
            assert all(np.array_equal(value, before[name]) for name, value in whole(model).items())
        dist.barrier()
        opt.average()
        return *found, opt.global_step
    finally:
        close(opt, rank)


def late_in_the_background(rank: Rank, address: str) -> dict[str, Any]:
    """Worker 0 trains during a round that fails, because worker 1 comes later."""
    model, opt = joined(rank, address, "ddp", net(), interval_steps=2, overlap_steps=1)
    found: tuple[type[BaseException] | None, str] = None, ""
    try:
        with opt.make_session_run_hook():
            if rank.worker == 0:
                for number in range(2):
                    step(model, opt, rank, number)
                found = error_of(lambda: step(model, opt, rank, 2))
            dist.barrier()
            for number in range(opt.local_step, 6):
                step(model, opt, rank, number)
        return {"error": found, "values": whole(model), "steps": (opt.global_step, opt.local_step)}
    finally:
        close(opt, rank)


def test_a_round_that_fails_during_training_fails_in_all_ranks_and_they_train_on(
    start_server: StartServer, ranks: Ranks
) -> None:
    found = ranks.run(late_in_the_background, start_server(RoundPolicy.strict(2, round_timeout_s=0.3)).address)
    assert [each["error"][0] for each in found] == [DeadlineExceededError, DeadlineExceededError, None, None]
    assert found[0]["error"] == found[1]["error"]
    for leads, follows in (found[:2], found[2:]):
        assert leads["steps"] == follows["steps"]
        for name, value in leads["values"].items():
            np.testing.assert_array_equal(follows["values"][name], value, name)


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("not finite", InvalidRequestError, "are not finite .* nothing was pushed"),
        ("weight", ZeroDivisionError, "division by zero"),
        ("another shape", ConflictError, "rank 1 of the worker group: variable '0.weight' is float32"),
        ("other steps", ConflictError, "rank 1 of the worker group has made 3 local steps and rank 0 2"),
    ],
)
def test_an_error_of_any_rank_ends_the_round_in_all(
    case: str, kind: type[BaseException], text: str, start_server: StartServer, ranks: Ranks
) -> None:
    first, second = ranks.run(failing, start_server(1).address, case, workers=1)
    assert second[0] is kind
    assert pytest.raises(kind, match=text).matches(kind(second[1]))
    if case != "other steps":  # which rank 1 alone notices
        assert first == second


def failing(rank: Rank, address: str, case: str) -> tuple[type[BaseException], str]:
    def count() -> float:
        return 1.0 / (0.0 if case == "weight" and rank.rank == 1 else 1.0)

    model, opt = joined(rank, address, "ddp", net(), num_worker=1, nonfinite="raise", weight=count)
    try:
        opt.begin()
        for number in range(2):
            step(model, opt, rank, number)
        if case == "not finite":
            model.get_parameter("module.0.bias").data.fill_(torch.inf)
        if case == "another shape" and rank.rank == 1:
            model.get_parameter("module.0.weight").data = torch.zeros(1, 1)
        if case == "other steps" and rank.rank == 1:
            opt._progress.count_step()
        if case == "other steps" and rank.rank == 0:
            opt.average()
            return ConflictError, ""
        return error_of(opt.average)
    finally:
        close(opt, rank)


def unreachable(rank: Rank) -> tuple[type[BaseException], str]:
    getter = ModelAverageCustomGetter("cpu")
    model = getter(net())
    with pytest.MonkeyPatch.context() as patch:
        if rank.is_leader:
            patch.setenv("MA_PS_HOSTS", "")
        return error_of(
            lambda: ModelAverageOptimizer(
                torch.optim.SGD(model.parameters()), None, None, getter, process_group=rank.group
            )
        )


def test_settings_come_from_rank_0_and_so_do_their_errors(ranks: Ranks) -> None:
    first, second = ranks.run(unreachable, workers=1)
    assert first == second
    assert "MA_PS_HOSTS" in first[1]


def with_session(rank: Rank, address: str) -> str:
    model, opt = joined(rank, address, "ddp", net(), num_worker=1)

    def another() -> ModelAverageOptimizer:
        session = opt.session if rank.is_leader else object()
        return ModelAverageOptimizer(
            torch.optim.SGD(model.parameters()),
            1,
            True,
            opt._variables.getter,
            session=session,  # type: ignore[arg-type]
            process_group=rank.group,
        )

    try:
        return str(another().local_step) if rank.is_leader else error_of(another)[1]
    finally:
        close(opt, rank)


def test_a_session_is_given_to_rank_0_alone(start_server: StartServer, ranks: Ranks) -> None:
    assert ranks.run(with_session, start_server(1).address, workers=1) == [
        "0",
        "rank 1 of the worker group was given a session, but only rank 0 talks to the servers; give it there alone",
    ]


@pytest.mark.parametrize("given", [3, "WORLD"])
def test_something_else_than_a_group_is_refused(given: object) -> None:
    getter = ModelAverageCustomGetter("cpu")
    model = getter(net())
    with pytest.raises(TypeError, match=f"process_group is {given!r}; give a group of torch.distributed"):
        ModelAverageOptimizer(
            torch.optim.SGD(model.parameters()),
            1,
            True,
            getter,
            process_group=given,  # type: ignore[arg-type]
        )


# Long waits.


def slow(rank: Rank, address: str) -> int:
    """Worker 1 comes to the barrier when worker 0 has waited for longer than its group's timeout."""
    group = dist.new_group(
        [rank.worker * RANKS_PER_WORKER + each for each in range(RANKS_PER_WORKER)],
        timeout=timedelta(seconds=3),
        use_local_synchronization=True,
    )
    assert isinstance(group, dist.ProcessGroup)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leader, "_SIGN_OF_LIFE_S", 0.2)
        _, opt = joined(Rank(rank.worker, rank.rank, group), address, "ddp", net())
        try:
            opt.begin()
            if rank.worker == 1:
                threading.Event().wait(5)
            opt.average()
            return opt.global_step
        finally:
            close(opt, rank)


@pytest.mark.long
def test_a_round_may_take_longer_than_the_groups_timeout(start_server: StartServer, ranks: Ranks) -> None:
    assert ranks.run(slow, start_server(2).address) == [1, 1, 1, 1]
