"""Packages that only an extra installs: if one is missing, the command says so in one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

__all__ = ["MissingExtraError", "require"]


class MissingExtraError(Exception):
    """A package of an extra is not installed; the message says how to install it."""


def require(modules: Iterable[str], extra: str = "demo") -> None:
    """Looks for ``modules`` without importing them.

    Raises:
        MissingExtraError: naming all that are missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingExtraError(f"{', '.join(missing)} not installed; run: pip install 'torch-model-average[{extra}]'")
