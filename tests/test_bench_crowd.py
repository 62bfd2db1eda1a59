"""What `bench.crowd` measures: rounds whose every value it checks, at both servers."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bench.crowd import Crowd, main


def test_a_wrong_mean_is_noticed() -> None:
    crowd = Crowd(workers=3, parameters=4)
    crowd.check(np.full(4, 1 / 3, np.float32))
    with pytest.raises(RuntimeError, match=r"the mean is 0\.333333 to 0\.5, not 0\.333333"):
        crowd.check(np.array([1 / 3, 1 / 3, 0.5, 1 / 3], np.float32))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_both_servers_are_measured_in_rounds_that_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workers", "3", "--parameters", "300000", "--turns", "1", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "3 workers, 300,000 float32 parameters, one server" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == ["ours", "sockets"]
    assert rows[1][2].strip() == "1.00"
