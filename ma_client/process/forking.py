"""Processes that are forked from a worker, such as torch's DataLoader workers: they print nothing of gRPC's, and cannot
harm the session of the process that they come from.

gRPC remarks on every fork while it is called in another thread. It reads its settings when it is imported, so this
module comes before everything that imports it; who imports grpc first sets GRPC_VERBOSITY=ERROR for themselves.
"""

from __future__ import annotations

import os

from modelaverage.errors import ModelAverageError

__all__ = ["OwnProcess"]

_VERBOSITY = "GRPC_VERBOSITY"

if _VERBOSITY in os.environ:
    import grpc
else:
    # Only meanwhile: other programs that this one starts are none of our business.
    os.environ.setdefault(_VERBOSITY, "ERROR")
    try:
        import grpc  # noqa: F401
    finally:
        os.environ.pop(_VERBOSITY)


class OwnProcess:
    """The process that something belongs to: the one that makes this object. A forked one has copies of connections and
    none of the threads that serve them: to close them there would break them for both."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether it is this one."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises ModelAverageError if it is another one."""
        if not self.is_this:
            raise ModelAverageError(
                f"this session belongs to process {self._pid}, and this is process {os.getpid()}, forked from it: they "
                "cannot share its connections; open a session here, under another worker id, or call it there"
            )
