"""The page of a real server with real workers, some of which are killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ps_server.edge.security import ServerSecurity
from tests.conftest import StartServer
from tests.page.browser.chromium import Tab
from tests.page.conftest import PAGE
from tests.ports import lasting_port
from tests.prepared import Prepared

pytestmark = pytest.mark.long

_PAUSE_S = 0.05
_ENDLESS = 1_000_000
_WORKER, _READER = "worker-0123456789abcdef", "reader-0123456789abcdef"
_TIMEOUT_S = 60.0
_STEP = "Number(document.querySelector('#facts .value')?.textContent.replace(',', ''))"


class _Run:
    """A server with a page, and workers."""

    def __init__(self, directory: Path, workers: int) -> None:
        self.address, self.page = (f"127.0.0.1:{lasting_port()}" for _ in range(2))
        self._flags = ["--num-workers", str(workers), "--checkpoint-dir", str(directory), "--bind", self.address]
        self._processes = list[Prepared]()

    def serve(self) -> Prepared:
        """Starts the server; returns when it listens."""
        server = self._start("ps_server", "serve", *self._flags, "--page-bind", self.page)
        lines = list[str]()
        while not any(self.page in line for line in lines):
            lines.append(server.stdout.readline())
            assert lines[-1], f"the server ended: {lines}"
        return server

    def train(self, worker: int, rounds: int = _ENDLESS) -> Prepared:
        """Starts a worker."""
        arguments = (self.address, str(worker), str(rounds), str(_PAUSE_S))
        return self._start("tests.page.browser.trainer", *arguments)

    def end(self) -> None:
        """Kills all."""
        for process in self._processes:
            process.kill()
            process.wait(_TIMEOUT_S)
            process.stdout.close()

    def _start(self, module: str, *arguments: str) -> Prepared:
        self._processes.append(Prepared(module, *arguments))
        return self._processes[-1]


@contextmanager
def _run(directory: Path, workers: int = 2) -> Iterator[_Run]:
    with ExitStack() as stack:
        run = _Run(directory, workers)
        stack.callback(run.end)
        yield run


def _phase_begins(tab: Tab, text: str) -> None:
    tab.wait(f"document.querySelector('#phase').textContent.startsWith({text!r})", _TIMEOUT_S)


def test_a_killed_worker_is_named_in_red_until_it_trains_again(tab: Tab, tmp_path: Path) -> None:
    with _run(tmp_path) as run:
        run.serve()
        tab.open(f"http://{run.page}/")
        _phase_begins(tab, "Waiting for the chief")
        killed = [run.train(worker) for worker in range(2)][1]
        tab.wait(f"{_STEP} >= 10", _TIMEOUT_S)
        assert tab.text("#phase") == "Training"
        calm = tab.value("getComputedStyle(document.querySelector('#phase')).color")
        tab.wait("document.querySelectorAll('#timeline .names li').length === 2")
        assert tab.text("#timeline .names").split() == ["worker-0", "worker-1"]
        assert "worker-0 (chief)" in tab.text("#workers-table")
        assert "on average in step" in tab.text("#curves .summary")

        killed.kill()
        killed.wait(_TIMEOUT_S)
        _phase_begins(tab, "Round waits for worker-1 for ")
        assert tab.value("getComputedStyle(document.querySelector('#phase')).color") != calm
        assert tab.text("#workers-table tr.bad th") == "worker-1"
        tab.wait("document.querySelector('#timeline .names .late')?.textContent === 'worker-1'")
        tab.wait("document.querySelector('#timeline .state-late') !== null")
        tab.wait("document.querySelector('#events-table').textContent.includes('round_waits')")
        stopped_at = tab.value(_STEP)

        run.train(1)
        tab.wait(f"{_STEP} >= {stopped_at + 5}", _TIMEOUT_S)
        _phase_begins(tab, "Training")
        tab.wait("document.querySelectorAll('#timeline .stage .mark-restarted').length === 1")
        assert "a new process of the worker" in tab.text("#timeline .legend")


def test_the_page_survives_its_server_and_tells_the_end_of_the_job(tab: Tab, tmp_path: Path) -> None:
    rounds = 60
    with _run(tmp_path) as run:
        server = run.serve()
        for worker in range(2):
            run.train(worker, rounds)
        tab.open(f"http://{run.page}/")
        tab.wait(f"{_STEP} >= 5", _TIMEOUT_S)
        server.send_signal(signal.SIGKILL)
        server.wait(_TIMEOUT_S)
        tab.wait("document.querySelector('#lost').textContent.startsWith('No news since ')", _TIMEOUT_S)
        run.serve()
        tab.wait("document.querySelector('#connection').textContent === 'live'", _TIMEOUT_S)
        _phase_begins(tab, "Job over")
        assert tab.value(_STEP) == rounds
        assert tab.value("document.querySelector('#lost').hidden")
        # The page knows the rounds before the restart; one that is opened now does not.
        assert tab.value("document.querySelector('#history').hidden")
        tab.open(f"http://{run.page}/")
        tab.wait("document.querySelector('#history').textContent.startsWith('This server began at step ')")
        assert tab.text("#phase") == "Job over"


def test_a_token_in_the_address_opens_the_page_and_leaves_the_address(
    tab: Tab, start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "worker").write_text(f"{_WORKER}\n")
    (tmp_path / "reader").write_text(f"{_READER}\n")
    security = ServerSecurity(token_file=tmp_path / "worker", reader_token_file=tmp_path / "reader")
    server = start_server(1, security=security, page=PAGE)
    tab.open(f"{server.page_url}/?token={_READER}")
    _phase_begins(tab, "Waiting for the chief")
    assert tab.value("location.search + document.cookie + document.documentElement.outerHTML").count(_READER) == 0
    tab.open(f"{server.page_url}/")  # the browser remembers it, in a cookie that no script can read
    _phase_begins(tab, "Waiting for the chief")
