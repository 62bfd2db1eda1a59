"""Fragments on a data connection outside the call: for large models and servers on other hosts."""

from __future__ import annotations

from collections.abc import Callable

from ma_client.process.threads import without_thread
from ma_client.transports.base import ClientLane, ClientTransport, Ending, OutgoingPush
from ma_client.transports.data_link import DataLink
from ma_client.transports.data_transfer import Transfer
from ma_client.transports.timing import Timing
from modelaverage import wire
from modelaverage.errors import (
    DeadlineExceededError,
    ModelAverageError,
    Reason,
    RetryPushError,
    ServerUnavailableError,
)
from modelaverage.runtime.data_sockets import OVER_TLS
from modelaverage.v1 import parameter_server_pb2 as pb

__all__ = ["ClientDataLane", "ClientDataTransport"]

# A push whose data connection got stuck ends with one of these reasons; others concern the round or the server.
_STUCK = (None, Reason.DATA_CONNECTION_LOST, Reason.STREAM_STALLED)


class ClientDataTransport(ClientTransport):
    """The data connections of one server.

    Args:
        link: holds the connection.
        timing: timeouts.
    """

    def __init__(self, link: DataLink, timing: Timing) -> None:
        self._link = link
        self._timing = timing
        self._asked = False

    def begin(self, opening: OutgoingPush) -> ClientLane | None:
        """See `ClientTransport`. Sends bytes before the call begins; the server reads them after the header."""
        connection = self._link.take() if opening.may_follow else None
        if connection is None:
            return None
        transfer = Transfer(connection, opening, self._timing)
        try:
            transfer.start()
        except RuntimeError as error:
            transfer.end()
            self._link.give_up(without_thread(f"nothing moves on the data connection to {self._link.address}", error))
            return None
        except BaseException:
            transfer.end()
            raise
        return ClientDataLane(transfer, self._link)

    def announce(self, header: pb.PushHeader, opening: OutgoingPush, is_free: bool) -> None:
        """See `ClientTransport`."""
        self._asked = is_free and self._link.wants(opening.manifest.buffer_size_bytes)
        if not self._link.is_encrypted:
            header.accepts_data_connection = self._asked
        elif self._asked:
            header.accepts_transports.append(OVER_TLS)

    def admitted(self, admission: pb.PushAdmission, is_free: bool) -> ClientLane | None:
        """See `ClientTransport`. An offer is for later pushes."""
        offer = self._offer_in(admission)
        if offer is not None and self._asked and is_free:
            self._link.open(offer)
        return None

    def _offer_in(self, admission: pb.PushAdmission) -> pb.DataConnection | None:
        if not self._link.is_encrypted:
            return admission.data_connection if admission.HasField("data_connection") else None
        for offer in admission.offers:
            if offer.transport == OVER_TLS:
                return wire.parse(pb.DataConnection, offer.details)
        return None

    def failed(self, fault: ModelAverageError) -> None:
        """See `ClientTransport`."""
        if isinstance(fault, ServerUnavailableError) and fault.reason is None:
            self._link.server_was_away()

    def close(self) -> None:
        """See `ClientTransport`."""
        self._link.close()


class ClientDataLane(ClientLane):
    """One push on a data connection.

    Args:
        transfer: the transfer of its bytes, already running.
        link: takes the connection back.
    """

    at_once = is_beside = True

    def __init__(self, transfer: Transfer, link: DataLink) -> None:
        self._transfer = transfer
        self._link = link

    def announce(self, header: pb.PushHeader) -> None:
        """See `ClientLane`."""
        if self._link.is_encrypted:
            header.uses_transport = OVER_TLS
        else:
            header.uses_data_connection = True

    def begun(self, give_up: Callable[[], object]) -> None:
        """See `ClientLane`."""
        self._transfer.give_up = give_up

    def rest(self, goes_on: Callable[[], bool]) -> object | None:
        """See `ClientLane`."""
        return None if self._transfer.wait(goes_on) else self._transfer.problem or "the wait for it was given up"

    def end(self, ending: Ending) -> ModelAverageError | None:
        """See `ClientLane`. A connection on which a push got stuck is not used for a while."""
        transfer, fault, instead = self._transfer, ending.fault, None
        stuck = fault if isinstance(fault, RetryPushError | DeadlineExceededError) and not ending.is_stopped else None
        if isinstance(fault, ServerUnavailableError) and transfer.gave_up:
            # The server is reachable, but not on this transport.
            stuck = instead = RetryPushError(f"the data connection to {self._link.address} broke: {transfer.problem}")
        transfer.end()
        if transfer.is_whole:
            self._link.put(transfer.connection)
        elif stuck is not None and stuck.reason in _STUCK:
            self._link.give_up(stuck)
        return instead
