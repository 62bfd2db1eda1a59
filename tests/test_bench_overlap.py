"""What the table of overlap counts; its two arms train a real model between test hosts."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench.hosts import unavailable_because
from bench.overlap import OverlapArm, OverlapSettings, WorkerTimes, measure, overlap_table

REASON = unavailable_because()


def test_waited_is_a_part_of_the_run_and_the_rest_is_steps() -> None:
    settings = OverlapSettings(steps=100, interval_steps=25)
    arm = OverlapArm(settings, 20, (WorkerTimes(10.0, 4.0, 2.0, 3.0), WorkerTimes(8.0, 2.0, 4.0, 3.0)))
    assert (arm.run_s, arm.waited) == (10.0, (0.4 + 0.25) / 2)
    assert (arm.wait_ms, arm.step_ms) == (750.0, 60.0)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(overlap_table([arm]))
    assert ["20", "10.0", "32.5%", "750.0", "60.00", "3.0000", "3.0000"] in [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown.get().splitlines()
    ]


@pytest.mark.long
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("overlap_steps", [0, 3])
def test_an_arm_trains_and_counts_its_waits(overlap_steps: int) -> None:
    arm = measure(overlap_steps, OverlapSettings(steps=8, interval_steps=4))
    for worker in arm.workers:
        assert 0.0 < worker.waited_s < worker.run_s
        assert 1.0 < worker.train_loss < 6.0
    assert arm.workers[0].held_out_loss == arm.workers[1].held_out_loss  # of one center
