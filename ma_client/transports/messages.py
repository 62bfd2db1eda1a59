"""Fragments as messages of the push's call: the transport that every server supports and that needs no offer."""

from __future__ import annotations

from collections.abc import Iterator

from ma_client.transports.base import ClientLane, OutgoingPush
from modelaverage import wire
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ClientMessagesLane"]


class ClientMessagesLane(ClientLane):
    """One push in messages.

    Args:
        opening: the push.
    """

    def __init__(self, opening: OutgoingPush) -> None:
        self.at_once = opening.may_follow
        self._opening = opening

    def announce(self, header: pb.PushHeader) -> None:
        """See `ClientLane`."""
        header.fragments_follow = self.at_once

    def up(self, first: int) -> Iterator[bytes]:
        """See `ClientLane`."""
        # One by one: in a run, the average of the first fragment would have to wait for the last.
        for index in range(first, self._opening.manifest.fragment_count):
            yield wire.encode_fragment(index, self._opening.fragment(index))
