"""Settings of the allocator and of gRPC that server and client share, each with its reason and its measured effect.

Not set, because three alternating runs showed no effect beyond the noise of 5 %: HTTP/2 frames of 1 or 4 MiB, a
lookahead of 1 MiB, read chunks of 64 or 256 KiB (docs/decisions/0011).
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["CHANNEL_OPTIONS", "GONE_AFTER_S", "SILENCE_TIMEOUT_S", "connecting_for", "keep_freed_memory"]

SILENCE_TIMEOUT_S = 50.0
"""A peer that should send something and sends nothing for longer is lost; anything it sends is a sign of life.

On a link of 0.5 Mbit/s, a ping waits 17 s behind a queue of 1 MiB, and its answer as long behind a queue in the other
direction.
"""
_KEEPALIVE_S = 5.0
GONE_AFTER_S = _KEEPALIVE_S + SILENCE_TIMEOUT_S
"""A peer that vanishes silently (power, cable, a stopped process) is noticed in this time; in twice that if it stops
after it has sent something else while it owes the answer to a ping."""

CHANNEL_OPTIONS = [
    # A ping after 5 s of silence; then gRPC waits for any byte, not for the answer. It sets TCP_USER_TIMEOUT to the
    # same limit. By itself it would stop after two pings without data.
    ("grpc.keepalive_time_ms", round(_KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(SILENCE_TIMEOUT_S * 1000)),
    # For a ping that is not answered although other bytes have come since; gRPC sends no other one meanwhile. What goes
    # before it and before its answer may have 6 MB (measured: at 0.5 Mbit/s with 1 MiB of queue, 50 s broke pushes).
    ("grpc.http2.ping_timeout_ms", 110_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found within a second, instead of after gRPC's backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # So is one that has a new address: by default gRPC resolves its name at most twice a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
]


def connecting_for(timeout_s: float) -> tuple[str, int]:
    """The option for how long one attempt to connect may take; gRPC's own is 20 s."""
    return "grpc.min_reconnect_backoff_ms", round(timeout_s * 1000)


# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# The most that glibc accepts on 64-bit machines.
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 32 << 20


def keep_freed_memory(one_arena: bool = False) -> None:
    """Makes this process's allocator reuse the memory of one message for the next.

    By default glibc maps each large block and unmaps it when it is freed, and the kernel clears its pages every time.
    With these thresholds glibc keeps up to 32 MiB. A round of 2 x 40 MB over TCP went from 3.9 to 3.3 times gloo's
    time. Without glibc, this does nothing.

    Args:
        one_arena: all threads share one heap, instead of keeping that much memory each. For the server, whose threads
            take turns anyway; a worker's other threads may not. With 16 workers, the server's peak went from 500 to
            340 MB, at the same speed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        if one_arena:
            mallopt(_M_ARENA_MAX, 1)
