"""How much memory this process may use: the machine's, or what its control groups allow.

A container may have less memory than the machine; a process that exceeds the container's limit is killed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["default_max_model_bytes", "memory_bytes"]

_LIMIT_FILES = {"cgroup2": "memory.max", "cgroup": "memory.limit_in_bytes"}


@dataclass(frozen=True)
class _Hierarchy:
    """A mounted hierarchy of control groups.

    Args:
        kind: of the file system: cgroup2, or cgroup for version 1.
        top: the group that is mounted, as /proc/self/cgroup would name it.
        folder: where it is mounted.
    """

    kind: str
    top: PurePosixPath
    folder: Path


def memory_bytes(root: Path = Path("/"), machine_bytes: int | None = None) -> int:
    """The smallest of the machine's memory and the limits of this process's control groups, versions 1 and 2, and of
    all their visible parents.

    Args:
        root: the directory with proc and sys, for tests.
        machine_bytes: the machine's memory, for tests.
    """
    if machine_bytes is None:
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((machine_bytes, *_limits(root)))


def default_max_model_bytes(root: Path = Path("/"), machine_bytes: int | None = None) -> int:
    """A third of `memory_bytes`: a server holds a center twice."""
    return memory_bytes(root, machine_bytes) // 3


def _limits(root: Path) -> Iterator[int]:
    groups = _groups(root)
    for hierarchy in _hierarchies(root):
        group = groups.get(hierarchy.kind)
        if group is None:
            continue
        name = _LIMIT_FILES[hierarchy.kind]
        for folder in _from_group_to_top(hierarchy, group):
            text = _read(folder / name).strip()
            if (
                text.isdigit() and int(text) > 0
            ):  # "max" is not a number; version 1 has a number beyond all memory instead
                yield int(text)


def _groups(root: Path) -> dict[str, PurePosixPath]:
    """This process's group by kind of hierarchy; lines are NUMBER:CONTROLLERS:PATH."""
    found: dict[str, PurePosixPath] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if number == "0" and not controllers:
            found["cgroup2"] = PurePosixPath(path)
        elif colon and "memory" in controllers.split(","):
            found["cgroup"] = PurePosixPath(path)
    return found


def _hierarchies(root: Path) -> list[_Hierarchy]:
    """The hierarchies with the memory controller: those in the table of mounts, and the usual places."""
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [more ...] - KIND SOURCE OPTIONS
        mount, dash, file_system = line.partition(" - ")
        fields, (kind, *rest) = mount.split(), (file_system.split() or [""])
        if not dash or len(fields) < 5 or kind not in _LIMIT_FILES:
            continue
        if kind == "cgroup" and "memory" not in (rest[-1].split(",") if rest else ()):
            continue
        top, folder = (PurePosixPath(_unescaped(field)) for field in fields[3:5])
        found.append(_Hierarchy(kind, top, root / folder.relative_to("/")))
    usual = [
        _Hierarchy("cgroup2", PurePosixPath("/"), root / "sys/fs/cgroup"),
        _Hierarchy("cgroup", PurePosixPath("/"), root / "sys/fs/cgroup/memory"),
    ]
    return [*found, *usual]


def _from_group_to_top(hierarchy: _Hierarchy, group: PurePosixPath) -> list[Path]:
    try:
        below = group.relative_to(hierarchy.top)
    except ValueError:  # in a container, its own group is mounted, under the name that it has outside
        return [hierarchy.folder]
    parts = () if ".." in below.parts else below.parts  # the process was moved to a group that is not visible here
    return [hierarchy.folder.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""
