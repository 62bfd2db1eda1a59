"""Processes that are forked from `multiprocessing`'s fork server, which has already imported all they need
(preload.py). So a killed process is back at once."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from ps_server import __main__ as server

__all__ = ["Argument", "die_with_parent", "fork", "serve", "serve_small"]

Argument = TypeVar("Argument")
_PR_SET_PDEATHSIG = 1


def fork(words: Path, function: Callable[[Argument], None], argument: Argument) -> BaseProcess:
    """Starts a process that calls ``function``; what it prints is appended to the file ``words``."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_begin, args=(words, function, argument), daemon=True
    )
    process.start()
    return process


def serve(arguments: list[str]) -> None:
    """`ps-server` with these arguments."""
    sys.exit(server.main(arguments))


def serve_small(arguments: list[str]) -> None:
    """The same, but models of any size are in shared memory, which needs descriptors."""
    vars(server)["DEFAULT_SHARED_MEMORY_FROM_BYTES"] = 0
    serve(arguments)


def die_with_parent() -> None:
    """Has this process killed when the one that started it ends; a stopped process would stay forever otherwise."""
    # Where the kernel cannot do this, it stays.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _begin(words: Path, function: Callable[[Argument], None], argument: Argument) -> None:
    die_with_parent()
    with words.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    function(argument)
