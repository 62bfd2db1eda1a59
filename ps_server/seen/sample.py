"""The input of the metrics and of the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.history import HistorySeen
from ps_server.seen.observations import Observations
from ps_server.seen.traffic import Traffic

__all__ = ["MetricsSample", "PageSample"]


@dataclass(frozen=True)
class MetricsSample:
    """The state of the server at one moment.

    Args:
        status: the answer of GetStatus.
        observations: measurements of rounds; they change with the next event, so read them at once.
        traffic: bytes of fragments.
        lateness_sum_s: by worker, the sum over all rounds that counted it; oldest contact first.
    """

    status: pb.GetStatusResponse
    observations: Observations
    traffic: Traffic
    lateness_sum_s: Mapping[str, float]


@dataclass(frozen=True)
class PageSample:
    """The state of the server at one moment, as values that no longer change. For any thread.

    Args:
        status: the answer of GetStatus.
        history: what happened since the server started.
        traffic: bytes of fragments.
        now_s: the time, on the server's clock.
        started_at_s: when the server started, on the same clock.
    """

    status: pb.GetStatusResponse
    history: HistorySeen
    traffic: Traffic
    now_s: float
    started_at_s: float
