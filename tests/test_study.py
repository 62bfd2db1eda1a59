"""A play has the bits of a job with sessions, kept trainings are used again, and the comparison says what it should."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ma_client import ModelAverageCustomGetter, ModelAverageOptimizer, ParameterServerSession, PushResult
from ma_client.job.ticket import PushTicket
from modelaverage.codecs import codec_named
from modelaverage.outer import outer_optimizer
from ps_worker.demo.digits_config import DigitsConfig
from ps_worker.demo.play import play as play_of_the_demo
from ps_worker.events.parse import AccuracyEvent, Event
from study import loss, making, overlap
from study.compare import rows_of
from study.kept import KeptArms, Training
from study.late import LATE_RULES
from study.overlap import overlap_rows_of
from study.play import Arm, Measured, play
from study.server import PlayedServer
from study.tasks import TASKS
from study.tasks.base import EQUAL, UNEQUAL, mean_loss_of
from study.tasks.mnist import MnistTask, mnist_file
from tests.conftest import StartServer
from tests.optimizer.workers import together

OUTER = "sgd:lr=0.7,momentum=0.9,nesterov"
ROUNDS = 3
ARM = Arm("digits", "raw", OUTER, 5, 0.05, seed=0, steps=10, num_workers=2, measure_every_steps=5)
Arrays = Mapping[str, NDArray[Any]]


def moved(center: Arrays, worker: int, step: int) -> dict[str, NDArray[Any]]:
    """What a worker has made of the center."""
    chance = np.random.default_rng((worker, step))
    return {n: (v + 0.01 * chance.normal(size=v.shape)).astype(v.dtype) for n, v in center.items()}


# The play is the system.


@pytest.mark.in_memory
@pytest.mark.parametrize("codec", ["raw", "bfloat16", "int8", "int4"])
def test_a_played_job_has_the_bits_and_bytes_of_one_with_sessions(start_server: StartServer, codec: str) -> None:
    start = moved({"w": np.zeros((300, 1000), np.float32), "b": np.zeros(100, np.float32)}, 9, 0)
    server = start_server(2)
    sessions = [ParameterServerSession([server.address], worker_id=f"w{i}", is_chief=i == 0) for i in range(2)]
    with sessions[0], sessions[1]:
        sessions[0].initialize(start, outer_optimizer=OUTER, compression="none" if codec == "raw" else codec)
        pulled = [session.pull()[0] for session in sessions]  # each then has a base
        center = pulled[0]
        before = sessions[0].statuses()[0]
        played = PlayedServer(start, [outer_optimizer(OUTER)], codec_named(codec))
        up_bytes = down_bytes = 0
        for step in range(ROUNDS):
            workers = [moved(center, number, step) for number in range(2)]

            def push(number: int, workers: list[dict[str, NDArray[Any]]] = workers) -> PushResult:
                return sessions[number].push_and_average(workers[number])

            center = together(lambda: push(0), lambda: push(1))[0].center
            found = played.round(workers)
            up_bytes, down_bytes = up_bytes + found.up, down_bytes + found.down
            arrays = played.manifest.arrays(played.center)
            for name, values in center.items():
                assert values.tobytes() == arrays[name].tobytes() == workers[0][name].tobytes()
        after = sessions[0].statuses()[0]
        assert after.received_bytes - before.received_bytes == 2 * up_bytes
        assert after.sent_bytes - before.sent_bytes == 2 * down_bytes


def test_without_a_codec_the_digits_are_those_of_the_demo() -> None:
    config = DigitsConfig(steps=10, interval_steps=5, learning_rate=0.05, seed=0)
    events = list[Event]()
    play_of_the_demo(config, 2, outer_optimizer(OUTER), "played", events.append)
    losses = [event.loss for event in events if isinstance(event, AccuracyEvent)]
    assert [each.held_out_loss for each in play(TASKS["digits"](), ARM)] == losses
    assert len(losses) == 2


def test_a_codec_changes_the_training_a_little_and_the_bytes_much() -> None:
    arm = Arm("text", "raw", "average", 5, 0.01, seed=0, steps=10, num_workers=2, measure_every_steps=5)
    task = TASKS["text"]()
    raw, coded = (list(play(task, replace(arm, codec=codec)))[-1] for codec in ("raw", "int4"))
    assert raw.held_out_loss != coded.held_out_loss
    assert coded.held_out_loss == pytest.approx(raw.held_out_loss, abs=0.05)
    assert coded.held_out_loss < np.log(256) - 0.5  # it learns
    assert coded.up_bytes < raw.up_bytes / 6


class AtTheLatest(ParameterServerSession):
    """Its rounds are never seen to be over before they must be."""

    def begin_push(self, *arguments: Any, **options: Any) -> PushTicket:
        ticket = super().begin_push(*arguments, **options)

        class Unseen:
            done, result = False, ticket.result

        return Unseen()  # type: ignore[return-value]


@pytest.mark.in_memory
def test_centers_that_are_late_and_kept_under_the_steps_since_are_those_of_the_optimizer(
    start_server: StartServer,
) -> None:
    arm, task, server = replace(ARM, late_steps=3, steps=15), TASKS["digits"](), start_server(2)
    models = [task.model(arm.seed) for _ in range(2)]  # torch's generator belongs to all threads

    def work(rank: int) -> float:
        torch.set_num_threads(1)  # as a play does; with more, sums have other bits
        with AtTheLatest([server.address], worker_id=f"w{rank}", is_chief=rank == 0) as session:
            getter = ModelAverageCustomGetter(worker_device="cpu")
            model = getter(models[rank])
            inner = task.optimizer(model, arm.learning_rate)
            opt = ModelAverageOptimizer(
                inner, 2, rank == 0, getter, 5, session=session, outer_optimizer=OUTER, overlap_steps=3
            )
            batches = task.batches(arm.seed, rank, 2)
            with opt.make_session_run_hook():
                for _ in range(arm.steps):
                    opt.zero_grad()
                    mean_loss_of(model, next(batches)).backward()  # type: ignore[no-untyped-call]
                    opt.step()
            return mean_loss_of(model, task.held_out).item()

    losses = together(lambda: work(0), lambda: work(1))
    played = list(play(task, arm))[-1].held_out_loss
    assert losses == [played] * 2
    assert played != list(play(task, replace(arm, late_steps=0)))[-1].held_out_loss


def test_a_late_center_is_kept_under_the_steps_since_or_alone_or_mixed() -> None:
    center, pushed, now = (np.array([x], np.float32) for x in (10.0, 3.0, 4.0))
    found = {name: float(rule(center, pushed, now)[0]) for name, rule in LATE_RULES.items()}
    assert found == {"keep": 11.0, "drop": 10.0, "mix": 7.0}


def test_an_average_that_would_come_after_the_next_push_is_refused() -> None:
    with pytest.raises(ValueError, match="an average 5 steps late, a round every 5"):
        replace(ARM, late_steps=5)


def test_steps_that_no_measurement_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="12 steps, measured every 5"):
        replace(ARM, steps=12)


# What is kept.


def test_the_command_makes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss, "_QUICK", loss.Scale({"digits": 50, "text": 50}, seeds=1))
    monkeypatch.setattr(os, "nice", int)  # the other tests of this process go on at the same priority
    made = list[str]()

    def counted(task: Any, arm: Arm) -> Any:
        made.append(arm.codec)
        return play(task, arm)

    monkeypatch.setattr(making, "play", counted)
    command = ["--quick", "--tasks", "digits", "--runs", str(tmp_path)]
    assert loss.main([*command, "--codecs", "int4"]) == 0
    assert sorted(made) == ["int4", "int4", "raw", "raw"]
    made.clear()
    assert loss.main([*command, "--codecs", "int8"]) == 0
    assert made == ["int8", "int8"]
    written = json.loads((tmp_path / "quick" / "loss.json").read_text())
    assert [row["codec"] for row in written["rows"]] == ["raw", "int8", "raw", "int8"]
    assert (tmp_path / "quick" / "loss.png").stat().st_size > 10_000
    assert "one seed: no noise known" in capsys.readouterr().out


def test_the_table_of_late_centers_needs_no_training_that_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overlap, "_TASK", "digits")
    monkeypatch.setattr(overlap, "_QUICK_STEPS", 50)
    monkeypatch.setattr(os, "nice", int)
    command = ["--quick", "--runs", str(tmp_path)]
    assert overlap.main(command) == 0
    assert len(list((tmp_path / "quick").iterdir())) == 4
    capsys.readouterr()
    monkeypatch.delattr(making, "play")
    assert overlap.main(command) == 0
    shown = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.count("│") > 3]
    assert shown == ["none", "keep", "drop", "mix"]


def trained(codec: str, seed: int, held_out_loss: float) -> Training:
    sizes = (1000, 1000) if codec == "raw" else (200, 300)
    measured = Measured(5, 1, 0.5, 3.0, 1, 1), Measured(10, 2, 0.25, held_out_loss, *sizes)
    return Training(replace(ARM, codec=codec, seed=seed), "here", 1.0, measured)


def test_a_training_is_found_again_only_for_its_arm_and_data(tmp_path: Path) -> None:
    kept, training = KeptArms(tmp_path), trained("int8", 0, 1.0)
    assert kept.load(training.arm, "here") is None
    kept.keep(training)
    assert kept.load(training.arm, "here") == training
    assert kept.load(training.arm, "elsewhere") is None
    assert kept.load(replace(training.arm, steps=20), "here") is None
    kept.keep(replace(training, arm=replace(training.arm, late_steps=1)))  # in a file of its own
    assert kept.load(training.arm, "here") == training
    (file,) = (path for path in tmp_path.iterdir() if "late" not in path.name)
    file.write_text(file.read_text()[:-9])
    assert kept.load(training.arm, "here") is None


# The comparison.


def test_a_difference_is_noise_up_to_the_spread_of_raw() -> None:
    raws = [trained("raw", seed, loss) for seed, loss in enumerate((1.0, 1.1, 1.2))]
    within = [trained("int8", seed, loss) for seed, loss in enumerate((1.09, 1.19, 1.29))]
    worse = [trained("int4", seed, loss) for seed, loss in enumerate((1.2, 1.3, 1.4))]
    better = [trained("bfloat16", seed, loss) for seed, loss in enumerate((0.85, 0.95, 1.05))]
    raw, *others = rows_of([*raws, *within, *worse, *better])
    assert raw.held_out_loss == pytest.approx(1.1)
    assert raw.held_out_spread == pytest.approx(0.1)
    assert [row.verdict for row in others] == [
        "within noise (+0.90 of it)",
        "worse (+2.00 of it)",
        "better (-1.50 of it)",
    ]
    assert others[0].difference == pytest.approx(0.09)
    assert others[0].difference_spread == pytest.approx(0.0, abs=1e-9)
    assert (others[0].up_bytes, others[0].down_bytes, others[0].raw_up_bytes) == (200, 300, 1000)


def test_a_seed_counts_only_if_raw_has_it_too() -> None:
    rows = rows_of([trained("raw", 0, 1.0), trained("int8", 0, 1.5), trained("int8", 1, 9.0), trained("int4", 2, 1.0)])
    assert [(row.codec, row.seeds) for row in rows] == [("raw", (0,)), ("int8", (0,))]
    assert rows[1].difference == 0.5


def test_a_rule_for_late_centers_is_compared_with_none_of_the_same_seed_and_rate() -> None:
    def late(steps: int, seed: int, held_out_loss: float, rate: float = 0.05) -> Training:
        found = trained("int4", seed, held_out_loss)
        return replace(found, arm=replace(found.arm, late_steps=steps, learning_rate=rate))

    none, keep = overlap_rows_of(
        [late(0, 0, 1.0), late(3, 0, 1.5), late(0, 1, 2.0), late(3, 1, 2.25), late(3, 2, 9.0), late(3, 0, 9.0, 0.1)]
    )
    assert (none.rule, none.held_out_losses, none.differences) == ("none", (1.0, 2.0), (0.0, 0.0))
    assert (keep.rule, keep.held_out_losses, keep.differences) == ("keep", (1.5, 2.25), (0.5, 0.25))


# The images of MNIST.


def test_images_are_held_out_of_every_digit_and_shares_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    digits = np.tile(np.arange(10), 20)
    marks = np.arange(len(digits))  # the first pixel tells images apart
    np.savetxt(path, np.column_stack([marks, np.zeros((len(digits), 783)), digits]), delimiter=",")
    task = MnistTask(path)
    assert task.held_out.targets.bincount().tolist() == [4] * 10

    def seen(index: int, shards: str) -> tuple[set[float], set[int]]:
        batches = list(itertools.islice(task.batches(0, index, 4, shards), 3))
        return (
            {float(each) for batch in batches for each in batch.inputs[:, 0, 0, 0] * 255},
            {int(each) for batch in batches for each in batch.targets},
        )

    equal, unequal = ([seen(index, shards) for index in range(4)] for shards in (EQUAL, UNEQUAL))
    for shares in (equal, unequal):
        for (one, _), (other, _) in itertools.combinations(shares, 2):
            assert one.isdisjoint(other)
    assert len(equal[0][1]) == 10
    assert unequal[0][1] <= {0, 1, 2}
    assert unequal[3][1] <= {7, 8, 9}


def test_missing_images_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"install torch-model-average\[study\]"):
        mnist_file()
