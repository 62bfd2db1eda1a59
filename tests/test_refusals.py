"""If the machine refuses any single call of the server's core, committed rounds are right and every call ends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# A play that waits for one of its timeouts takes two seconds, and longer on a loaded machine.
LONGEST_S = 25.0


def refuse(*flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.refusals", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    assert found["wrong"] == []
    assert found["longest_s"] < LONGEST_S
    # Some calls are never reached: those for foreign checkpoints, for strangers' connections, for errors. A few depend
    # on time.
    assert found["reached"] > 0.45 * found["sites"]
    assert found["refused"] > 0.9 * found["plays"], "plays depend a little on time"


def test_each_sixth_call_that_is_refused_once_in_one_way_leaves_committed_rounds_right() -> None:
    found = refuse("--play", "data connections")
    assert found["wrong"] == []
    assert found["longest_s"] < LONGEST_S
    assert found["plays"] > 60
    assert found["refused"] > 0.8 * found["plays"], "plays depend a little on time"


@pytest.mark.long
def test_every_call_that_is_refused_once_in_one_way_leaves_committed_rounds_right() -> None:
    check(refuse())


@pytest.mark.slow
@pytest.mark.parametrize(
    "play",
    [
        "messages",
        "half-duplex",
        "shared memory",
        "data connections",
        "quorum",
        "checkpoints",
        "outer optimizer",
        "compression",
    ],
)
def test_every_call_that_is_refused_in_every_way_at_several_times_leaves_committed_rounds_right(play: str) -> None:
    found = refuse("--every", "--play", play)
    assert found["wrong"] == []
    assert found["longest_s"] < LONGEST_S
