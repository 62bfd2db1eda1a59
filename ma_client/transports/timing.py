"""Timeouts and log intervals of the client that users have no reason to set."""

from __future__ import annotations

from dataclasses import dataclass

from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S

__all__ = ["TIMING", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Passed down from the session; tests use shorter times.

    Args:
        first_notice_s: a wait is logged after this time, and again at growing intervals.
        last_word_s: how long to wait for the server's answer to a push whose data connection broke.
        peer_silence_s: a server that should send and sends nothing for longer than this is lost.
        lasting_s: a longer attempt to connect is repeated if the server accepts connections.
        reach_interval_s: how often to check then whether the server accepts connections.
        fall_back_interval_s: how often to ask a server that is done with a round whether it has lost that round, while
            this worker waits for its other servers.
        long_wait_s: a worker that has waited longer for a server pushes there even if the server does not wait for it.
    """

    first_notice_s: float = 5.0
    last_word_s: float = 1.0
    peer_silence_s: float = SILENCE_TIMEOUT_S
    lasting_s: float = 3.0
    reach_interval_s: float = 1.0
    fall_back_interval_s: float = 2.0
    long_wait_s: float = 5.0

    def notice_after_s(self, said_s: float) -> float:
        """When to log a wait again that was logged after ``said_s``: after 5 s, 15 s, 35 s, ..."""
        return 2 * said_s + self.first_notice_s


TIMING = Timing()
"""The default times."""
