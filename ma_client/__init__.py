"""The library inside a worker process: the session (numpy) and, with torch installed, the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ma_client import forking as _forking  # noqa: F401  # before all that imports grpc
from ma_client.cluster import ClusterError, ClusterSpec
from ma_client.data_connection import DataSettings
from ma_client.session import InitializeResult, ParameterServerSession, PushResult
from modelaverage.errors import SecurityError
from modelaverage.outcome import Outcome
from modelaverage.security import Security, Tls

if TYPE_CHECKING:
    from ma_client.optimizer import GLOBAL_VARIABLE_NAME, ModelAverageCustomGetter, ModelAverageOptimizer

__all__ = [
    "ClusterError",
    "ClusterSpec",
    "DataSettings",
    "GLOBAL_VARIABLE_NAME",
    "InitializeResult",
    "ModelAverageCustomGetter",
    "ModelAverageOptimizer",
    "Outcome",
    "ParameterServerSession",
    "PushResult",
    "Security",
    "SecurityError",
    "Tls",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import and is an extra: only those who use the optimizer need it.
    if name in {"GLOBAL_VARIABLE_NAME", "ModelAverageCustomGetter", "ModelAverageOptimizer"}:
        try:
            from ma_client import optimizer
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs torch ({error}): pip install 'modelaverage[torch]'") from error
        return getattr(optimizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
