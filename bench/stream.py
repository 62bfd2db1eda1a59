"""The throughput of a plain TCP stream over a link, for comparison with a round.

`python -m bench.stream receive ADDRESS` and `... send ADDRESS PORT SIZE_BYTES` are its two ends.
"""

from __future__ import annotations

import socket
import sys
import time

from bench.hosts import Host

__all__ = ["stream_mb_per_s"]

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0


def stream_mb_per_s(sender: Host, receiver: Host, size_bytes: int) -> float:
    """The rate, in megabytes (10^6 bytes) a second, at which this much data goes from one host to another."""
    command = [sys.executable, "-m", "bench.stream"]
    receiving = receiver.popen([*command, "receive", receiver.address])
    assert receiving.stdout is not None
    port = receiving.stdout.readline().strip()
    sender.run(*command, "send", receiver.address, port, str(size_bytes))
    return float(receiving.stdout.readline())


def _receive(address: str) -> None:
    buffer = bytearray(_CHUNK_BYTES)
    with socket.create_server((address, 0)) as server:
        server.settimeout(_TIMEOUT_S)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(_TIMEOUT_S)
        received_bytes = connection.recv_into(buffer)
        began = time.perf_counter()
        while count := connection.recv_into(buffer):
            received_bytes += count
    print(received_bytes / 1e6 / (time.perf_counter() - began))


def _send(address: str, port: int, size_bytes: int) -> None:
    with socket.create_connection((address, port), _TIMEOUT_S) as connection:
        connection.sendall(bytes(size_bytes))


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        _receive(sys.argv[2])
    else:
        _send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
