"""One fact about a cluster and where it stands: what flags and variables tell, and whether they agree."""

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
"""In place of a task index: the server hands one out."""
TaskIndex = int | Literal["auto"]


class ClusterError(ValueError):
    """The description of the cluster is missing or contradicts itself."""


@dataclass(frozen=True)
class Setting(Generic[_T_co]):
    """One fact.

    Args:
        value: what it says.
        source: where it stands, as its author sees it: ``RANK='1'``.
        agrees: ``agrees(earlier, value)``: whether it fits what an earlier source said.
    """

    value: _T_co
    source: str
    agrees: Callable[[_T_co, _T_co], bool] = operator.eq


@dataclass(frozen=True)
class Told:
    """What one source tells, or several together; None: nothing.

    Args:
        ps_hosts: addresses of the parameter servers.
        num_workers: how many workers there are.
        task_index: which of them this process is; AUTO: the server says it.
    """

    ps_hosts: Setting[tuple[str, ...]] | None = None
    num_workers: Setting[int] | None = None
    task_index: Setting[TaskIndex] | None = None

    @property
    def missing(self) -> frozenset[str]:
        """Names of what is not told."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is None)

    def and_then(self, later: Told) -> Told:
        """Both together.

        Raises:
            ClusterError: they contradict each other; names both sources and both values.
        """
        return Told(
            _together("ps_hosts", self.ps_hosts, later.ps_hosts),
            _together("num_workers", self.num_workers, later.num_workers),
            _together("task_index", self.task_index, later.task_index),
        )


def whole(source: str, text: str, least: int) -> Setting[int]:
    """A variable that has a whole number.

    Args:
        source: the variable's name.
        text: its value.
        least: the least that is meant.

    Raises:
        ClusterError: it has no such number.
    """
    if _WHOLE.fullmatch(text) is None or int(text) < least:
        raise ClusterError(f"{source}={text!r} is not a whole number from {least} on")
    return Setting(int(text), f"{source}={text!r}")


def index_of(value: object) -> int:
    """The index of a task in JSON: a number or, as a key, a text.

    Raises:
        ValueError: it is no whole number from 0 on.
    """
    if _WHOLE.fullmatch(str(value)) is None:
        raise ValueError(f"index {value!r} is not a whole number from 0 on")
    return int(str(value))


def _together(name: str, earlier: Setting[_T] | None, later: Setting[_T] | None) -> Setting[_T] | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    if not later.agrees(earlier.value, later.value):
        values = " or ".join(_shown(setting.value) for setting in (earlier, later))
        raise ClusterError(
            f"{earlier.source} and {later.source} contradict each other: {name} is {values}; unset what is wrong"
        )
    return earlier


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
