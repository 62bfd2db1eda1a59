"""The type of what commands are added to, which argparse has no public name for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

__all__ = ["SubParsers"]

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    SubParsers = Any
