"""The full name of the gRPC service; a call's path is /SERVICE/Method."""

from __future__ import annotations

__all__ = ["SERVICE"]

SERVICE = "modelaverage.v1.ParameterServer"
