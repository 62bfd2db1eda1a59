"""Memory that the server lends to workers on its host. It changes only where bytes lie, not the protocol.

The server creates every segment: anonymous (a memfd, which vanishes with the server, however it ends) and sealed
against shrinking (so that no process that maps it can be made to crash). It tells a client the segment's path under
/proc and the random nonce at its beginning. A client that cannot open the path (another user, host or container), or
that finds another nonce there, sends its bytes inline.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BODY_AT_BYTES", "NONCE_BYTES", "Segment", "SegmentAddress"]

NONCE_BYTES = 16
# Nonce, generation, and padding to a page, so that the body is aligned.
BODY_AT_BYTES = 4096
_GENERATION_AT = NONCE_BYTES
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module does not name it


@dataclass(frozen=True)
class SegmentAddress:
    """How a client finds a segment.

    Args:
        path: under /proc.
        nonce: the bytes at its beginning.
    """

    path: str
    nonce: bytes


class Segment:
    """A mapped segment.

    Attributes:
        body: its memory, uint8; writable for the server, and for a client that opened it to write.
    """

    def __init__(self, descriptor: int, size_bytes: int, writable: bool) -> None:
        self._map = mmap.mmap(
            descriptor, BODY_AT_BYTES + size_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        )
        everything = np.frombuffer(self._map, np.uint8)
        self.body: NDArray[np.uint8] = everything[BODY_AT_BYTES:]
        self._nonce = everything[:NONCE_BYTES]
        self._generation = everything[_GENERATION_AT : _GENERATION_AT + 8].view("<u8")
        self._descriptor = -1

    @classmethod
    def create(cls, size_bytes: int, for_clients_to_write: bool) -> Segment:
        """A new segment of zeros.

        Raises:
            OSError: the system has no such memory, or not enough of it.
        """
        if sys.platform != "linux":
            raise OSError("shared memory needs Linux's memfd")
        # The name is for readers of /proc/PID/smaps, where these pages show up for every process that maps them.
        name = "modelaverage-contribution" if for_clients_to_write else "modelaverage-center"
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, BODY_AT_BYTES + size_bytes)
            segment = cls(descriptor, size_bytes, writable=True)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            # The existing mapping stays writable; this seal prevents further writable ones.
            seals |= 0 if for_clients_to_write else _F_SEAL_FUTURE_WRITE
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(descriptor)
            raise
        segment._nonce[:] = np.frombuffer(secrets.token_bytes(NONCE_BYTES), np.uint8)
        segment._descriptor = descriptor
        return segment

    @classmethod
    def open(cls, address: SegmentAddress, size_bytes: int, writable: bool) -> Segment | None:
        """Opens the server's segment at ``address``; None if that is not possible."""
        if sys.platform != "linux" or not address.path.startswith("/proc/"):
            return None
        try:
            descriptor = os.open(address.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK or os.fstat(descriptor).st_size != BODY_AT_BYTES + size_bytes:
                return None
            segment = cls(descriptor, size_bytes, writable)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)
        return segment if secrets.compare_digest(segment._nonce.tobytes(), address.nonce) else None

    @property
    def address(self) -> SegmentAddress:
        """How clients find it. Only in the process that created it."""
        return SegmentAddress(f"/proc/{os.getpid()}/fd/{self._descriptor}", self._nonce.tobytes())

    @property
    def descriptor(self) -> int:
        """The file that holds it, with `body` at `BODY_AT_BYTES`. Only in the process that created it."""
        return self._descriptor

    @property
    def generation(self) -> int:
        """A number that changes when the body's content is about to change."""
        return int(self._generation[0])

    def retire(self) -> None:
        """Tells readers that the body's content is about to change."""
        self._generation[0] += 1

    def __del__(self) -> None:
        # The mapping lives as long as arrays in it; the descriptor exists only for other processes to open.
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)
