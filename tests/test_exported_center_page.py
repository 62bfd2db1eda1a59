"""The code of docs/operations.md for an exported center: it loads into a model with tied and frozen weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ma_client import ModelAverageCustomGetter
from tests.source_tree import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Net(torch.nn.Module):
    """Tied and frozen weights, statistics and a counter."""

    value = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.tied = torch.nn.Linear(2, 2)
        self.tied.weight = self.layer.weight
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(2)
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(self.value)


class Trained(Net):
    value = 3.0


Run = Callable[[dict[str, torch.Tensor]], torch.nn.Module]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(center) -> the model that the page's code makes from an exported center."""

    def run_page(center: dict[str, torch.Tensor]) -> torch.nn.Module:
        save_file(center, tmp_path / "center.safetensors")
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"Net": Net}
        exec(CODE, names)
        model: torch.nn.Module = names["model"]
        return model

    return run_page


def exported() -> dict[str, torch.Tensor]:
    getter = ModelAverageCustomGetter("cpu")
    getter(Trained())
    return {name: tensor.detach().clone() for name, tensor in getter.variables().items()}


def test_the_center_is_in_the_model_and_what_stays_local_is_the_models_own(run: Run) -> None:
    state = run(exported()).state_dict()
    own = {"frozen.weight", "frozen.bias", "norm.num_batches_tracked"}
    assert {name for name, tensor in state.items() if (tensor == 3.0).all()} == state.keys() - own
    assert all((state[name] == 0.0).all() for name in own)


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_center_of_another_model_is_noticed(run: Run, change: str) -> None:
    center = exported()
    if change == "one more":
        center["other"] = torch.zeros(1)
    else:
        del center["norm.running_mean"]
    with pytest.raises(AssertionError, match="other" if change == "one more" else "norm.running_mean"):
        run(center)
