"""The description for a package index: README.md without relative links, which would be broken there."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def description() -> str:
    """README.md with links into the repository that pyproject.toml names, or with paths if it names none."""
    repository = re.search(r'^Repository = "(.+?)/?"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)

    def elsewhere(link: re.Match[str]) -> str:
        words, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        if repository is not None:
            return f"[{words}]({repository[1]}/blob/HEAD/{target})"
        path = target.partition("#")[0]
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    prose = re.split(r"(^```.*?^```$)", readme, flags=re.M | re.S)
    prose[::2] = [re.sub(r"\[([^\]]*)\]\(([^)\s]*)\)", elsewhere, part) for part in prose[::2]]
    note = "" if repository else "\n\nPaths such as `docs/cluster.md` are files of the source distribution.\n"
    return "".join(prose).replace("\n\n", note.rstrip() + "\n\n", 1)


setup(long_description=description(), long_description_content_type="text/markdown")
