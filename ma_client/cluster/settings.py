"""Settings of a cluster with their sources, and whether several sources agree."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Final, Generic, Literal, TypeVar

__all__ = ["AUTO", "ClusterError", "Setting", "TaskIndex", "Told", "index_of", "whole"]

_WHOLE = re.compile(r"[0-9]{1,9}")

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

AUTO: Final = "auto"
"""In place of a task index: the server assigns one."""
TaskIndex = int | Literal["auto"]


class ClusterError(ValueError):
    """The description of the cluster is missing or contradicts itself."""


@dataclass(frozen=True)
class Setting(Generic[_T_co]):
    """One setting.

    Args:
        value: its value.
        source: where it was read, as its author sees it: ``RANK='1'``.
        agrees: ``agrees(earlier, value)``: whether it is compatible with an earlier source's value.
    """

    value: _T_co
    source: str
    agrees: Callable[[_T_co, _T_co], bool] = operator.eq


@dataclass(frozen=True)
class Told:
    """The settings of one source, or of several together; None: not set.

    Args:
        ps_hosts: addresses of the parameter servers.
        num_workers: how many workers there are.
        task_index: which of them this process is; AUTO: the server assigns it.
    """

    ps_hosts: Setting[tuple[str, ...]] | None = None
    num_workers: Setting[int] | None = None
    task_index: Setting[TaskIndex] | None = None

    @property
    def missing(self) -> frozenset[str]:
        """Names of the settings that are not set."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is None)

    def and_then(self, later: Told) -> Told:
        """Combines both.

        Raises:
            ClusterError: they contradict each other; the message names both sources and both values.
        """
        return Told(
            _together("ps_hosts", self.ps_hosts, later.ps_hosts),
            _together("num_workers", self.num_workers, later.num_workers),
            _together("task_index", self.task_index, later.task_index),
        )


def whole(source: str, text: str, least: int) -> Setting[int]:
    """Reads a variable that holds a whole number.

    Args:
        source: the variable's name.
        text: its value.
        least: the smallest number allowed.

    Raises:
        ClusterError: the value is not such a number.
    """
    if _WHOLE.fullmatch(text) is None or int(text) < least:
        raise ClusterError(f"{source}={text!r} is not a whole number from {least} up")
    return Setting(int(text), f"{source}={text!r}")


def index_of(value: object) -> int:
    """The index of a task in JSON: a number, or a string if it is a key.

    Raises:
        ValueError: it is not a whole number from 0 up.
    """
    if _WHOLE.fullmatch(str(value)) is None:
        raise ValueError(f"index {value!r} is not a whole number from 0 up")
    return int(str(value))


def _together(name: str, earlier: Setting[_T] | None, later: Setting[_T] | None) -> Setting[_T] | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    if not later.agrees(earlier.value, later.value):
        values = " or ".join(_shown(setting.value) for setting in (earlier, later))
        raise ClusterError(
            f"{earlier.source} and {later.source} contradict each other: {name} is {values}; unset the wrong one"
        )
    return earlier


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
