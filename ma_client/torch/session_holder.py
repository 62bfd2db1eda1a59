"""The session of an optimizer: given by the user, who closes it, or made from the environment."""

from __future__ import annotations

from ma_client.session import ParameterServerSession

__all__ = ["SessionHolder"]


class SessionHolder:
    """Holds one session at a time. Only a session that it made itself is closed, and replaced by a new one.

    Args:
        given: the user's session; None: one is made from what the environment says.
        is_chief: whether this worker is the chief.

    Attributes:
        session: the present one.

    Raises:
        ClusterError: the environment does not describe the cluster.
    """

    def __init__(self, given: ParameterServerSession | None, is_chief: bool) -> None:
        self._is_own = given is None
        self._is_chief = is_chief
        self._is_closed = False
        self.session = ParameterServerSession.from_env(is_chief=is_chief) if given is None else given

    @property
    def global_step(self) -> int:
        """Rounds completed, as far as this worker knows."""
        return self.session.base_step or 0

    def resume(self) -> None:
        """Training begins, or begins again: rounds wait for this worker, if need be in a new session."""
        if not self._is_closed:
            self.session.resume_training()
            return
        session = ParameterServerSession.from_env(is_chief=self._is_chief, must_be_new=False)
        session.base_step = self.session.base_step
        self.session, self._is_closed = session, False

    def close(self) -> None:
        """Closes the session if this object made it. Does nothing the second time."""
        if self._is_own and not self._is_closed:
            self._is_closed = True
            self.session.close()
