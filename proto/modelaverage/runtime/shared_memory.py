"""Memory that the server lends to workers on its own host. It is only where bytes lie; the protocol stays the same.

The server makes every segment: anonymous (a memfd, so nothing is left behind however the server ends) and sealed
against shrinking (so nobody who has it mapped can be made to crash). It tells a client the segment's path under /proc
and a random nonce that stands at its beginning. A client that cannot open the path (another user, another host, another
container) or finds another nonce there sends its bytes inline instead.
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
# nonce, generation, and room up to a page so that what follows is aligned.
BODY_AT_BYTES = 4096
_GENERATION_AT = NONCE_BYTES
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module does not name it


@dataclass(frozen=True)
class SegmentAddress:
    """How a client finds a segment.

    Args:
        path: where to open it, under /proc.
        nonce: what has to stand at its beginning.
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
            OSError: the system has no such memory, or not so much of it.
        """
        if sys.platform != "linux":
            raise OSError("shared memory needs Linux's memfd")
        # The name is for people who read /proc/PID/smaps: these pages show up in every process that has them mapped.
        name = "modelaverage-contribution" if for_clients_to_write else "modelaverage-center"
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, BODY_AT_BYTES + size_bytes)
            segment = cls(descriptor, size_bytes, writable=True)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            # Our own mapping stays writable; with this seal nobody can make another one that is.
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
        """The server's segment at ``address``; None if there is none that can be used."""
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
        """How clients find it; for the process that created it."""
        return SegmentAddress(f"/proc/{os.getpid()}/fd/{self._descriptor}", self._nonce.tobytes())

    @property
    def descriptor(self) -> int:
        """The file behind it, whose `body` begins at `BODY_AT_BYTES`; for the process that created it."""
        return self._descriptor

    @property
    def generation(self) -> int:
        """Changes when what the body holds stops being what it was."""
        return int(self._generation[0])

    def retire(self) -> None:
        """Tells readers that what the body holds is about to change."""
        self._generation[0] += 1

    def __del__(self) -> None:
        # The mapping lives as long as arrays into it do; the descriptor is only there to be opened by others.
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)
