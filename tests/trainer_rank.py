"""Runs an example of examples/trainers, and writes into a file what this process has when the example leaves the hook:
the global step, and a hash of the center variables.

    python tests/trainer_rank.py examples/trainers/with_NAME.py ROUNDS DIRECTORY
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ma_client import ModelAverageCustomGetter, ModelAverageHook


class RankReport:
    """Sees the example's only getter and hook.

    Args:
        directory: for the file, which is named after worker and rank.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{os.environ['MA_TASK_INDEX']}-{os.environ['RANK']}"
        self._getters = list[ModelAverageCustomGetter]()
        self._take, self._end = ModelAverageCustomGetter.__call__, ModelAverageHook.end

    def take(self, getter: ModelAverageCustomGetter, model: torch.nn.Module) -> torch.nn.Module:
        self._getters.append(getter)
        return self._take(getter, model)

    def end(self, hook: ModelAverageHook, session: object = None) -> None:
        self._end(hook, session)
        optimizer: Any = hook._training
        (getter,) = self._getters
        bits = hashlib.sha256()
        for name, variable in getter.variables().items():
            bits.update(name.encode() + variable.detach().cpu().numpy().tobytes())
        self._path.write_text(f"{optimizer.global_step} {bits.hexdigest()}", encoding="utf-8")


def main(path: Path, rounds: int, directory: Path) -> None:
    sys.path.insert(0, str(path.parent))
    example: Any = importlib.import_module(path.stem)
    example.ROUNDS = rounds
    report = RankReport(directory)
    with (
        mock.patch.object(ModelAverageCustomGetter, "__call__", lambda *arguments: report.take(*arguments)),
        mock.patch.object(ModelAverageHook, "end", lambda *arguments: report.end(*arguments)),
    ):
        example.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
