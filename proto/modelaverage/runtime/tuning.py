"""Settings of the allocator and of gRPC that server and client share, each with its reason and its measured effect.

Not set, because three alternating runs showed no effect beyond the noise of 5 %: HTTP/2 frames of 1 or 4 MiB, a
lookahead of 1 MiB, read chunks of 64 or 256 KiB (docs/decisions/0011).
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["CHANNEL_OPTIONS", "GONE_AFTER_S", "SILENCE_TIMEOUT_S", "connecting_for", "keep_freed_memory"]

SILENCE_TIMEOUT_S = 50.0
"""A peer of which nothing comes for longer, though something should, is lost; whatever it sends is a sign of life.

On a link of 0.5 Mbit/s a ping waits 17 s behind a queue of 1 MiB, and its answer as long again behind that of the other
way.
"""
_KEEPALIVE_S = 5.0
GONE_AFTER_S = _KEEPALIVE_S + SILENCE_TIMEOUT_S
"""A peer that is gone without a word (power, cable, a stopped process) is noticed in this time; only one that stands
still while it owes the answer to a ping, and has sent something else since, in twice that."""

CHANNEL_OPTIONS = [
    # A ping after 5 s of silence; then gRPC waits for any byte, not for the answer. It sets TCP_USER_TIMEOUT to the
    # same limit. By itself it would stop after two pings without data.
    ("grpc.keepalive_time_ms", round(_KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", round(SILENCE_TIMEOUT_S * 1000)),
    # For a ping that is not answered although other bytes have come since; gRPC sends no other one meanwhile. What goes
    # before it and before its answer may have 6 MB (measured: at 0.5 Mbit/s with 1 MiB of queue, 50 s broke pushes).
    ("grpc.http2.ping_timeout_ms", 110_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that was killed and started again is found within a second, not with gRPC's backoff of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # One that has another address by then as well: gRPC would look its name up twice a minute at most.
    ("grpc.dns_min_time_between_resolutions_ms", 500),
]


def connecting_for(timeout_s: float) -> tuple[str, int]:
    """The option for how long one attempt to connect may take; gRPC's own is 20 s."""
    return "grpc.min_reconnect_backoff_ms", round(timeout_s * 1000)


# glibc's names and numbers of them (malloc.h).
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# The most that glibc accepts on 64-bit machines.
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = 32 << 20


def keep_freed_memory(one_arena: bool = False) -> None:
    """Lets this process's allocator keep the memory of a message that is done for the next one.

    By default glibc maps every large block anew and gives it back when it is freed, and the kernel clears each page
    again; with these thresholds it keeps up to 32 MiB. A round of 2 x 40 MB over TCP went from 3.9 to 3.3 times gloo's
    time. Elsewhere than with glibc, nothing happens.

    Args:
        one_arena: all threads share one heap, instead of keeping so much in one of their own each. For the server,
            whose threads take turns anyway; a worker's other threads may not. With 16 workers it took the server's peak
            from 500 to 340 MB, at the same speed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
        if one_arena:
            mallopt(_M_ARENA_MAX, 1)
