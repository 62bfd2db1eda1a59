"""Keeps the center on disk: when a checkpoint is written, and in which thread. The files are checkpoint.py's.

A round that is due for a checkpoint is answered only when its center would outlive a kill of the server; flushing to
the disk goes on behind it. A disk that fails costs durability, never a round: the server says so and serves on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modelaverage.logs import event
from ps_server import checkpoint as files
from ps_server.checkpoint import Checkpoint
from ps_server.observations import Observations

__all__ = ["CheckpointPolicy", "Keeper"]

_log = logging.getLogger("ps_server")


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where and how often.

    Args:
        directory: where checkpoints lie; it exists.
        every_rounds: one after so many rounds.
        keep: how many stay.
    """

    directory: Path
    every_rounds: int = 1
    keep: int = 3


class Keeper:
    """Writes checkpoints. Made and used on one running event loop.

    Attributes:
        step: the `global_step` of the last one that was written; None if there is none.
        written_at_s: when that was, on ``clock``.
    """

    def __init__(
        self,
        policy: CheckpointPolicy,
        observations: Observations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step: int | None = None
        self.written_at_s: float | None = None
        self._observations = Observations() if observations is None else observations
        self._clock = clock
        self._write_problem = self._flush_problem = ""
        self._policy = policy
        self._fresh: Path | None = None  # the newest, while it waits to be made durable
        self._flushing: asyncio.Task[None] | None = None
        self._removing: asyncio.Future[None] | None = None
        # Two threads: writing the next one never waits for the disk to take the last one.
        self._writer = ThreadPoolExecutor(1, "checkpoint-write")
        self._flusher = ThreadPoolExecutor(1, "checkpoint-flush")

    def is_due(self, global_step: int) -> bool:
        """Whether the center of this step gets a checkpoint."""
        return global_step % self._policy.every_rounds == 0

    @property
    def problem(self) -> str:
        """Why the last attempt to write, or to make durable, failed; empty if it did not."""
        return self._write_problem or self._flush_problem

    async def write(self, checkpoint: Checkpoint) -> None:
        """Returns when the checkpoint outlives this process, or could not be written; then `problem` says why."""
        loop, began_at_s = asyncio.get_running_loop(), self._clock()
        try:
            fresh = await loop.run_in_executor(self._writer, files.write_fresh, self._policy.directory, checkpoint)
        except OSError as error:
            self._write_problem = self._problem("checkpoint", error, self._write_problem)
            return
        self.step, self._write_problem = checkpoint.global_step, ""
        self.written_at_s = self._clock()
        self._observations.checkpoint_s.observe(self.written_at_s - began_at_s)
        overtaken, self._fresh = self._fresh, fresh
        # A disk that is slower than the rounds does not fill up with them.
        if overtaken is not None and overtaken != fresh:
            self._removing = loop.run_in_executor(self._writer, _remove, overtaken)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())

    async def finish(self) -> None:
        """Waits until what was written is durable."""
        for pending in (self._removing, self._flushing):
            if pending is not None:
                await pending

    async def _flush(self) -> None:
        """Makes the newest fresh checkpoint durable, until there is none; those that were overtaken are skipped."""
        loop = asyncio.get_running_loop()
        while (fresh := self._fresh) is not None:
            self._fresh = None
            try:
                await loop.run_in_executor(self._flusher, self._make_durable, fresh)
            except OSError as error:
                self._flush_problem = self._problem("durable checkpoint", error, self._flush_problem)
                if self._fresh is None:
                    self._fresh = fresh  # stays until the next one overtakes it
                    return
                await loop.run_in_executor(self._flusher, _remove, fresh)
            else:
                self._flush_problem = ""

    def _make_durable(self, fresh: Path) -> None:
        files.prune(files.make_durable(fresh), self._policy.keep)

    def _problem(self, missing: str, error: OSError, last: str) -> str:
        self._observations.checkpoint_failures += 1
        problem = f"no {missing} in {self._policy.directory}: {error.strerror or error}"
        if problem != last:  # once, not every round
            _log.warning(
                "%s; the server goes on, and older checkpoints stay",
                problem,
                extra=event("checkpoint_failed", path=str(self._policy.directory), cause=error.strerror or str(error)),
            )
        return problem


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
