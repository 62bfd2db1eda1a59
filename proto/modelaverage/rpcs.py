"""The name under which the server's calls stand: /SERVICE/Call."""

from __future__ import annotations

__all__ = ["SERVICE"]

SERVICE = "modelaverage.v1.ParameterServer"
