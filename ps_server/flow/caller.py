"""The role of the client whose call is being served."""

from __future__ import annotations

from contextvars import ContextVar

from ps_server.rules.authorization import Role

__all__ = ["caller_role"]

caller_role: ContextVar[Role | None] = ContextVar("caller_role", default=None)
"""During a call: the role of its token; None without tokens. The task that checks the token also serves the call."""
