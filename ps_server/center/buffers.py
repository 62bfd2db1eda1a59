"""The buffers of the center variables: accumulate a fragment, finish it, commit, read. No rules of the round here.

There are two flat buffers. Readers see the current center; the round in progress adds into the other one, divides
there, and a commit swaps them. So readers never meet a half-made center, and memory is twice the model however many
workers there are (16-bit variables are summed in float32 beside it). A buffer that somebody still reads is left to
them, and a fresh one takes its place; but only two old ones are kept, then the slowest readers are ended.
"""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from modelaverage.errors import ModelAverageError, Reason, refusal
from modelaverage.manifest import DTYPES, Manifest
from modelaverage.runtime.shared_memory import Segment
from ps_server.machine.reserve import Reserve
from ps_server.machine.threads import started_pool
from ps_server.rules.decisions import FinishFragment

__all__ = ["Buffer", "Center", "Contribution", "MAX_OLD_BUFFERS", "Reader", "check_fragment_size", "split_run"]

_Array = NDArray[np.generic]
_T = TypeVar("_T")
_THREADS = min(4, os.cpu_count() or 1)
MAX_OLD_BUFFERS = 2
"""How many centers that are no longer in force are kept for those who still read them."""


@dataclass(frozen=True)
class Contribution:
    """A worker's bytes for one fragment, and the weight to add them with."""

    worker_id: str
    weight: float
    data: memoryview


@dataclass(eq=False)
class Reader:
    """Somebody who reads a buffer.

    Args:
        since_s: when it could begin to read.
        end: ends it with an error: from then on it reads nothing more. None: it cannot be ended.
        read_bytes: how much it has read.
    """

    since_s: float
    end: Callable[[ModelAverageError], None] | None = None
    read_bytes: int = 0

    def pace(self, now_s: float) -> float:
        """Bytes a second."""
        return self.read_bytes / max(now_s - self.since_s, 1e-3)


class Buffer:
    """One flat buffer.

    Args:
        manifest: what lies in it; all is zero at first.
        segment: the shared memory that it lies in; None: in memory of this process.

    Attributes:
        readers: who reads it.
        arrays: the variables in it, by name.
    """

    def __init__(self, manifest: Manifest, segment: Segment | None) -> None:
        self._manifest = manifest
        self.readers = set[Reader]()
        self.segment = segment
        size_bytes = manifest.buffer_size_bytes
        self._bytes = np.zeros(size_bytes, np.uint8) if self.segment is None else self.segment.body
        self.arrays = manifest.arrays(self._bytes)
        flat = [array.reshape(-1) for array in self.arrays.values()]
        # By fragment: the part of each variable that lies in it, typed.
        self.parts: list[list[_Array]] = [
            [flat[piece.variable][piece.start : piece.start + piece.count] for piece in pieces]
            for pieces in manifest.pieces
        ]

    def fragment(self, index: int) -> memoryview:
        """The bytes of a fragment; a view."""
        return self.fragments(index, index + 1)

    def fragments(self, first: int, end: int) -> memoryview:
        """The bytes of consecutive fragments, up to but not with ``end``; a view."""
        start, stop = self._manifest.fragment_bounds(first)[0], self._manifest.fragment_bounds(end - 1)[1]
        return self._bytes[start:stop].data

    @property
    def in_use(self) -> bool:
        """Whether somebody reads it."""
        return bool(self.readers)

    def pace(self, now_s: float) -> float:
        """How fast its fastest reader is, in bytes a second; infinite if one cannot be ended."""
        return max(math.inf if reader.end is None else reader.pace(now_s) for reader in self.readers)

    def retire(self) -> None:
        """It is no longer the center, and a round may write into it."""
        if self.segment is not None:
            self.segment.retire()


