"""A worker that ends its call while the server still ends it leaves no traceback in the server's log."""

from __future__ import annotations

import logging
import sys

import grpc.aio
import pytest

from ps_server.edge.departures import hush_departures

GRPC = logging.getLogger("grpc._cython.cygrpc")


def log(error: Exception) -> None:
    try:
        raise error
    except type(error):
        GRPC.exception("%s raised in core by servicer method [%s]", type(error).__name__, "/x/PushAndAverage")


def failed(operation: str) -> Exception:
    error: Exception = grpc.aio.InternalError(f'Failed "execute_batch": (<grpc._cython.cygrpc.{operation} at 0x7f>,)')
    return error


def test_grpc_logs_where_this_expects_it() -> None:
    assert vars(sys.modules["grpc._cython.cygrpc"])["_LOGGER"] is GRPC


def test_a_status_that_no_longer_reaches_its_client_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    hush_departures()
    hush_departures()
    log(failed("SendStatusFromServerOperation object"))
    assert not caplog.records


def test_all_else_that_grpc_logs_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    hush_departures()
    log(failed("ReceiveMessageOperation object"))
    log(ValueError("SendStatusFromServerOperation"))
    GRPC.warning("a warning")
    assert len(caplog.records) == 3
