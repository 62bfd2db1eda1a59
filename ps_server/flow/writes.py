"""The checkpoints of a job: of a round before it commits, and of the current center."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from modelaverage.logs import event
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.center import Center
from ps_server.checkpoints.keeper import Keeper
from ps_server.checkpoints.reading import Checkpoint
from ps_server.machine.trouble import describe
from ps_server.rules.round import Round

__all__ = ["RoundState", "Writes"]

_log = logging.getLogger("ps_server")
RoundState = tuple[int, tuple[str, ...], Mapping[str, tuple[bytes, int]]]
"""Global step, contributors, and the last counted push of each worker."""


class Writes:
    """Begins writes and reports their end. Used on one running event loop.

    Args:
        keeper: writes the checkpoints.
        center: its buffers must not change during a write.
        round_: knows the finished workers.
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
        """How long a round or call waits for a write; None: no limit."""
        self.last_token = 0
        """Of the writes that have begun."""
        self.under_way = set[int]()
        """The tokens of those that have not ended."""
        self._keeper = keeper
        self._center = center
        self._round = round_
        self._clock = clock
        self._ended = ended
        self._turn = asyncio.Lock()
        self._round_over = asyncio.Event()
        self._finished: frozenset[str] | None = None  # finished workers in the newest checkpoint
        self._writing: asyncio.Task[None] | None = None

    @property
    def newest_step(self) -> int | None:
        """The `global_step` of the newest checkpoint; None: there is none."""
        return self._keeper.step

    def begin(self, token: int, buffer: Buffer, state: Callable[[], RoundState]) -> asyncio.Task[None]:
        """Begins to write a buffer and the state that ``state`` returns. The task never fails."""
        with ExitStack() as reading:
            try:
                # Held from now on: a round that starts over before the task runs must not write into the buffer.
                reading.enter_context(self._center.reading(buffer, Reader(self._clock())))
                told = state()
                self._writing = asyncio.ensure_future(self._write(token, buffer, reading.pop_all(), *told))
                self.last_token = token
                self.under_way.add(token)
            except BaseException:
                self._round.kept(token, False, self._clock())  # the round starts over: whatever follows is void
                raise
        return self._writing

    async def keep(self) -> None:
        """Writes the current center and the finished workers, unless a checkpoint has them.

        Returns when the checkpoint outlives the process or cannot be written."""
        async with self._turn:  # a later caller finds that the checkpoint already exists
            round_ = self._round
            while round_.prepared:
                self._round_over.clear()
                await self._round_over.wait()
            if (self._keeper.step, self._finished) == (round_.global_step, round_.finished):
                return
            state = round_.global_step, round_.contributors, round_.counted
            await asyncio.wait((self.begin(round_.begin_keeping(), self._center.current, lambda: state),))

    def round_is_over(self) -> None:
        """The round has committed or starts over."""
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
        is_written, refused = False, None
        try:
            with reading:
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
                    self._center.codec,
                    buffer.center_id,
                )
                is_written = await self._keeper.write(checkpoint)
                if is_written:
                    self._finished = finished
        except Exception as error:  # the machine refused something: the round goes on without a checkpoint
            refused = error
        self.under_way.discard(token)
        self._ended(token, is_written)
        if refused is not None:  # last: nothing that waits depends on the log
            what = event("checkpoint_failed", path="", cause=describe(refused))
            _log.warning("no checkpoint of global_step %d: %s", global_step, describe(refused), extra=what)
