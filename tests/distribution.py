"""The source distribution and the wheel, built as an index would get them, in a folder of the test's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOT", "build", "copy_of_the_tree", "source_files"]

ROOT = Path(__file__).parents[1]
BUILD_TIMEOUT_S = 120
# At the root, what is no source; anywhere, what programs leave behind.
_NOT_AT_THE_ROOT = {".ci", ".git", ".venv", "build", "dist", "runs", "PKG-INFO", "setup.cfg"}
_NOWHERE = {"__pycache__", "node_modules", "generated", "certs", ".build"}


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """Paths from ``root`` of the project's own files."""
    for entry in sorted(root.iterdir()):
        is_hidden_folder = entry.name.startswith(".") and entry.is_dir()
        if entry.name in _NOT_AT_THE_ROOT or is_hidden_folder or entry.name.endswith(".egg-info"):
            continue
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            inside = path.relative_to(root)
            is_output = not _NOWHERE.isdisjoint(inside.parts) or ("clients" in inside.parts and "dist" in inside.parts)
            if path.is_file() and path.suffix != ".pyc" and not is_output:
                yield inside


def copy_of_the_tree(folder: Path) -> Path:
    """The project's own files, in ``folder``."""
    for path in source_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def build(tree: Path, folder: Path) -> tuple[Path, Path]:
    """The unpacked source distribution of ``tree``, and the wheel that is made from it, both in ``folder``."""
    sdist = folder / _build("sdist", tree, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return unpacked, folder / _build("wheel", unpacked, folder)


def _build(kind: str, tree: Path, folder: Path) -> str:
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]
