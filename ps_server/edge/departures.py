"""What gRPC logs about clients that leave early."""

from __future__ import annotations

import logging

import grpc.aio

__all__ = ["hush_departures"]

_LOGGER = "grpc._cython.cygrpc"
_OF_THE_END = "SendStatusFromServerOperation"


class _Departures(logging.Filter):
    """Drops the traceback of a call whose client left while it ended: a worker ends a call once it has its outcome."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, grpc.aio.InternalError) and _OF_THE_END in str(error))


_DEPARTURES = _Departures()


def hush_departures() -> None:
    """From now on, gRPC does not log them in this process."""
    logging.getLogger(_LOGGER).addFilter(_DEPARTURES)
