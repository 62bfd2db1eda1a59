"""How long the client waits for things that users have no reason to set, and how soon it says so."""

from __future__ import annotations

from dataclasses import dataclass

from modelaverage.runtime.tuning import SILENCE_TIMEOUT_S

__all__ = ["TIMING", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Handed down from the session; tests make one with shorter times.

    Args:
        first_notice_s: a wait is said in the log after this time, and again at growing gaps.
        last_word_s: how long after a data connection broke the server's own word on the push is waited for.
        peer_silence_s: a server from which nothing comes for longer, though something should, is lost.
        lasting_s: an attempt to connect that lasts longer than this, to a server that takes connections, is made again.
        reach_interval_s: how often it is then looked whether the server takes connections.
        fall_back_interval_s: how often a server that is done with a round is asked whether it has fallen back, while
            this worker waits for its other servers.
        long_wait_s: a worker that has waited for a server for longer than this pushes there, asked or not.
    """

    first_notice_s: float = 5.0
    last_word_s: float = 1.0
    peer_silence_s: float = SILENCE_TIMEOUT_S
    lasting_s: float = 3.0
    reach_interval_s: float = 1.0
    fall_back_interval_s: float = 2.0
    long_wait_s: float = 5.0

    def notice_after_s(self, said_s: float) -> float:
        """When a wait that was said after ``said_s`` is to be said again: after 5 s, 15 s, 35 s, ..."""
        return 2 * said_s + self.first_notice_s


TIMING = Timing()
"""The usual times."""
