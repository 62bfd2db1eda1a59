"""axe-core, the accessibility checker, finds nothing in the page. It is an npm package, which `.ci/run` fetches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.page.browser.chromium import Tab
from tests.page.browser.fake_server import FakePage, fake_page
from tests.page.browser.scenes import scene

pytestmark = pytest.mark.long

_AXE = Path(os.environ.get("AXE_CORE", Path(__file__).parents[3] / "build" / "axe-core" / "package" / "axe.min.js"))
_RUN = """axe.run().then(found => found.violations.map(one =>
    `${one.impact} ${one.id}: ${one.help}: ${one.nodes.map(node => node.html).slice(0, 3).join(" ")}`))"""


@pytest.fixture(scope="module")
def axe() -> str:
    if not _AXE.is_file():
        pytest.skip(f"no axe-core at {_AXE}; `npm pack axe-core` and tar, or AXE_CORE=PATH")
    return _AXE.read_text(encoding="utf-8")


@pytest.fixture
def page() -> Iterator[FakePage]:
    with fake_page(scene("chief")) as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
@pytest.mark.parametrize(
    "name", ["chief", "training", "killed", "quorum", "over", "many", "hostile", "shards", "restored"]
)
def test_axe_finds_nothing(tab: Tab, page: FakePage, axe: str, name: str, width: int, scheme: str) -> None:
    page.show(scene(name))
    tab.look(width, scheme=scheme)
    tab.open(page.url)
    tab.wait("!document.querySelector('#timeline').ariaBusy && document.querySelector('#facts').children.length > 0")
    tab.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    tab.value(axe)
    assert tab.value(_RUN) == []
    if name == "killed":
        page.hang_up()
        tab.wait("!document.querySelector('#lost').hidden")
        assert tab.value(_RUN) == []
