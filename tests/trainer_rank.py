"""Runs an example of examples/trainers, and says what this process has when the example leaves the hook.

python tests/trainer_rank.py examples/trainers/with_NAME.py ROUNDS
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from ma_client import ModelAverageCustomGetter, ModelAverageHook


def write_at_the_end(directory: Path) -> None:
    """From now on, the end of a hook writes the global step, and a hash of the variables of the only getter."""
    getters = list[ModelAverageCustomGetter]()
    make, end = ModelAverageCustomGetter.__init__, ModelAverageHook.end

    def made(getter: ModelAverageCustomGetter, *arguments: Any, **options: Any) -> None:
        make(getter, *arguments, **options)
        getters.append(getter)

    def ended(hook: ModelAverageHook, session: object = None) -> None:
        end(hook, session)
        optimizer: Any = hook._training
        (getter,) = getters
        bits = hashlib.sha256()
        for name, variable in getter.variables().items():
            bits.update(name.encode() + variable.detach().cpu().numpy().tobytes())
        told = f"{optimizer.global_step} {bits.hexdigest()}"
        (directory / f"{os.environ['MA_TASK_INDEX']}-{os.environ['RANK']}").write_text(told, encoding="utf-8")

    ModelAverageCustomGetter.__init__ = made  # type: ignore[method-assign]
    ModelAverageHook.end = ended  # type: ignore[method-assign]


def main(path: Path, rounds: int, directory: Path) -> None:
    sys.path.insert(0, str(path.parent))
    example = importlib.import_module(path.stem)
    example.ROUNDS = rounds
    write_at_the_end(directory)
    example.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
