"""A push on a data connection: its fragments come there, and the average goes there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelaverage.runtime.data_sockets import NUMBER
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.transports.base import Opening, Run, Source
from ps_server.transports.data_connection import DataConnection, lost

__all__ = ["DataLane", "Place"]


@dataclass(frozen=True)
class Place:
    """The owner of a connection: a worker's process."""

    worker_id: str
    incarnation: bytes


class DataLane:
    """A push whose fragments all arrive on its worker's data connection; the average is sent there, too.

    Args:
        give_back: takes the connection back after the push.
        connection: the connection of the worker's process; reserved for this push.
        opening: the push.
    """

    kind = pb.TRANSPORT_DATA_CONNECTION
    is_shared = False

    def __init__(
        self, give_back: Callable[[Place, DataConnection], None], connection: DataConnection, opening: Opening
    ) -> None:
        self._give_back = give_back
        self._connection: DataConnection | None = connection
        self._place = Place(opening.header.worker_id, opening.header.incarnation)
        self._push_id = opening.header.push_id
        self._call = opening.call
        self._manifest = opening.manifest
        self._codec = opening.codec
        self._room: memoryview | None = None  # None: no byte has been read
        self._received = 0

    def admitted(self, admission: pb.PushAdmission, average: Source) -> None:
        """Adds nothing."""

    def whole(self) -> Run | None:
        """Nothing: the fragments never come with the header."""
        return None

    async def receive(self) -> Run | None:
        """The next fragment. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        assert self._connection is not None
        index, count = self._received, self._manifest.fragment_count
        if self._room is not None and index == count:
            return None
        start = NUMBER.size
        if self._room is None:
            self._connection.begin()
            self._room = memoryview(bytearray(NUMBER.size + self._codec.max_size_bytes(self._manifest)))
            start = 0  # the number comes with the first fragment: reading it alone would cost as much as a fragment
        end = NUMBER.size + (self._codec.size_bytes(self._manifest, index) if index < count else 0)
        await self._call.read_aside(self._connection, self._connection.receive(self._room[start:end]))
        if start == 0 and NUMBER.unpack_from(self._room) != (self._push_id,):
            raise lost("its bytes are another push's")
        if index == count:
            return None
        self._received += 1
        return Run(index, self._room[NUMBER.size : end])

    def end_of_range(self, first: int, finished: int, runs: bool) -> int:
        """One fragment, or a run that ends at a multiple of the maximum run length."""
        longest = self._manifest.longest_run
        return min(finished, (first // longest + 1) * longest) if runs else first + 1

    async def send(self, average: Source, first: int, end: int) -> bytes:
        """Sends the bytes on the data connection. Raises RetryPushError (DATA_CONNECTION_LOST)."""
        assert self._connection is not None
        for data in average.data(first, end):
            await self._call.write_aside(self._connection, self._connection.send(data))
        return b""

    def answered(self, is_committed: bool) -> None:
        """Returns the connection for the next push if no bytes are left in it."""
        if is_committed and self._received == self._manifest.fragment_count and self._connection is not None:
            connection, self._connection = self._connection, None
            self._give_back(self._place, connection)

    def close(self) -> None:
        """Closes the connection unless it was given back, because unknown bytes may be left in it."""
        if self._connection is not None:
            self._connection.close()
