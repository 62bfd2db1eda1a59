"""The servers of one job, and sessions with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from ma_client import ParameterServerSession
from tests.conftest import RunningServer

__all__ = ["ManySessions"]


class ManySessions:
    """Sessions with all servers of one job.

    Args:
        servers: of the job.
        sessions: closes the sessions.

    Attributes:
        addresses: of the servers.
    """

    def __init__(self, servers: Sequence[RunningServer], sessions: ExitStack) -> None:
        self.addresses = [server.address for server in servers]
        self._sessions = sessions

    def worker(self, index: int) -> ParameterServerSession:
        """Opens a session; worker 0 is the chief."""
        session = ParameterServerSession(self.addresses, worker_id=f"worker-{index}", is_chief=index == 0)
        return self._sessions.enter_context(session)
