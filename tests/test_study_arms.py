"""What each arm of the study trains is what its name says, compared with loops that are written out here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelaverage.codecs import RAW
from modelaverage.outer import AVERAGE, OuterAdam, OuterSGD
from study.arm import Absence, Arm, Phase, Variation, arm_from
from study.kept import KeptArms, Training
from study.methods import rounds as rounds_module
from study.methods.rounds import absent_rounds
from study.plan import EXTENDED, QUICK
from study.play import Measured, play
from study.server import PlayedServer
from study.tasks import TASKS
from study.tasks.base import EQUAL, UNEQUAL, LearningTask, mean_loss_of
from study.tasks.muon import Muon, orthogonalized
from study.tasks.text import standard_library
from study.tasks.text_muon import MuonWithAdamW

RATE, STEPS = 0.05, 6
ARM = Arm("digits", "raw", "average", 2, RATE, seed=0, steps=STEPS, num_workers=2, measure_every_steps=2)
MODEL_BYTES = 4 * 9930


@pytest.fixture(scope="module")
def task() -> LearningTask:
    torch.set_num_threads(1)
    return TASKS["digits"]()


def losses(task: LearningTask, arm: Arm) -> list[float]:
    return [each.held_out_loss for each in play(task, arm)]


def by_hand(task: LearningTask, shares: Sequence[int], momentum: float = 0.9) -> list[float]:
    """Held-out losses every two steps of one model that takes the mean gradient of these shares' batches."""
    model = task.model(0)
    parameters, found = list(model.parameters()), list[float]()
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    batches = [task.batches(0, share, 2) for share in shares]
    for step in range(STEPS):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for each in batches:
            gradients = torch.autograd.grad(mean_loss_of(model, next(each)), parameters)
            sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
        with torch.no_grad():
            for parameter, speed, total in zip(parameters, velocity, sums, strict=True):
                speed.mul_(momentum).add_(total / len(shares))
                parameter.sub_(RATE * speed)
            if step % 2 == 1:
                found.append(mean_loss_of(model, task.held_out).item())
    return found


def with_missed(monkeypatch: pytest.MonkeyPatch, *missed: tuple[bool, bool]) -> Arm:
    """The arm whose two workers miss these rounds."""
    monkeypatch.setattr(rounds_module, "absent_rounds", lambda *_: np.array(missed))
    return replace(ARM, variation=Variation(absence=Absence(0.5, 2)))


# Synchronous, and alone.


def test_synchronous_training_takes_the_mean_gradient_of_all_workers(task: LearningTask) -> None:
    played = list(play(task, replace(ARM, variation=Variation(method="synchronous"))))
    assert [each.held_out_loss for each in played] == pytest.approx(by_hand(task, [0, 1]), rel=1e-5)
    assert (played[-1].up_bytes, played[-1].down_bytes) == (STEPS * MODEL_BYTES, STEPS * MODEL_BYTES)


def test_a_worker_alone_trains_on_its_share_and_sends_nothing(task: LearningTask) -> None:
    played = list(play(task, replace(ARM, variation=Variation(method="alone"))))
    assert [each.held_out_loss for each in played] == pytest.approx(by_hand(task, [0]), rel=1e-5)
    assert (played[-1].up_bytes, played[-1].down_bytes) == (0, 0)


def test_an_unknown_method_is_refused_by_name(task: LearningTask) -> None:
    with pytest.raises(ValueError, match="no method 'magic'; there are rounds, synchronous, alone"):
        next(play(task, replace(ARM, variation=Variation(method="magic"))))


# Workers that are killed.


