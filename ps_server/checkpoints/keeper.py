"""Keeps the center on disk: decides when to write a checkpoint, and reports failures. The processes of
writer_process.py write the files.

A round that is due for a checkpoint is answered only when its center would survive a kill of the server; the flush to
disk follows in the background. A failing disk costs durability, never a round: the server reports the failure and
continues. A hanging disk blocks the processes that write for the server, never the server itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelaverage.logs import event
from modelaverage.runtime.shared_memory import BODY_AT_BYTES
from ps_server.checkpoints.disk_wait import DiskWait
from ps_server.checkpoints.fields import Checkpoint, boot_id, fields_of
from ps_server.checkpoints.files import fresh_name
from ps_server.checkpoints.home import CheckpointHome
from ps_server.checkpoints.safetensors_file import Layout, bytes_of, lay_out
from ps_server.checkpoints.writer import STREAMED
from ps_server.checkpoints.writer_process import Reply, WriterProcess
from ps_server.seen.observations import Observations
from ps_server.seen.snapshot import CheckpointSeen

__all__ = ["CheckpointPolicy", "Keeper"]

_log = logging.getLogger("ps_server")
# After this time the server stops waiting for a writer to start; its first checkpoint then waits for it.
_START_TIMEOUT_S = 2.0
_LOOK_AGAIN_S = 1.0
# How long a disk may take before the log reports it. Shorter for a fresh checkpoint, for which rounds wait.
_WRITE_PATIENCE_S, _FLUSH_PATIENCE_S = 5.0, 30.0


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where and how often to write checkpoints.

    Args:
        directory: the directory of the checkpoints; created if it does not exist.
        every_rounds: rounds from one checkpoint to the next.
        keep: how many durable checkpoints stay.
        timeout_s: how long a round waits for its checkpoint. Then it is answered without one, and no more are written
            until the disk has finished this one. None: no limit.
    """

    directory: Path
    every_rounds: int = 1
    keep: int = 3
    timeout_s: float | None = None


