"""What the metrics are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.seen.observations import Observations
from ps_server.seen.traffic import Traffic

__all__ = ["MetricsSample"]


@dataclass(frozen=True)
class MetricsSample:
    """What the server knows at one moment.

    Args:
        status: as GetStatus answers it.
        observations: of its rounds; they change with the next event, so read them at once.
        traffic: bytes of fragments.
        lateness_sum_s: by worker, over all rounds that counted it, oldest contact first.
    """

    status: pb.GetStatusResponse
    observations: Observations
    traffic: Traffic
    lateness_sum_s: Mapping[str, float]