def test_the_steps_of_a_killed_worker_are_not_in_the_center(
    task: LearningTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = losses(task, replace(ARM, variation=Variation(method="alone")))
    arm = with_missed(monkeypatch, (False, True), (False, True), (False, False))
    played = list(play(task, arm))
    assert [each.held_out_loss for each in played[:2]] == alone[:2]
    assert played[2].held_out_loss != alone[2]  # it is back
    assert [each.pushes for each in played] == [1, 2, 4]
    # One worker's push and center in two rounds, both workers' in the third, and a pull of the one that came back.
    assert [each.up_bytes for each in played] == [MODEL_BYTES // 2, MODEL_BYTES, 2 * MODEL_BYTES]
    assert [each.down_bytes for each in played] == [MODEL_BYTES // 2, 3 * MODEL_BYTES // 2, 5 * MODEL_BYTES // 2]


def test_a_worker_that_comes_back_begins_at_the_center_with_a_new_inner_optimizer(
    task: LearningTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = losses(task, with_missed(monkeypatch, (False, True), (True, False), (True, True)))
    model = task.model(0)
    for share in (0, 1):  # each trains one round, the second from the first one's center
        optimizer, batches = task.optimizer(model, RATE), task.batches(0, share, 2)
        for _ in range(2):
            optimizer.zero_grad()
            mean_loss_of(model, next(batches)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            assert played[share] == pytest.approx(mean_loss_of(model, task.held_out).item(), rel=1e-6)


def test_a_round_that_all_workers_miss_changes_nothing(task: LearningTask, monkeypatch: pytest.MonkeyPatch) -> None:
    played = list(play(task, with_missed(monkeypatch, (False, False), (True, True), (False, False))))
    assert played[0].held_out_loss == played[1].held_out_loss != played[2].held_out_loss
    assert [each.rounds for each in played] == [1, 1, 2]
    assert np.isnan(played[1].train_loss)


def test_absences_have_the_part_and_the_length_that_were_asked_for() -> None:
    missed = absent_rounds(Absence(1 / 3, 2.0), 0, 20_000, 4)
    assert missed.mean() == pytest.approx(1 / 3, abs=0.01)
    begins = missed[1:] & ~missed[:-1]
    assert missed.sum() / begins.sum() == pytest.approx(2.0, abs=0.05)
    assert (missed == absent_rounds(Absence(1 / 3, 2.0), 0, 20_000, 4)).all()
    assert (missed[:100] != absent_rounds(Absence(1 / 3, 2.0), 1, 100, 4)).any()
    assert not absent_rounds(None, 0, 100, 4).any()


@pytest.mark.parametrize(("part", "rounds"), [(0.0, 2.0), (1.0, 2.0), (0.5, 0.5), (0.9, 2.0)])
def test_absences_that_no_chance_makes_are_refused(part: float, rounds: float) -> None:
    with pytest.raises(ValueError, match="at least part / "):
        Absence(part, rounds)


# Phases.


def test_a_phase_has_its_interval_and_ends_with_a_round() -> None:
    later = (Phase(0.25, 6, "sgd"), Phase(0.75, 2, "average"))
    arm = replace(ARM, steps=20, variation=Variation(later=later))
    assert arm.round_ends == {2: "average", 4: "average", 5: "average", 11: "sgd", 15: "sgd"} | dict.fromkeys(
        [17, 19, 20], "average"
    )


def test_a_phase_like_the_one_before_changes_nothing(task: LearningTask) -> None:
    outer = "sgd:lr=0.7,momentum=0.6,nesterov"
    arm = replace(ARM, outer=outer)
    later = (Phase(1 / 3, 2, outer), Phase(2 / 3, 2, outer))
    assert losses(task, replace(arm, variation=Variation(later=later))) == losses(task, arm)
    other = (Phase(1 / 3, 2, outer), Phase(2 / 3, 2, "sgd:lr=0.7,momentum=0.1,nesterov"))
    found = losses(task, replace(arm, variation=Variation(later=other)))
    assert found[:2] == losses(task, arm)[:2]
    assert found[2] != losses(task, arm)[2]


def test_momentum_outlasts_rounds_that_only_average() -> None:
    stepping = OuterSGD(lr=1.0, momentum=0.5)
    server = PlayedServer({"x": np.zeros(3, np.float32)}, [AVERAGE, stepping], RAW)

    def round_to(value: float) -> float:
        local = {"x": np.full(3, value, np.float32)}
        server.round([local])
        return float(local["x"][0])

    assert round_to(1.0) == 1.0
    server.use(stepping)
    assert round_to(2.0) == 2.0  # momentum -1
    server.use(AVERAGE)
    assert round_to(5.0) == 5.0
    server.use(stepping)
    assert round_to(5.0) == 5.5


def test_outer_optimizers_with_other_state_cannot_take_turns() -> None:
    initial = {"x": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"momentum=0\.5 cannot take turns with adam"):
        PlayedServer(initial, [OuterSGD(momentum=0.5), OuterAdam(lr=0.1)], RAW)
    with pytest.raises(ValueError, match=r"momentum=0\.0 cannot take turns with sgd"):
        PlayedServer(initial, [OuterSGD(lr=1.0), OuterSGD(momentum=0.5)], RAW)


def test_phases_out_of_order_or_with_late_centers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"phases begin at the steps \[0, 4, 2\] of 6"):
        replace(ARM, variation=Variation(later=(Phase(0.6, 2, "average"), Phase(0.3, 2, "average"))))
    with pytest.raises(ValueError, match="late centers are not played together"):
        replace(ARM, late_steps=1, variation=Variation(later=(Phase(0.5, 2, "average"),)))


# Shards, and the inner optimizer's state.


def test_unequal_shards_of_the_digits_have_different_digits(task: LearningTask) -> None:
    def digits(index: int, shards: str) -> set[int]:
        batches = task.batches(0, index, 2, shards)
        return {int(digit) for _ in range(20) for digit in next(batches).targets}

    assert len(digits(0, UNEQUAL) & digits(1, UNEQUAL)) <= 1
    assert digits(0, UNEQUAL) | digits(1, UNEQUAL) == digits(0, EQUAL) == set(range(10))


def test_unequal_shards_of_the_text_are_the_same_files_by_name() -> None:
    (equal, held_out), (unequal, also_held_out) = standard_library(), standard_library(UNEQUAL)
    assert held_out == also_held_out
    assert equal != unequal
    counts = [np.bincount(np.frombuffer(text, np.uint8), minlength=256) for text in (equal, unequal)]
    assert (counts[0] == counts[1]).all()

    def most_in_a_quarter(text: bytes) -> int:
        length = len(text) // 4
        return max(text[n * length : (n + 1) * length].count(b"asyncio") for n in range(4))

    assert most_in_a_quarter(unequal) > most_in_a_quarter(equal)


def test_a_first_moment_of_zero_at_every_step_is_training_without_momentum(task: LearningTask) -> None:
    arm = replace(ARM, interval_steps=1)
    forgetting = replace(arm, variation=Variation(first_moment=0.0))
    # SGD without momentum is linear in the gradients, so averages of models are those of gradients.
    assert losses(task, forgetting) == pytest.approx(by_hand(task, [0, 1], momentum=0.0), rel=1e-5)
    assert losses(task, arm) != losses(task, forgetting)


# As values.


@pytest.mark.parametrize("plan", [EXTENDED, QUICK], ids=["extended", "quick"])
def test_every_arm_survives_its_file_and_has_one_of_its_own(plan: Any, tmp_path: Path) -> None:
    kept, measured = KeptArms(tmp_path), (Measured(1, 1, 1.0, 1.0, 1, 1),)
    arms = [each.with_rate(0.01, seed) for each in plan.arms for seed in plan.seeds]
    for arm in arms:
        assert arm_from(json.loads(json.dumps(asdict(arm)))) == arm
        kept.keep(Training(arm, "here", 1.0, measured))
    assert [kept.load(arm, "here") is not None for arm in arms] == [True] * len(arms)
    assert len(list(tmp_path.iterdir())) == len(set(arms)) == len(arms)


def test_an_arm_of_a_file_without_variation_is_a_usual_one() -> None:
    read = asdict(ARM)
    del read["variation"]
    assert arm_from(read) == ARM


# The optimizer of the text task with Muon.


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 24)])
def test_muon_makes_the_steps_of_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for _ in range(2)]
    others = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    ours = Muon(matrices, lr=0.1, weight_decay=0.1, momentum=0.95)
    theirs = torch.optim.Muon(others, lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for matrix, other in zip(matrices, others, strict=True):
            matrix.grad = torch.randn(shape)
            other.grad = matrix.grad.clone()
        ours.step()
        theirs.step()  # type: ignore[no-untyped-call]
        for matrix, other in zip(matrices, others, strict=True):
            torch.testing.assert_close(matrix, other, rtol=0, atol=4e-3)  # bfloat16 has 8 bits; a step is about 0.1


def test_muon_pulls_singular_values_towards_1_and_keeps_the_directions() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 6) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = orthogonalized(matrices)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    within = left.transpose(1, 2) @ found @ right.transpose(1, 2)
    torch.testing.assert_close(within, torch.diag_embed(within.diagonal(dim1=1, dim2=2)), rtol=0, atol=0.05)
    assert within.diagonal(dim1=1, dim2=2).min() > 0.4
    assert within.diagonal(dim1=1, dim2=2).max() < 1.4
    assert values.min() < 1e-2
    assert not orthogonalized(torch.zeros(1, 4, 4)).any()


def test_muon_takes_the_weights_of_linear_layers_and_adamw_all_else_at_one_learning_rate() -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))

    model, other = net(), net()
    both = MuonWithAdamW(model, 0.5)
    weight = other.get_parameter("1.weight")
    rest = [parameter for name, parameter in other.named_parameters() if name != "1.weight"]
    muon = torch.optim.Muon([weight], lr=0.1, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for group in both.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        for each in (model, other):
            each.zero_grad()
            each(torch.arange(5)).square().sum().backward()
        both.step()
        norm = torch.cat([each.grad.flatten() for each in other.parameters() if each.grad is not None]).norm()
        assert norm > 1  # so that it is clipped
        for parameter in other.parameters():
            assert parameter.grad is not None
            parameter.grad /= norm + 1e-6
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert {"momentum_buffer", "exp_avg"} <= {key for state in both.state.values() for key in state}