class Keeper:
    """Writes checkpoints. Used on one running event loop.

    Args:
        policy: where and how often.
        home: the open directory.
        observations: records how long writes take.
        clock: seconds, monotonic.

    Raises:
        OSError, RuntimeError: the writers cannot be started.

    Attributes:
        step: the `global_step` of the last checkpoint written; None if there is none.
        written_at_s: when it was written, on ``clock``.
    """

    def __init__(
        self,
        policy: CheckpointPolicy,
        home: CheckpointHome,
        observations: Observations | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step: int | None = None
        self.written_at_s: float | None = None
        self._policy = policy
        self._home = home
        self._observations = Observations() if observations is None else observations
        self._clock = clock
        self._boot_id = boot_id()
        self._write_problem = self._flush_problem = ""
        self._closed = False
        self._turn = asyncio.Lock()  # held while a fresh checkpoint is written
        self._writing: DiskWait | None = None
        self._flushing: DiskWait | None = None
        self._fresh: tuple[str, int] | None = None  # newest one not yet durable, and its step
        self._removing: Future[Reply] | None = None
        self._flush_task: asyncio.Task[None] | None = None
        # Two processes, so that writing a checkpoint never waits for the previous flush.
        self._writer = WriterProcess("checkpoint-write")
        try:
            self._flusher = WriterProcess("checkpoint-flush")
        except BaseException:
            self._writer.close()
            raise
        started = list[Future[Reply]]()
        try:
            started.append(self._command(self._flusher, "start"))
            started.append(self._command(self._writer, "tidy"))
            for one in started:
                with suppress(futures.TimeoutError):
                    one.result(_START_TIMEOUT_S)
        except BaseException:
            self.close()
            # A process that is being started has copies of the directory's locks for a moment.
            futures.wait(started, _START_TIMEOUT_S)
            raise

    @property
    def every_rounds(self) -> int:
        """A checkpoint is due at each multiple of this many rounds."""
        return self._policy.every_rounds

    @property
    def timeout_s(self) -> float | None:
        """How long a round waits for its checkpoint; None: no limit."""
        return self._policy.timeout_s

    @property
    def writing_since_s(self) -> float | None:
        """Since when, on ``clock``, a checkpoint is being written; None: no write is in progress."""
        return None if self._writing is None else self._writing.since_s

    @property
    def problem(self) -> str:
        """The current wait for the disk, or why the last write or flush failed; empty if there is no problem."""
        writing = "" if self._writing is None else self._writing.problem
        flushing = "" if self._flushing is None else self._flushing.problem
        return writing or self._write_problem or flushing or self._flush_problem

    def seen(self) -> CheckpointSeen:
        """The checkpoint part of the status."""
        return CheckpointSeen(self.problem, self.step, self.written_at_s, self.writing_since_s)

    async def write(self, checkpoint: Checkpoint) -> bool:
        """Writes a checkpoint. Returns whether it outlives this process; if not, `problem` says why.

        This may never return. Until it does, the arrays must not change, even if the caller no longer waits.
        """
        try:
            async with self._turn:
                await self._write_fresh(checkpoint)
        except Exception as error:
            self._write_problem = self._failed("checkpoint", error, self._write_problem)
            return False
        return True

    async def finish(self, timeout_s: float) -> None:
        """Waits up to ``timeout_s`` until all written checkpoints are durable. Logs those that are not."""
        try:
            await asyncio.wait_for(self._settled(), timeout_s)
        except Exception:  # timeout, or no memory for the wait
            self._give_up()

    def _give_up(self) -> None:
        wait = self._writing or self._flushing
        try:
            if wait is not None:
                wait.give_up()
        except Exception:
            return  # even logging failed

    def close(self) -> None:
        """Ends the writer processes at once. A hanging disk may keep the processes alive, but no caller waits any
        longer."""
        self._closed = True
        for process in (self._writer, self._flusher):
            process.close()

    async def _settled(self) -> None:
        """Returns when no write and no flush is in progress."""
        async with self._turn:
            if self._removing is not None:
                with suppress(Exception):
                    await _done(self._removing)
        if self._fresh is not None:
            self._begin_to_flush()
        if self._flush_task is not None:
            await asyncio.wait((self._flush_task,))

    # Fresh checkpoints.

    async def _write_fresh(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.global_step
        wait = self._writing = DiskWait(
            "checkpoint", step, self._policy.directory, _WRITE_PATIENCE_S, self._meanwhile, self._clock
        )
        is_written = False
        try:
            self._check(await _done(self._writer.submit(partial(self._send, checkpoint))))
            is_written = True
        finally:
            self._writing = None
            wait.end(is_written)
        self.step, self._write_problem = step, ""
        self.written_at_s = self._clock()
        self._observations.checkpoint_s.observe(self.written_at_s - wait.since_s)
        overtaken, self._fresh = self._fresh, (fresh_name(step), step)
        # A disk that is slower than the rounds must not fill up with fresh checkpoints.
        if overtaken is not None and overtaken != self._fresh:
            self._removing = self._command(self._writer, "remove", overtaken[0])
        self._begin_to_flush()

    def _send(self, checkpoint: Checkpoint) -> Reply:
        """Runs in the writer's thread: has the process write the checkpoint."""
        tensors = checkpoint.tensors
        layout = lay_out(tensors, fields_of(checkpoint, self._boot_id))
        ranges, streamed = _sources(checkpoint, layout, tensors)
        request = ("write", self._home.path, fresh_name(checkpoint.global_step), layout.head, ranges)
        descriptors = [self._home.descriptor]
        if checkpoint.segment is not None:
            descriptors.append(checkpoint.segment.descriptor)
        return self._writer.ask(request, descriptors, map(bytes_of, streamed))

    @property
    def _meanwhile(self) -> str:
        timeout_s = self._policy.timeout_s
        if timeout_s is None:
            return "its round is answered when it is written (--checkpoint-timeout-s sets a limit)"
        return f"rounds are answered {timeout_s:g} s after they commit (--checkpoint-timeout-s), without checkpoints"

    # Durable checkpoints.

    def _begin_to_flush(self) -> None:
        if self._flush_task is None or self._flush_task.done():
            self._flush_task = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        """Makes the newest fresh checkpoint durable until none is left; skips those that a newer one replaced."""
        while (fresh := self._fresh) is not None:
            self._fresh = None
            try:
                await self._flush_one(*fresh)
            except Exception as error:
                self._flush_problem = self._failed("durable checkpoint", error, self._flush_problem)
                if self._fresh is None:
                    self._fresh = fresh  # stays until a newer one replaces it
                    return
                self._command(self._flusher, "remove", fresh[0])
            else:
                self._flush_problem = ""

    async def _flush_one(self, name: str, step: int) -> None:
        meanwhile = "it is lost if the machine goes down; rounds go on"
        wait = self._flushing = DiskWait(
            "durable checkpoint", step, self._policy.directory, _FLUSH_PATIENCE_S, meanwhile, self._clock
        )
        is_written = False
        try:
            self._check(await _done(self._command(self._flusher, "flush", name, self._policy.keep)))
            is_written = True
        finally:
            self._flushing = None
            wait.end(is_written)

    # Both.

    def _command(self, process: WriterProcess, name: str, *arguments: object) -> Future[Reply]:
        return process.submit(partial(process.ask, (name, *arguments), (self._home.descriptor,)))

    def _check(self, reply: Reply) -> None:
        """Raises OSError unless the command was carried out."""
        if reply.made is not None:
            self._home.move(*reply.made)
            _log.warning(
                "%s was removed; it is made again, and older checkpoints are gone",
                self._policy.directory,
                extra=event("checkpoint_directory_made", path=str(self._policy.directory)),
            )
        if reply.error is not None:
            raise reply.error

    def _failed(self, missing: str, error: Exception, last: str) -> str:
        self._observations.checkpoint_failures += 1
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        problem = f"no {missing} in {self._policy.directory}: {cause}"
        if problem != last and not self._closed:  # log it once, not every round
            _log.warning(
                "%s; the server goes on, and older checkpoints stay",
                problem,
                extra=event("checkpoint_failed", path=str(self._policy.directory), cause=cause),
            )
        return problem


async def _done(command: Future[Reply]) -> Reply:
    """Returns or raises what the writer's thread does."""
    # The thread wakes this task. If that fails for lack of memory, the task notices by polling.
    waking = asyncio.wrap_future(command)
    try:
        while not waking.done() and not command.done():
            await asyncio.wait((waking,), timeout=_LOOK_AGAIN_S)
    except asyncio.CancelledError:
        waking.cancel()  # the loop ends and must not be woken
        raise
    return waking.result() if waking.done() else command.result()


def _sources(
    checkpoint: Checkpoint, layout: Layout, tensors: Mapping[str, NDArray[Any]]
) -> tuple[list[tuple[int, int]], list[NDArray[Any]]]:
    """The sources of the bytes of the file's body, in order: ranges of the segment, or `STREAMED` and a number of bytes
    of the stream; and the arrays that are streamed."""
    begins = dict[str, int]()
    if checkpoint.segment is not None:
        begins = dict(zip(checkpoint.arrays, checkpoint.manifest.offsets_bytes, strict=True))
    ranges, streamed = list[tuple[int, int]](), list[NDArray[Any]]()
    for name in layout.names:
        array = tensors[name]
        if name not in begins:
            streamed.append(array)
            if ranges and ranges[-1][0] == STREAMED:
                ranges[-1] = STREAMED, ranges[-1][1] + array.nbytes
            else:
                ranges.append((STREAMED, array.nbytes))
            continue
        begin = BODY_AT_BYTES + begins[name]
        end = begin + array.nbytes
        if ranges and ranges[-1][1] == begin and ranges[-1][0] != STREAMED:
            ranges[-1] = ranges[-1][0], end
        else:
            ranges.append((begin, end))
    return ranges, streamed
