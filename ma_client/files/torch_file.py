"""A state dict that `torch.save` wrote, as a source of initial values. No code in such a file is run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ma_client.tensors.mirror import as_numpy
from ma_client.tensors.refused_tensors import dtype_of

__all__ = ["TorchFile"]


class TorchFile:
    """Reads the tensors of a state dict; only the names of other entries (numbers, extra state) are known.

    Raises:
        ValueError: the file cannot be read, is not safe to read, or is not a state dict.
    """

    def __init__(self, path: Path) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise any exception
            first_line = str(error).strip().split("\n", 1)[0]
            raise ValueError(
                f"torch.load with weights_only=True cannot read it ({first_line}); save model.state_dict() alone"
            ) from None
        if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
            raise ValueError(
                f"it has a {type(content).__name__} instead of a state dict; save model.state_dict() alone"
            )
        nested = [name for name, value in content.items() if isinstance(value, Mapping)]
        if nested and not any(isinstance(value, torch.Tensor) for value in content.values()):
            raise ValueError(f"it has {', '.join(nested[:4])} instead of a state dict; save model.state_dict() alone")
        self._content: Mapping[str, Any] = content

    def names(self) -> Sequence[str]:
        """The names of all its entries."""
        return list(self._content)

    def what(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Element type and shape."""
        value = self._content[name]
        if not isinstance(value, torch.Tensor):
            return type(value).__name__, ()
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            return f"{type(value).__name__} ({value.layout})", tuple(value.shape)
        return dtype_of(value), tuple(value.shape)

    def read(self, name: str) -> NDArray[Any]:
        """The values of an entry whose type is in `DTYPES`."""
        return as_numpy(self._content[name].detach().contiguous())
