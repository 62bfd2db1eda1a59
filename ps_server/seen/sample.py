"""The input of the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.observations import Observations
from ps_server.seen.traffic import Traffic

__all__ = ["MetricsSample"]


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
