"""The checkpoints that a job has written: of a round before it commits, and of the center as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import Center
from ps_server.checkpoints.keeper import Keeper
from ps_server.checkpoints.reading import Checkpoint
from ps_server.rules.round import Round

__all__ = ["RoundState", "Writes"]

RoundState = tuple[int, tuple[str, ...], Mapping[str, tuple[bytes, int]]]
"""Global step, contributors, and by worker the push that was counted last."""


class Writes:
    """Begins writes and says when they have ended. Used on one running event loop.

    Args:
        keeper: writes.
        center: whose buffers stay as they are meanwhile.
        round_: says who has finished.
        clock: seconds, monotonic.
        ended: called with a write's token and whether the checkpoint outlives the process.
    """

    def __init__(
        self,
        keeper: Keeper,
        center: Center,
        round_: Round,
        clock: Callable[[], float],
        ended: Callable[[int, bool], None],
    ) -> None:
        self.timeout_s = keeper.timeout_s
        """How long anybody waits for a write; None: as long as it takes."""
        self._keeper = keeper
        self._center = center
        self._round = round_
        self._clock = clock
        self._ended = ended
        self._turn = asyncio.Lock()
        self._round_over = asyncio.Event()
        self._finished: frozenset[str] | None = None  # who has, as the newest checkpoint says
        self._writing: asyncio.Task[None] | None = None

    def begin(self, token: int, buffer: Buffer, state: Callable[[], RoundState]) -> asyncio.Task[None]:
        """Begins to write a buffer, with what ``state`` returns. The task never fails."""
        with ExitStack() as reading:
            try:
                # From now on: a round that starts over before the task has begun must not write into the buffer.
                reading.enter_context(self._center.reading(buffer, Reader(self._clock())))
                told = state()
                self._writing = asyncio.ensure_future(self._write(token, buffer, reading.pop_all(), *told))
            except BaseException:
                self._ended(token, False)
                raise
        return self._writing

    async def keep(self) -> None:
        """Writes the center as it is, and who has finished, unless there is such a checkpoint.

        Returns when it outlives the process, or cannot be written."""
        async with self._turn:  # who waits here finds that the checkpoint before has it
            round_ = self._round
            while round_.prepared:
                self._round_over.clear()
                await self._round_over.wait()
            if (self._keeper.step, self._finished) == (round_.global_step, round_.finished):
                return
            state = round_.global_step, round_.contributors, round_.counted
            await asyncio.wait((self.begin(round_.begin_keeping(), self._center.current, lambda: state),))

    def round_is_over(self) -> None:
        """It has committed, or starts over."""
        self._round_over.set()

    async def _write(
        self,
        token: int,
        buffer: Buffer,
        reading: ExitStack,
        global_step: int,
        contributors: tuple[str, ...],
        counted: Mapping[str, tuple[bytes, int]],
    ) -> None:
        is_written = False
        with suppress(Exception), reading:
            finished = self._round.finished
            checkpoint = Checkpoint(
                self._center.manifest,
                buffer.arrays,
                global_step,
                contributors,
                dict(counted),
                finished,
                buffer.segment,
                self._center.outer,
                buffer.state.arrays,
            )
            is_written = await self._keeper.write(checkpoint)
            if is_written:
                self._finished = finished
        self._ended(token, is_written)
