"""The README's own model, run as printed: for any number of batches, the saved model has every step in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ma_client import ClusterSpec
from tests.long_plays import long_except
from tests.prepared import Prepared
from tests.test_server_process import ServerProcess

ROOT = Path(__file__).parent.parent
# The gradient is the worker's x, 1 or 2, whatever the weight, so the result tells how many steps each worker made.
PRELUDE = """
import os
import torch
from ma_client import ClusterSpec

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1, bias=False)
        torch.nn.init.zeros_(self.weight)

index = ClusterSpec.from_env().task_index
batches = [(torch.full((1, 1), 1.0 + index), 1.0)] * {counts}[index]
loss_fn = lambda found, factor: (found * factor).sum()
"""


def the_model_of_the_readme() -> str:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own model")[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


# The weight at the end, by the numbers of batches.
WEIGHTS = {
    (90, 90): -0.1 * (90 * 1 + 90 * 2) / 2,
    (250, 250): -0.1 * (250 * 1 + 250 * 2) / 2,
    # The second one makes 150 more steps alone, from the average.
    (90, 250): -0.1 * (90 * 1 + 100 * 2) / 2 - 0.1 * 150 * 2,
}


@pytest.mark.parametrize(("first", "second"), long_except([(90, 250)], WEIGHTS))
def test_the_saved_model_has_every_step_in_it(first: int, second: int, tmp_path: Path) -> None:
    counts = (first, second)
    (tmp_path / "train.py").write_text(PRELUDE.format(counts=counts) + the_model_of_the_readme(), encoding="utf-8")
    with ServerProcess(num_workers=2) as server:
        environs = [ClusterSpec((server.address,), 2, index).to_env() for index in range(2)]
        workers = [
            Prepared("train", pipes=True, environ={**os.environ, **environ}, cwd=tmp_path, with_torch=True)
            for environ in environs
        ]
        try:
            printed = [worker.communicate(timeout_s=120) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], printed
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    np.testing.assert_allclose(saved["weight"].item(), WEIGHTS[counts], rtol=1e-5)
