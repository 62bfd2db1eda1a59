"""Processes that are forked from a worker, such as torch's DataLoader workers: they print nothing of gRPC's, and cannot
harm the session of the process that they come from.

By default gRPC stops its threads before a fork and starts them again in both processes. If another thread begins a call
meanwhile, that call may hang (1.85: one of 3,000 forks on a busy machine). Without these handlers a fork leaves the
calls of its process alone, but the new process cannot use gRPC: it lacks the threads. gRPC reads its settings when it
is imported, so this module comes before everything that imports it; who imports grpc first sets them for themselves.
"""

from __future__ import annotations

import os

from modelaverage.errors import ModelAverageError

__all__ = ["OwnProcess", "check_not_forked"]

_SETTINGS = {"GRPC_VERBOSITY": "ERROR", "GRPC_ENABLE_FORK_SUPPORT": "0"}
_added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
_has_fork_support = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "").lower() in ("1", "t", "true", "y", "yes")
_used_by: int | None = None  # the first process that used gRPC through this package

# Only meanwhile: other programs that this one starts are none of our business.
os.environ.update(_added)
try:
    import grpc  # noqa: F401
finally:
    for _name in _added:
        os.environ.pop(_name, None)


def check_not_forked() -> None:
    """Called before gRPC is used. Raises ModelAverageError: this process was forked from one that has used it."""
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid() and not _has_fork_support:
        raise ModelAverageError(
            f"this process was forked from process {_used_by}, which calls parameter servers: gRPC does not work in "
            'it; start it with multiprocessing\'s "spawn" or "forkserver", or before the first session is opened '
            "there"
        )


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
