"""The center variables: the current center, the next one, and the commit that swaps them.

Readers see the current center. The round in progress sums into the other buffer, divides the sums there, and lets the
outer optimizer turn them into the next center; a commit swaps the two buffers. So no reader sees an unfinished center,
a round that starts over changes nothing, and memory is twice the model (and the optimizer's state) for any number of
workers. A buffer that still has readers is left to them and replaced by a new one. At most two old buffers are kept;
beyond that, the slowest readers are ended.
"""

from __future__ import annotations

import functools
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelaverage.codecs import RAW, Codec
from modelaverage.errors import Reason, refusal
from modelaverage.manifest import Manifest
from modelaverage.outer import AVERAGE, OuterOptimizer
from modelaverage.outer.base import MASTER, Slots, Values, summed_in
from modelaverage.runtime.shared_memory import Segment
from ps_server.center.buffers import Buffer, Reader
from ps_server.center.state import OuterState
from ps_server.center.sums import Contribution, Sums
from ps_server.machine.reserve import Reserve
from ps_server.machine.threads import started_pool

__all__ = ["Center", "Finish", "MAX_OLD_BUFFERS"]

_T = TypeVar("_T")
_THREADS = min(4, os.cpu_count() or 1)
_BLOCK = 1 << 17
"""Elements that an outer optimizer gets at once. Fewer fit the processor's cache better, but the threads then wait for
one another: every operation of NumPy takes Python's lock again when it ends."""
MAX_OLD_BUFFERS = 2
"""The most old centers kept for their readers."""


@dataclass(frozen=True)
class Finish:
    """All contributions to a fragment have been added; how to finish it.

    Args:
        index: the fragment.
        total_weight: the divisor of its sum. 0: there is no sum, and the whole fragment keeps the center's values.
        untouched: indexes of the variables that keep the center's bytes and state.
        steps: whether the outer optimizer takes a step. False: the average becomes the center, and the state stays.
    """

    index: int
    total_weight: float
    untouched: frozenset[int] = frozenset()
    steps: bool = True


