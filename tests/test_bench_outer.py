"""What the table over seeds says, and that a run that fails is one line."""

from __future__ import annotations

from typing import Any

import pytest

from bench.outer import main, table


def summary(seed: int, center_loss: float, plain: float | None) -> dict[str, Any]:
    scores = {"center": (0.99, center_loss), "plain": (plain, plain), "alone": (0.97, 0.07), "all": (0.98, 0.03)}
    config = {"steps": 1200, "interval_steps": 100, "learning_rate": 0.06, "outer": "sgd:lr=0.5", "seed": seed}
    numbers = {f"{arm}_accuracy": accuracy for arm, (accuracy, _) in scores.items()}
    numbers |= {f"{arm}_loss": loss for arm, (_, loss) in scores.items()}
    return {"num_workers": 2, "config": config, **numbers}


def test_the_table_has_mean_and_standard_deviation_of_every_arm() -> None:
    assert table([summary(0, 0.01, 0.5), summary(1, 0.03, 0.5)]) == [
        "2 workers, 1200 steps, a round every 100, learning rate 0.06, sgd:lr=0.5; seed 0, 1",
        "outer optimizer    accuracy 0.9900 +- 0.0000   loss 0.0200 +- 0.0141",
        "plain average      accuracy 0.5000 +- 0.0000   loss 0.5000 +- 0.0000",
        "alone              accuracy 0.9700 +- 0.0000   loss 0.0700 +- 0.0000",
        "alone, all images  accuracy 0.9800 +- 0.0000   loss 0.0300 +- 0.0000",
    ]


def test_one_seed_has_no_spread_and_an_arm_that_was_not_run_no_line() -> None:
    lines = table([summary(7, 0.01, None)])
    assert lines[1] == "outer optimizer    accuracy 0.9900   loss 0.0100"
    assert not any(line.startswith("plain") for line in lines)


def test_a_run_that_fails_is_told_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--", "--outer", "walk"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench.outer: seed 0: ")
    assert "outer optimizer 'walk' is not known here, only average, sgd, adam" in line
