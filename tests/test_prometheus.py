"""A real Prometheus scrapes a running job, and accepts what docs/observability.md has for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ps_server.checkpoints.keeper import CheckpointPolicy
from tests.conftest import StartServer
from tests.jobs import COUNT, STEP, Job, of
from tests.raw_client import RawClient, until
from tests.scraped import OURS, scrape, text_of
from tests.source_tree import ROOT

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
START_TIMEOUT_S = 30
needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus here (Debian's package `prometheus`)")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian's package `prometheus`)")


class Prometheus:
    """Prometheus on a free port of loopback, scraping one address every half second."""

    def __init__(self, directory: Path, target: str) -> None:
        assert PROMETHEUS is not None
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
            "scrape_configs": [{"job_name": "modelaverage", "static_configs": [{"targets": [target]}]}],
        }
        (directory / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._log = (directory / "log").open("w+")
        self._process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--log.level=info",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._address = ""

    def __enter__(self) -> Prometheus:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._address:
            assert self._process.poll() is None, self._words()
            assert time.monotonic() < deadline_s, self._words()
            found = re.search(r'Listening on".*?address=(\S+)', self._words())
            self._address = found[1] if found else ""
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _words(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: metric and value of each series."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code != 503:  # it has not read its storage yet
                raise
            return []
        return found

    def value(self, expression: str) -> float | None:
        """The value of the only series; None while there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if len(found) == 1 else None


@needs_prometheus
def test_prometheus_scrapes_a_running_job_and_answers_queries(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(2, metrics_bind="127.0.0.1:0")
    with Prometheus(tmp_path, server.metrics_address) as prometheus, RawClient(server.address) as client:
        job = Job(client, server.address)
        until(lambda: prometheus.value('up{job="modelaverage"}') == 1, "it is scraped")
        for step in range(STEP, STEP + 4):
            one = job.push("a", of(1), push_id=step, base_step=step)
            job.given("a", COUNT)
            other = job.push("b", of(2), push_id=step, base_step=step)
            one.answer()
            other.answer()
        until(lambda: prometheus.value(f"{OURS}rounds_total") == 4, "it has seen the rounds")
        assert prometheus.value(f"{OURS}global_step") == STEP + 4
        assert prometheus.value(f'{OURS}round_phase_seconds_count{{phase="receiving"}}') == 4
        late = prometheus.query(f"{OURS}barrier_lateness_seconds_sum / {OURS}barrier_lateness_seconds_count > 0")
        assert [series["metric"]["worker"] for series in late] == ["b"]
        quantile = prometheus.value(f"histogram_quantile(0.5, {OURS}round_seconds_bucket)")
        assert quantile is not None
        assert 0 < quantile < 60


@needs_promtool
def test_promtool_finds_nothing_to_complain_of(start_server: StartServer) -> None:
    assert PROMTOOL is not None
    text = text_of(start_server(2, metrics_bind="127.0.0.1:0").metrics_address)
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
def test_the_configuration_and_the_alerts_are_accepted(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    alerts, scraping = (part.partition("```")[0] for part in page.split("```yaml\n")[1:])
    (tmp_path / "alerts.yml").write_text(alerts)
    (tmp_path / "prometheus.yml").write_text(scraping)
    for command in (("config", tmp_path / "prometheus.yml"), ("rules", tmp_path / "alerts.yml")):
        done = subprocess.run(
            [PROMTOOL, "check", *map(str, command)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def names_served(start_server: StartServer, directory: Path) -> set[str]:
    server = start_server(1, metrics_bind="127.0.0.1:0", checkpoints=CheckpointPolicy(directory))
    with RawClient(server.address) as client:
        Job(client, server.address).push("a", of(1), loss=1.0).answer()
        until(lambda: client.status().checkpoint_step == STEP + 1, "the checkpoint is written")
    return scrape(server.metrics_address).names


def test_the_page_has_every_metric_and_no_other(start_server: StartServer, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    table = page.partition("## Metrics")[2].partition("**Where")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    served = {name.removeprefix(OURS) for name in names_served(start_server, tmp_path) if name.startswith(OURS)}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in served} == documented
    alerts = set(re.findall(r"modelaverage_\w+", page.partition("```yaml\n")[2].partition("```")[0]))
    assert {name.removeprefix(OURS) for name in alerts} <= served