class Center:
    """The center variables and the average in the making.

    Args:
        manifest: what the center variables are; all are zero until `load` has set every fragment.
        shared: whether buffers lie in shared memory. Raises OSError if the system has none.
        reserve: descriptors for that memory, should the system have no others.
    """

    def __init__(self, manifest: Manifest, shared: bool = False, reserve: Reserve | None = None) -> None:
        self.manifest = manifest
        self._shared = shared
        self._reserve = Reserve(0) if reserve is None else reserve
        self.current = self._new_buffer()
        self.next = self._new_buffer()
        self._old: list[Buffer] = []  # those that somebody still reads
        # Contributions in shared memory to fragments whose sum has not begun.
        self._deferred: dict[int, list[Contribution]] = {}
        self._threads: ThreadPoolExecutor | None = None
        # Sums of 16-bit variables, in float32; None where the next buffer itself is precise enough.
        self._wide: list[list[NDArray[np.float32] | None]] = [
            [
                np.zeros(piece.count, np.float32) if self._dtype(piece.variable).itemsize == 2 else None
                for piece in pieces
            ]
            for pieces in manifest.pieces
        ]

    @staticmethod
    def memory_bytes(manifest: Manifest) -> int:
        """What a center of this manifest needs: two buffers, and float32 sums of 16-bit variables."""
        wide_bytes = sum(2 * v.size_bytes for v in manifest.variables if DTYPES[v.dtype].itemsize == 2)
        return 2 * manifest.buffer_size_bytes + wide_bytes

    def load(self, index: int, data: memoryview) -> None:
        """Sets a fragment of the current center. Raises ProtocolError (FRAGMENT_SIZE_WRONG)."""
        check_fragment_size(self.manifest, index, data)
        for part, values in zip(self.current.parts[index], self._values(index, data), strict=True):
            part[...] = values

    def accumulate(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """Adds weight * values to the sum of fragment ``index``, or starts the sum with it if it is the ``first``.

        Sums are in the variable's own precision, of 16-bit variables in float32. The caller has checked the size.

        Returns:
            By worker id, how many of the values that were added now were not finite. They are added as they are.
        """
        # Once somebody's bytes come inline, what was to wait for everybody is added, too.
        waiting = self._deferred.pop(index, [])
        if first:  # what has come before is void
            waiting = []
        nonfinite = Counter[str]()
        for position, each in enumerate([*waiting, contribution]):
            nonfinite[each.worker_id] += self._add(index, each, first=first if not waiting else position == 0)
        return nonfinite

    def defer(self, index: int, contribution: Contribution, first: bool) -> Counter[str]:
        """As `accumulate`, for bytes that stay where they are until the round is over: while all contributions to a
        fragment are such, they are left to `finish`."""
        if not first and index not in self._deferred:
            return self.accumulate(index, contribution, first)
        if first:
            self._deferred.pop(index, None)
        self._deferred.setdefault(index, []).append(contribution)
        return Counter()

    def finish(self, fragments: Sequence[FinishFragment]) -> Counter[str]:
        """Turns the sums of these fragments into averages: sum, then divide. Equal values of two or four workers stay
        as they are; of other numbers they may move by a last bit (with a reciprocal, by more). Where all contributions
        wait in shared memory they are summed now, in the order of worker ids.

        Returns:
            By worker id, how many of the values that are summed only now were not finite.
        """
        threads = None if len(fragments) == 1 else self._running_threads()
        if threads is None:
            return self._finish(fragments)
        # One stretch a thread: handing over every fragment by itself costs as much as summing it.
        stretch = math.ceil(len(fragments) / _THREADS)
        working = list[Future[Counter[str]]]()
        try:
            for start in range(0, len(fragments), stretch):
                working += [threads.submit(self._finish, fragments[start : start + stretch])]
        finally:
            _wait_for(working)
        return sum((work.result() for work in working), Counter[str]())

    def restart(self) -> None:
        """The round starts over: what was to be summed is void.

        Raises:
            OSError, MemoryError: its average is on its way to the disk, and there is no room for another one.
        """
        self._deferred.clear()
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
        """A buffer for the round after the next commit. It changes nothing but this: readers that are in the way, the
        slowest, are ended with READER_TOO_SLOW.

        Raises:
            OSError, MemoryError: there is none to be had, and who reads those that there are cannot be ended.
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
        """The next buffer, whose fragments are all finished, becomes the center; whatever ``then`` returns.

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
            return Buffer(self.manifest, None)
        size_bytes = self.manifest.buffer_size_bytes
        create = functools.partial(Segment.create, size_bytes, for_clients_to_write=False)
        return Buffer(self.manifest, self._reserve.open(create))

    def _running_threads(self) -> ThreadPoolExecutor | None:
        """Threads that share the work; None: the system has no more of them."""
        if self._threads is None:
            with suppress(RuntimeError, MemoryError):
                self._threads = started_pool(_THREADS, "center")
        return self._threads

    def _add(self, index: int, contribution: Contribution, first: bool) -> int:
        nonfinite = 0
        with np.errstate(all="ignore"):
            for total, values in zip(self._sums(index), self._values(index, contribution.data), strict=True):
                _add_weighted(total, values, contribution.weight, first)
                if not np.isfinite(values).all():
                    nonfinite += _count_nonfinite(values)
        return nonfinite

    def _finish(self, fragments: Sequence[FinishFragment]) -> Counter[str]:
        return sum(map(self._finish_one, fragments), Counter[str]())

    def _finish_one(self, fragment: FinishFragment) -> Counter[str]:
        index = fragment.index
        deferred = sorted(self._deferred.pop(index, []), key=lambda contribution: contribution.worker_id)
        by_contribution = [self._values(index, contribution.data) for contribution in deferred]
        nonfinite = Counter[str]()
        with np.errstate(all="ignore"):
            for number, (piece, total) in enumerate(zip(self.manifest.pieces[index], self._sums(index), strict=True)):
                out = self.next.parts[index][number]
                if piece.variable in fragment.untouched or fragment.total_weight == 0.0:
                    out[...] = self.current.parts[index][number]
                    continue
                values = [parts[number] for parts in by_contribution]
                self._sum(total, values, [contribution.weight for contribution in deferred])
                if fragment.total_weight != 1.0:
                    np.divide(total, total.dtype.type(fragment.total_weight), out=total)
                if total is not out:
                    out[...] = total
                if deferred and not np.isfinite(total).all():
                    nonfinite.update({c.worker_id: _count_nonfinite(v) for c, v in zip(deferred, values, strict=True)})
        return nonfinite

    @staticmethod
    def _sum(total: _Array, values: list[_Array], weights: list[float]) -> None:
        """Starts a sum with all its summands, one pass fewer than one after the other."""
        if len(values) > 1 and weights[0] == weights[1] == 1.0:
            np.add(values[0], values[1], out=total)
            begun = 2
        else:
            begun = 0
        for position in range(begun, len(values)):
            _add_weighted(total, values[position], weights[position], first=position == 0)

    def _sums(self, index: int) -> list[_Array]:
        return [
            out if wide is None else wide for out, wide in zip(self.next.parts[index], self._wide[index], strict=True)
        ]

    def _values(self, index: int, data: memoryview) -> list[_Array]:
        return [
            np.frombuffer(data, self._dtype(piece.variable), piece.count, piece.offset_bytes)
            for piece in self.manifest.pieces[index]
        ]

    def _dtype(self, variable: int) -> np.dtype[np.generic]:
        return DTYPES[self.manifest.variables[variable].dtype]


def _wait_for(working: Sequence[Future[Any]]) -> None:
    """Returns when nobody writes into the average any more: even a wait that failed has to be made again."""
    while True:
        try:
            wait(working)
        except Exception:  # it needs a little memory
            continue
        return


def check_fragment_size(manifest: Manifest, index: int, data: memoryview) -> None:
    """Raises ProtocolError (FRAGMENT_SIZE_WRONG) unless the bytes are as many as fragment ``index`` has."""
    start, end = manifest.fragment_bounds(index)
    if len(data) != end - start:
        raise refusal(
            Reason.FRAGMENT_SIZE_WRONG,
            f"fragment {index} has {len(data)} bytes; the manifest gives it {end - start}",
        )


def split_run(manifest: Manifest, first: int, data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Index and bytes of every fragment in a run. Raises ProtocolError (FRAGMENT_SIZE_WRONG), before the first, unless
    they are whole fragments."""
    end = manifest.run_end(first, len(data))
    if end is None:
        check_fragment_size(manifest, first, data)
        end = first + 1
    begin = manifest.fragment_bounds(first)[0]
    for index in range(first, end):
        start, stop = manifest.fragment_bounds(index)
        yield index, data[start - begin : stop - begin]


def _add_weighted(total: _Array, values: _Array, weight: float, first: bool) -> None:
    weighted = values if weight == 1.0 else np.multiply(values, total.dtype.type(weight), dtype=total.dtype)
    if first:
        total[...] = weighted
    else:
        np.add(total, weighted, out=total)


def _count_nonfinite(values: _Array) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))
