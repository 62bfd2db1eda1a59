"""Processes that are ranks of torch.distributed and run what a test gives them, for tests of worker groups.

Starting them takes seconds, so that all tests share them: two workers of two ranks each. They are forks of a process
that has imported torch for all of them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Rank", "Ranks", "started_ranks"]

RANKS_PER_WORKER = 2
WORKERS = 2
_TIMEOUT_S = 120.0
_IMPORTED = ["tests.groups.test_rounds", "tests.groups.test_training"]


@dataclass(frozen=True)
class Rank:
    """What a rank knows about its place.

    Args:
        worker: index of its worker.
        rank: in the group of its worker.
        group: of its worker.
    """

    worker: int
    rank: int
    group: dist.ProcessGroup

    @property
    def is_leader(self) -> bool:
        return self.rank == 0


class Ranks:
    """Running ranks.

    Args:
        pipes: to each, in order.
    """

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def run(self, function: Callable[..., Any], *arguments: Any, workers: int = WORKERS) -> list[Any]:
        """What ``function(rank, *arguments)`` returns in each rank of the first ``workers`` workers. The function is
        importable. An error of a rank fails the test, with the rank's traceback."""
        pipes = list(self._pipes[: workers * RANKS_PER_WORKER])
        for pipe in pipes:
            pipe.send((function, arguments))
        found: dict[Connection, Any] = {}
        while len(found) < len(pipes):
            ready = wait([pipe for pipe in pipes if pipe not in found], _TIMEOUT_S)
            if not ready:
                missing = [index for index, pipe in enumerate(pipes) if pipe not in found]
                raise AssertionError(f"ranks {missing} have not ended after {_TIMEOUT_S:g} s")
            for pipe in [each for each in pipes if each in ready]:
                value, error = pipe.recv()
                assert error is None, error
                found[pipe] = value
        return [found[pipe] for pipe in pipes]


@contextlib.contextmanager
def started_ranks(directory: Path) -> Iterator[Ranks]:
    """Ranks that run during this context.

    Args:
        directory: empty; they meet there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    pipes, processes = list[Connection](), []
    try:
        for rank in range(WORKERS * RANKS_PER_WORKER):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, str(directory / "meeting")), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        yield Ranks(pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS * RANKS_PER_WORKER)
    worker, own_rank = divmod(rank, RANKS_PER_WORKER)
    group, _ = dist.new_subgroups(RANKS_PER_WORKER)  # type: ignore[no-untyped-call]
    assert group is not None
    own = Rank(worker, own_rank, group)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            faulthandler.dump_traceback_later(_TIMEOUT_S - 5)  # says where a rank hangs
            try:
                pipe.send((function(own, *arguments), None))
            except BaseException:
                pipe.send((None, f"worker {worker}, rank {own_rank}:\n{traceback.format_exc()}"))
            finally:
                faulthandler.cancel_dump_traceback_later()
