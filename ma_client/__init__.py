"""The library inside a worker process: the session (numpy) and, with torch installed, the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Before all that imports grpc.
from ma_client.process import forking as _forking  # noqa: F401

# isort: split
from ma_client.cluster.spec import ClusterError, ClusterSpec
from ma_client.job.results import InitializeResult, PushResult
from ma_client.job.ticket import PushTicket
from ma_client.session import ParameterServerSession
from ma_client.transports.data_settings import DataSettings
from modelaverage import __version__ as __version__
from modelaverage.access.security import Security, Tls
from modelaverage.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelAverageError,
    NotInitializedError,
    ProtocolError,
    Reason,
    RetryPushError,
    SecurityError,
    ServerUnavailableError,
    SessionInUseError,
)
from modelaverage.outcome import Outcome
from modelaverage.outer import OuterAdam, OuterAverage, OuterSGD

if TYPE_CHECKING:
    from ma_client.torch.custom_getter import GLOBAL_VARIABLE_NAME, ModelAverageCustomGetter
    from ma_client.torch.hook import ModelAverageHook
    from ma_client.torch.optimizer import ModelAverageOptimizer

__all__ = [
    "ClusterError",
    "ClusterSpec",
    "ConflictError",
    "DataSettings",
    "DeadlineExceededError",
    "GLOBAL_VARIABLE_NAME",
    "InitializeResult",
    "InvalidRequestError",
    "ModelAverageCustomGetter",
    "ModelAverageError",
    "ModelAverageHook",
    "ModelAverageOptimizer",
    "NotInitializedError",
    "Outcome",
    "OuterAdam",
    "OuterAverage",
    "OuterSGD",
    "ParameterServerSession",
    "ProtocolError",
    "PushResult",
    "PushTicket",
    "Reason",
    "RetryPushError",
    "Security",
    "SecurityError",
    "ServerUnavailableError",
    "SessionInUseError",
    "Tls",
]
# torch takes seconds to import and is an extra: only those who use the optimizer need it.
_WITH_TORCH = {
    "GLOBAL_VARIABLE_NAME": "custom_getter",
    "ModelAverageCustomGetter": "custom_getter",
    "ModelAverageHook": "hook",
    "ModelAverageOptimizer": "optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"ma_client.torch.{_WITH_TORCH[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs torch ({error}): pip install 'torch-model-average[torch]'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