class Center:
    """The center variables and the next center.

    Args:
        manifest: describes the center variables; all are zero until `load` has set every fragment.
        shared: whether buffers lie in shared memory. Raises OSError if the system has none.
        reserve: descriptors for that memory if the system has no others left.
        outer: computes the next center from the current one and an average.
        codec: the codec of the job. The next center is what the codec makes of it, relative to the current one.

    Attributes:
        current: the current center.
        next: the buffer in which the round in progress builds the next center.
    """

    def __init__(
        self,
        manifest: Manifest,
        shared: bool = False,
        reserve: Reserve | None = None,
        outer: OuterOptimizer = AVERAGE,
        codec: Codec = RAW,
    ) -> None:
        self.manifest = manifest
        self.outer = outer
        self.codec = codec
        self._shared = shared
        self._reserve = Reserve(0) if reserve is None else reserve
        self.current = self._new_buffer()
        self.next = self._new_buffer()
        self._old: list[Buffer] = []  # old centers that still have readers
        self._sums = Sums(manifest)
        self._threads: ThreadPoolExecutor | None = None

    @staticmethod
    def memory_bytes(manifest: Manifest, outer: OuterOptimizer = AVERAGE, codec: Codec = RAW) -> int:
        """The memory that a center of this manifest needs: two buffers, two optimizer states, two changes in the codec,
        and the sums."""
        buffer_bytes = manifest.buffer_size_bytes + OuterState.memory_bytes(manifest, outer)
        if codec is not RAW:
            buffer_bytes += codec.run_size_bytes(manifest, 0, manifest.fragment_count)
        return 2 * buffer_bytes + Sums.memory_bytes(manifest)

    # Loading a center.

    def load(self, index: int, data: memoryview) -> None:
        """Sets a fragment of the current center and initializes its optimizer state. Raises ProtocolError
        (FRAGMENT_SIZE_WRONG)."""
        RAW.check_size(self.manifest, index, data)
        self.current.center_id = self._fresh_id()
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
        center_id: int = 0,
    ) -> None:
        """Sets the current center and its state, given by name with the right shapes and dtypes; see `OuterState`.
        ``center_id`` 0: no worker knows this center."""
        self.current.center_id = center_id or self._fresh_id()
        for name, array in self.current.arrays.items():
            array[...] = arrays[name]
        self.current.state.load(state)

    # A round.

    def accumulate(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """Adds a contribution to the sum of fragment ``index``, or starts the sum with it; see `Sums.accumulate`."""
        return self._sums.accumulate(self.next, index, contribution, first, self.current)

    def defer(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """Like `accumulate`, for bytes that stay valid until the round is over; see `Sums.defer`."""
        return self._sums.defer(self.next, index, contribution, first, self.current)

    def finish(self, finishes: Sequence[Finish], step: int = 0) -> Counter[str]:
        """Turns the sums of these fragments into fragments of the next center.

        Args:
            finishes: which fragments to finish, and how.
            step: the ``global_step`` that the round started from.

        Returns:
            How many of the values summed here were not finite, by worker id.
        """
        if self.next.center_id == 0:
            self.next.center_id = self._fresh_id()
        threads = None if len(finishes) == 1 else self._running_threads()
        if threads is None:
            return self._finish(finishes, step)
        # One contiguous range per thread: handing over each fragment separately costs as much as summing it.
        stretch = math.ceil(len(finishes) / _THREADS)
        working = list[Future[Counter[str]]]()
        try:
            for start in range(0, len(finishes), stretch):
                working += [threads.submit(self._finish, finishes[start : start + stretch], step)]
        finally:
            _wait_for(working)
        return sum((work.result() for work in working), Counter[str]())

    def restart(self) -> None:
        """The round starts over: discards all sums and finished fragments.

        Raises:
            OSError, MemoryError: its average is being written to disk, and there is no memory for another buffer.
        """
        self._sums.clear()
        self.next.center_id = 0
        if any(reader.end is None for reader in self.next.readers):
            room = self._new_buffer()
            self._old, self.next = [*self._old, self.next], room

    @contextmanager
    def reading(self, buffer: Buffer, reader: Reader) -> Iterator[None]:
        """Inside the context, no later round writes into this buffer, unless the reader is ended."""
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
            OSError, MemoryError: there is no memory, and the readers of the old buffers cannot be ended.
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
            "new rounds; call again for the current one",
        )
        for reader in slowest.readers:
            assert reader.end is not None
            reader.end(error)
        slowest.readers.clear()
        return slowest

    def commit(self, room: Buffer, then: Callable[[], _T]) -> _T:
        """Makes the next buffer, with all fragments finished, the current center. Returns the result of ``then``.

        Args:
            room: a buffer from `room`, into which the following round sums.
            then: runs together with the swap. If it raises, the center is unchanged.
        """
        old = [buffer for buffer in (*self._old, self.current) if buffer is not room and buffer.in_use]
        room.retire()
        before = self.current, self.next, self._old
        self.current, self.next, self._old = self.next, room, old
        try:
            result = then()
        except BaseException:
            self.current, self.next, self._old = before
            raise
        room.center_id = 0
        return result

    # Internals.

    def _new_buffer(self) -> Buffer:
        if not self._shared:
            return Buffer(self.manifest, None, self.outer, self.codec)
        size_bytes = self.manifest.buffer_size_bytes
        create = functools.partial(Segment.create, size_bytes, for_clients_to_write=False)
        return Buffer(self.manifest, self._reserve.open(create), self.outer, self.codec)

    def _fresh_id(self) -> int:
        """A name for the bits of a center that no other center of this job has."""
        return 0 if self.codec is RAW else secrets.randbits(63) + 1

    def _running_threads(self) -> ThreadPoolExecutor | None:
        """Threads that share the work; None: the system has no threads left."""
        if self._threads is None:
            with suppress(RuntimeError, MemoryError):
                self._threads = started_pool(_THREADS, "center")
        return self._threads

    def _finish(self, finishes: Sequence[Finish], step: int) -> Counter[str]:
        nonfinite: Counter[str] = Counter()
        for finish in finishes:
            nonfinite.update(self._finish_one(finish, step))
        return nonfinite

    def _finish_one(self, finish: Finish, step: int) -> Counter[str]:
        index, pieces = finish.index, self.manifest.pieces[finish.index]
        with np.errstate(all="ignore"):
            if finish.total_weight == 0.0:
                nonfinite: Counter[str] = Counter()
                kept = frozenset(piece.variable for piece in pieces)
            else:
                kept = finish.untouched
                nonfinite = self._sums.average(self.next, index, finish.total_weight, kept, self.current)
            whole = self._sums.whole(self.next, index, kept)
            if whole is not None and self._is_plain(finish):
                average, out = whole
                if average is not out:
                    out[...] = average
                return nonfinite
            exact = list[Values]()  # before rounding to 16 bits
            for piece, average, center, out, state, next_state in zip(
                pieces,
                self._sums.of(self.next, index),
                self.current.parts[index],
                self.next.parts[index],
                self.current.state.pieces(index),
                self.next.state.pieces(index),
                strict=True,
            ):
                if piece.variable in kept:
                    out[...] = center
                    _store(next_state, state, state.get(MASTER, center))
                    exact.append(out)
                elif finish.steps and self.outer != AVERAGE:
                    self._step(center, average, state, out, next_state, step)
                    exact.append(next_state.get(MASTER, out))
                else:
                    if average is not out:
                        out[...] = average
                    _store(next_state, state, average)
                    exact.append(average)
            if self.codec is not RAW:
                self._code(finish, exact)
        return nonfinite

    def _is_plain(self, finish: Finish) -> bool:
        """Whether the average is the next center, without state and codec."""
        steps = finish.steps and self.outer != AVERAGE
        return not steps and not self.current.state.arrays and self.codec is RAW

    def _code(self, finish: Finish, exact: Sequence[Values]) -> None:
        """Replaces a finished fragment by what the codec makes of its exact values, and keeps the coded change."""
        index = finish.index
        self.next.changes[index] = None
        if not finish.steps:
            return  # a center that workers have already: its bits must stay
        parts = self.codec.encode(self.manifest, index, exact, self.current.parts[index])
        change = memoryview(b"".join(parts))
        self.codec.decode_into(self.manifest, self.next.flat, index, change, self.current.flat)
        self.next.changes[index] = change

    def _step(self, center: Values, average: Values, state: Slots, out: Values, next_state: Slots, step: int) -> None:
        """The outer optimizer's step for a piece, block by block; ``out`` may be the memory of ``average``."""
        exact, next_exact = state.get(MASTER, center), next_state.get(MASTER, out)
        for start in range(0, len(average), _BLOCK):
            here = slice(start, start + _BLOCK)
            block = {slot: array[here] for slot, array in state.items()}
            next_block = {slot: array[here] for slot, array in next_state.items()}
            self.outer.update_into(exact[here], average[here], block, step, next_exact[here], next_block)
            if next_exact is not out:
                out[here] = next_exact[here]


def _store(into: Mapping[str, Values], slots: Mapping[str, Values], exact: Values) -> None:
    """Copies the state of a piece; ``exact`` is its center before rounding."""
    for slot, array in into.items():
        array[...] = exact if slot == MASTER else slots[slot]


def _wait_for(working: Sequence[Future[Any]]) -> None:
    """Returns when no thread writes into the average any more; retries a wait that fails."""
    while True:
        try:
            wait(working)
        except Exception:  # waiting needs a little memory
            continue
        return
