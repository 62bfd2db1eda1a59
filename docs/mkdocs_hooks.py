"""Hooks for mkdocs: pages are spread over the repository, and link to its files and folders."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "docker/**/*.md", "examples/**/README.md", "tests/golden/**/README.md")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages under their paths in the repository, files that they link to, and a list for each linked folder."""
    laid_out = Files([file for file in files if file.src_dir != config.docs_dir])
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if "node_modules" not in path.parts})
    linked = {target for page in pages for target in _targets(page)}
    # A list links to the files of its folder.
    lists = {folder for folder in linked if (ROOT / folder).is_dir() and not (ROOT / folder / "README.md").exists()}
    linked |= {path.relative_to(ROOT).as_posix() for folder in lists for path in _shown(ROOT / folder)}
    for path in {*(page.relative_to(ROOT).as_posix() for page in pages), *linked}:
        if (ROOT / path).is_file():
            laid_out.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for folder in lists:
        laid_out.append(File.generated(config, f"{folder}/index.md", content=_list(ROOT / folder)))
    return laid_out


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Points links to folders at the folder's page, and turns the name of a code block into its title."""
    here = posixpath.dirname(page.file.src_uri)

    def to_page(link: re.Match[str]) -> str:
        folder = ROOT / here / link[1]
        if not folder.is_dir():
            return link[0]
        return posixpath.join(link[1], "README.md" if (folder / "README.md").exists() else "index.md")

    return re.sub(r"^```(\w+) ([\w ]+)$", r'```\1 title="\2"', _LINK.sub(to_page, markdown), flags=re.MULTILINE)


def _targets(page: Path) -> Iterator[str]:
    """Paths of the files and folders that a page links to, relative to the root."""
    for link in _LINK.finditer(page.read_text(encoding="utf-8")):
        target = (page.parent / link[1]).resolve()
        if target.exists() and target.is_relative_to(ROOT):
            yield target.relative_to(ROOT).as_posix()


def _shown(folder: Path) -> list[Path]:
    """The files of a folder and of its subfolders."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not {"__pycache__", "node_modules"} & {*path.parts}
    )


def _list(folder: Path) -> str:
    lines = [f"# {folder.relative_to(ROOT).as_posix()}", ""]
    for path in _shown(folder):
        name = path.relative_to(folder).as_posix()
        title = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") if path.suffix == ".md" else ""
        lines.append(f"- [{title or name}]({name})")
    return "\n".join(lines)
