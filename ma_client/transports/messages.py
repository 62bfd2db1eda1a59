"""Fragments as messages of the push's call: the transport that every server has, and that needs no offer."""

from __future__ import annotations

from collections.abc import Iterator

from ma_client.transports.base import ClientLane, OutgoingPush
from modelaverage import wire
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ClientMessagesLane"]


class ClientMessagesLane(ClientLane):
    """One push in messages.

    Args:
        opening: what is known of it.
    """

    def __init__(self, opening: OutgoingPush) -> None:
        self.at_once = opening.may_follow
        self._opening = opening

    def announce(self, header: pb.PushHeader) -> None:
        """As `ClientLane` says."""
        header.fragments_follow = self.at_once

    def up(self, first: int) -> Iterator[bytes]:
        """As `ClientLane` says."""
        # One by one: a run would hold up the average of its first fragment until its last has come.
        for index in range(first, self._opening.manifest.fragment_count):
            yield wire.encode_fragment(index, self._opening.fragments(index))
