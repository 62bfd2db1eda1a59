"""Fragments in memory that the server lends to workers on its host; messages only refer to them."""

from __future__ import annotations

import logging

from modelaverage.errors import Reason, refusal
from modelaverage.logs import event
from modelaverage.runtime.shared_memory import Segment
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.machine.reserve import Reserve
from ps_server.transports.base import Opening, Run, Source
from ps_server.transports.messages import MessagesLane

__all__ = ["SharedMemory", "SharedMemoryLane"]

_log = logging.getLogger("ps_server")


class SharedMemoryLane:
    """A push whose client can use shared memory. Fragments that the client does not put there arrive in messages.

    Args:
        transport: lends the memory.
        opening: the push.
    """

    def __init__(self, transport: SharedMemory, opening: Opening) -> None:
        self._transport = transport
        self._worker_id, self._incarnation = opening.header.worker_id, opening.header.incarnation
        self._call = opening.call
        self._manifest = opening.manifest
        self._messages = MessagesLane(opening.call, opening.manifest)
        self._lent: Segment | None = None
        self.is_shared = False

    @property
    def kind(self) -> pb.Transport:
        """How the fragments travel."""
        return pb.TRANSPORT_SHARED_MEMORY if self.is_shared else self._messages.kind

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """Tells the client where to put its fragments and where the average will lie, if there is memory."""
        if average.segment is None:
            return
        self._lent = self._transport.lend(self._worker_id, self._incarnation, self._manifest.buffer_size_bytes)
        if self._lent is not None:
            admission.contribution.CopyFrom(_message_of(self._lent))
            admission.average.CopyFrom(_message_of(average.segment))

    def whole(self) -> Run | None:
        """Nothing: the fragments never come with the header."""
        return None

    async def receive(self) -> Run | None:
        """The fragments that the next message carries or refers to. Raises ProtocolError."""
        content = await self._call.read_content()
        if content is None:
            return None
        if isinstance(content, tuple):
            return Run(*content)
        if self._lent is None or content.count == 0:
            raise refusal(Reason.MESSAGE_OUT_OF_ORDER, "no memory was lent to this push, or no fragments are named")
        count = self._manifest.fragment_count
        end = content.first + content.count
        if end > count:
            raise refusal(Reason.FRAGMENT_EXTRA, f"fragment {end - 1} does not exist; the model has {count} fragments")
        self.is_shared = True
        begin, stop = self._manifest.fragment_bounds(content.first)[0], self._manifest.fragment_bounds(end - 1)[1]
        return Run(content.first, self._lent.body[begin:stop].data, stays=True)

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """All finished fragments: a reference costs the same for one fragment and for a thousand."""
        return finished if self.is_shared else self._messages.end_of_range(first, finished, runs)

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Refers to the fragments in shared memory, or sends their bytes in messages."""
        if not self.is_shared:
            return await self._messages.send(average, first, end)
        shared = pb.SharedFragments(first=first, count=end - first)
        return pb.PushAndAverageResponse(shared=shared).SerializeToString()

    def answered(self, is_committed: bool) -> None:
        """Keeps the memory for the next push."""

    def close(self) -> None:
        """Keeps the memory for the next push."""


class SharedMemory:
    """Lends memory to workers on this host.

    Args:
        max_workers: the most workers that get memory.
        reserve: tells whether descriptors are available.
    """

    def __init__(self, max_workers: int, reserve: Reserve) -> None:
        self._max_workers = max_workers
        self._reserve = reserve
        self._lent: dict[str, tuple[bytes, Segment]] = {}  # worker id -> incarnation, its memory

    def open(self, opening: Opening) -> SharedMemoryLane | None:
        """Opens a lane for a client that supports shared memory and asks for no other transport."""
        header = opening.header
        return SharedMemoryLane(self, opening) if header.accepts_shared_memory and not header.uses_transport else None

    def offer(self, opening: Opening, admission: pb.PushAdmission) -> None:
        """Offers nothing: each lane offers its own memory."""

    def lend(self, worker_id: str, incarnation: bytes, size_bytes: int) -> Segment | None:
        """Memory for a worker's contribution. A process keeps the memory that it got; a later process gets its own.
        None: no memory is available."""
        if self._reserve.is_short:
            return None
        owner, segment = self._lent.get(worker_id, (b"", None))
        if segment is not None and owner == incarnation:
            return segment
        try:
            segment = Segment.create(size_bytes, for_clients_to_write=True)
        except (OSError, MemoryError) as error:
            _log.warning(
                "no shared memory for %r: %s; its fragments come inline",
                worker_id,
                error,
                extra=event("no_shared_memory", worker=worker_id),
            )
            return None
        self._lent.pop(worker_id, None)
        self._lent[worker_id] = incarnation, segment
        if len(self._lent) > self._max_workers:  # clients choose names, so memory must be bounded
            del self._lent[next(iter(self._lent))]
        return segment

    def keep_only(self, worker_ids: frozenset[str]) -> None:
        """Frees the memory of all other workers."""
        self._lent = {worker_id: lent for worker_id, lent in self._lent.items() if worker_id in worker_ids}

    def leave(self, worker_id: str, incarnation: bytes) -> None:
        """Keeps the memory until the next commit, because a whole push may lie there."""

    def close(self) -> None:
        """Frees nothing: the memory ends with the process."""


def _message_of(segment: Segment) -> pb.SharedMemory:
    """The message that tells a client where a segment is."""
    address = segment.address
    return pb.SharedMemory(path=address.path, nonce=address.nonce)
