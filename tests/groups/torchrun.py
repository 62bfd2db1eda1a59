"""Workers that torchrun starts, several processes each."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.launched import Launched

__all__ = ["ROOT", "kill_rank", "torchrun"]

ROOT = Path(__file__).parent.parent.parent


def torchrun(
    index: int | None, address: str, *script: str, flags: Sequence[str] = ("--standalone",), processes: int = 2
) -> Launched:
    """A worker whose processes are started by torchrun.

    Args:
        index: of the worker, of two; None: torchrun says it.
        address: of the server.
        script: with its arguments.
        flags: of torchrun.
        processes: of the worker.
    """
    command = ["-m", "torch.distributed.run", *flags, "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    # Otherwise a restarted process may read the address of one that has died (pytorch#135712): docs/groups.md.
    cluster = {"MA_PS_HOSTS": address, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if index is not None:
        cluster |= {"MA_NUM_WORKERS": "2", "MA_TASK_INDEX": str(index)}
    return Launched([*command, *script], cwd=ROOT, environ=cluster)


def kill_rank(launched: Launched, rank: int) -> None:
    """SIGKILL for one rank of a worker that is running."""
    for pid in launched.descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"LOCAL_RANK=%d" % rank in environ:
                os.kill(pid, signal.SIGKILL)
                return
    raise AssertionError(f"no process of rank {rank} is running")
