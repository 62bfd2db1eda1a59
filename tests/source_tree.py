"""The hand-written modules of the four packages, as paths and as syntax trees."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

__all__ = ["MODULES", "ROOT", "tree_of"]

ROOT = Path(__file__).parents[1]
_FOLDERS = (ROOT / "proto" / "modelaverage", ROOT / "ps_server", ROOT / "ma_client", ROOT / "ps_worker")


def _modules() -> dict[str, Path]:
    found = {}
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
            if not name.endswith(("_pb2", "_pb2_grpc")):
                found[name] = path
    return found


MODULES = _modules()
"""Every module by its full name; generated code is left out."""


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module, parsed once."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))
