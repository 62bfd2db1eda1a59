"""One browser for all tests of a process; each test has tabs of its own. Without Chromium the tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.browser.chromium import Chromium, Tab, chromium, executable


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if executable() is None:
        pytest.skip("no chromium is installed")
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Chromium) -> Iterator[Tab]:
    """A tab as wide as a desktop's window. At its end, the console must have nothing to complain about, and no request
    may have gone to another host than the first one."""
    found = browser.tab()
    found.look(1280)
    yield found
    requests = found.requests()
    # A server that is away on purpose is one thing that a console complains about.
    assert not [text for text in found.complaints() if "net::ERR_" not in text]
    origins = {"/".join(url.split("/")[:3]) for url in requests if not url.startswith("data:")}
    assert len(origins) <= 1, origins
    found.close()
