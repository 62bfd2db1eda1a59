"""A server's metrics as Prometheus reads them, by the client library's parser."""

from __future__ import annotations

import urllib.request

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["OURS", "Scrape", "scrape", "text_of"]

OURS = "modelaverage_"
TIMEOUT_S = 10


def text_of(address: str) -> str:
    """The answer to one scrape."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


class Scrape:
    """One scrape: metric families by name, samples by name and labels."""

    def __init__(self, text: str) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def value(self, name: str, **labels: str) -> float:
        """The value of one of this project's metrics."""
        return float(self._samples[OURS + name, frozenset(labels.items())])

    def labels(self, name: str, label: str) -> set[str]:
        """The values of a label."""
        return {dict(found)[label] for sample, found in self._samples if sample == OURS + name}

    @property
    def names(self) -> set[str]:
        """Names of all samples, including the client library's own."""
        return {name for name, _ in self._samples}


def scrape(address: str) -> Scrape:
    """What the server that serves metrics at ``address`` shows now."""
    return Scrape(text_of(address))
