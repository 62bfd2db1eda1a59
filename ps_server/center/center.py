"""The center variables: the center in force, the next one in the making, and the commit that swaps them.

Readers see the current center. The round in progress makes its sums in the other buffer, divides them there, lets the
outer optimizer make the next center of them, and a commit swaps the two. So no reader meets a half-made center, nothing
has changed if a round starts over, and memory is twice the model (and the optimizer's state) however many workers there
are. A buffer that still has readers is left to them, and a fresh one takes its place; at most two old ones are kept,
then the slowest readers are ended.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW
from modelaverage.errors import Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.outer import AVERAGE, OuterOptimizer
from ps_server.center.outer.base import MASTER, Values, summed_in
from ps_server.center.state import OuterState
from ps_server.center.sums import Contribution, Sums
from ps_server.machine.reserve import Reserve
from ps_server.machine.threads import started_pool

__all__ = ["Center", "Finish", "MAX_OLD_BUFFERS"]

_T = TypeVar("_T")
_THREADS = min(4, os.cpu_count() or 1)
MAX_OLD_BUFFERS = 2
"""How many old centers are kept for their readers."""


@dataclass(frozen=True)
class Finish:
    """All contributions to a fragment are there.

    Args:
        index: which fragment.
        total_weight: what to divide its sum by. 0: there is no sum, and the whole fragment stays as it is.
        untouched: indexes of the variables that keep the bytes of the center, and their state.
        steps: whether the outer optimizer makes its step. False: the average becomes the center, the state stays.
    """

    index: int
    total_weight: float
    untouched: frozenset[int] = frozenset()
    steps: bool = True


class Center:
    """The center variables and the next center in the making.

    Args:
        manifest: what the center variables are; all are zero until `load` has set every fragment.
        shared: whether buffers lie in shared memory. Raises OSError if the system has none.
        reserve: descriptors for that memory, should the system have no others.
        outer: what makes the next center of this one and an average.

    Attributes:
        current: the center in force.
        next: where the round in progress makes the next one.
    """

    def __init__(
        self,
        manifest: Manifest,
        shared: bool = False,
        reserve: Reserve | None = None,
        outer: OuterOptimizer = AVERAGE,
    ) -> None:
        self.manifest = manifest
        self.outer = outer
        self._shared = shared
        self._reserve = Reserve(0) if reserve is None else reserve
        self.current = self._new_buffer()
        self.next = self._new_buffer()
        self._old: list[Buffer] = []  # those that still have readers
        self._sums = Sums(manifest)
        self._threads: ThreadPoolExecutor | None = None

    @staticmethod
    def memory_bytes(manifest: Manifest, outer: OuterOptimizer = AVERAGE) -> int:
        """What a center of this manifest needs: two buffers, the outer optimizer's state of both, and the sums."""
        buffer_bytes = manifest.buffer_size_bytes + OuterState.memory_bytes(manifest, outer)
        return 2 * buffer_bytes + Sums.memory_bytes(manifest)

    # A center that is given.

    def load(self, index: int, data: memoryview) -> None:
        """Sets a fragment of the current center; its state begins. Raises ProtocolError (FRAGMENT_SIZE_WRONG)."""
        RAW.check_size(self.manifest, index, data)
        values = RAW.decode(self.manifest, index, data)
        for part, given, state in zip(self.current.parts[index], values, self.current.state.pieces(index), strict=True):
            part[...] = given
            if state:
                exact = given.astype(summed_in(given.dtype))
                _store(state, self.outer.init(exact), exact)

    def load_arrays(
        self,
        arrays: Mapping[str, NDArray[np.generic]],
        state: Mapping[str, Mapping[str, NDArray[np.generic]]],
    ) -> None:
        """Sets the current center and its state, both by name and of the right shapes and dtypes; see `OuterState`."""
        for name, array in self.current.arrays.items():
            array[...] = arrays[name]
        self.current.state.load(state)

    # A round.

    def accumulate(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """Adds a contribution to the sum of fragment ``index``, or starts the sum with it; see `Sums.accumulate`."""
        return self._sums.accumulate(self.next, index, contribution, first)

    def defer(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """As `accumulate`, for bytes that stay where they are until the round is over; see `Sums.defer`."""
        return self._sums.defer(self.next, index, contribution, first)

    def finish(self, finishes: Sequence[Finish], step: int = 0) -> Counter[str]:
        """Turns the sums of these fragments into those of the next center.

        Args:
            finishes: which fragments, and how.
            step: the ``global_step`` that the round started from.

        Returns:
            By worker id, how many of the values that are summed only now were not finite.
        """
        threads = None if len(finishes) == 1 else self._running_threads()
        if threads is None:
            return self._finish(finishes, step)
        # One stretch a thread: handing over every fragment by itself costs as much as summing it.
        stretch = math.ceil(len(finishes) / _THREADS)
        working = list[Future[Counter[str]]]()
        try:
            for start in range(0, len(finishes), stretch):
                working += [threads.submit(self._finish, finishes[start : start + stretch], step)]
        finally:
            _wait_for(working)
        return sum((work.result() for work in working), Counter[str]())

    def restart(self) -> None:
        """The round starts over: what was summed or finished is void.

        Raises:
            OSError, MemoryError: its average is on its way to the disk, and there is no room for another one.
        """
        self._sums.clear()
        if any(reader.end is None for reader in self.next.readers):
            room = self._new_buffer()
            self._old, self.next = [*self._old, self.next], room

    @contextmanager
    def reading(self, buffer: Buffer, reader: Reader) -> Iterator[None]:
        """As long as the context lives, no later round writes into this buffer, unless the reader is ended."""
        buffer.readers.add(reader)
        try:
            yield
        finally:
            buffer.readers.discard(reader)
            if not buffer.readers:
                self._old = [old for old in self._old if old is not buffer]

    def room(self, now_s: float) -> Buffer:
        """A buffer for the round after the next commit. Changes nothing, except that the slowest readers are ended with
        READER_TOO_SLOW if there are too many old buffers.

        Raises:
            OSError, MemoryError: the system has none, and the readers of the old ones cannot be ended.
        """
        if not self.current.in_use:
            return self.current
        old = [*self._old, self.current]
        if len(old) <= MAX_OLD_BUFFERS:
            try:
                return self._new_buffer()
            except (OSError, MemoryError):
                if all(math.isinf(buffer.pace(now_s)) for buffer in old):
                    raise
        slowest = min(old, key=lambda buffer: buffer.pace(now_s))
        if math.isinf(slowest.pace(now_s)):
            return self._new_buffer()
        error = refusal(
            Reason.READER_TOO_SLOW,
            f"this center was read at {slowest.pace(now_s):.0f} bytes a second, and the server needs its memory for "
            "new rounds; call again for the present one",
        )
        for reader in slowest.readers:
            assert reader.end is not None
            reader.end(error)
        slowest.readers.clear()
        return slowest

    def commit(self, room: Buffer, then: Callable[[], _T]) -> _T:
        """The next buffer, whose fragments are all finished, becomes the center. Returns what ``then`` returns.

        Args:
            room: what `room` has returned: where the round after this one adds.
            then: what has to happen together with it. If it raises, the center is what it was.
        """
        old = [buffer for buffer in (*self._old, self.current) if buffer is not room and buffer.in_use]
        room.retire()
        before = self.current, self.next, self._old
        self.current, self.next, self._old = self.next, room, old
        try:
            return then()
        except BaseException:
            self.current, self.next, self._old = before
            raise

    # How it is done.

    def _new_buffer(self) -> Buffer:
        if not self._shared:
            return Buffer(self.manifest, None, self.outer)
        size_bytes = self.manifest.buffer_size_bytes
        create = functools.partial(Segment.create, size_bytes, for_clients_to_write=False)
        return Buffer(self.manifest, self._reserve.open(create), self.outer)

    def _running_threads(self) -> ThreadPoolExecutor | None:
        """Threads that share the work; None: the system has no more of them."""
        if self._threads is None:
            with suppress(RuntimeError, MemoryError):
                self._threads = started_pool(_THREADS, "center")
        return self._threads

    def _finish(self, finishes: Sequence[Finish], step: int) -> Counter[str]:
        return sum((self._finish_one(finish, step) for finish in finishes), Counter[str]())

    def _finish_one(self, finish: Finish, step: int) -> Counter[str]:
        index, pieces = finish.index, self.manifest.pieces[finish.index]
        with np.errstate(all="ignore"):
            if finish.total_weight == 0.0:
                nonfinite, kept = Counter[str](), frozenset(piece.variable for piece in pieces)
            else:
                kept = finish.untouched
                nonfinite = self._sums.average(self.next, index, finish.total_weight, but=kept)
            for piece, average, center, out, state, next_state in zip(
                pieces,
                self._sums.of(self.next, index),
                self.current.parts[index],
                self.next.parts[index],
                self.current.state.pieces(index),
                self.next.state.pieces(index),
                strict=True,
            ):
                exact, slots = average, state
                if piece.variable in kept:
                    exact = state.get(MASTER, center)
                    out[...] = center
                else:
                    if finish.steps:
                        exact, slots = self.outer.update(state.get(MASTER, center), average, state, step)
                    if exact is not out:
                        out[...] = exact
                if next_state:
                    _store(next_state, slots, exact)
        return nonfinite


def _store(into: Mapping[str, Values], slots: Mapping[str, Values], exact: Values) -> None:
    """Copies what is kept for a piece whose center is ``exact``, before it is rounded."""
    for slot, array in into.items():
        array[...] = exact if slot == MASTER else slots[slot]


def _wait_for(working: Sequence[Future[Any]]) -> None:
    """Returns when no thread writes into the average any more; a wait that fails is made again."""
    while True:
        try:
            wait(working)
        except Exception:  # it needs a little memory
            continue
        return
