"""A token may call what its role allows, and nothing else."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import pytest

from ma_client import SecurityError
from modelaverage.access.channels import Access
from modelaverage.errors import Reason, refusal_metadata
from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.rules.authorization import LEAST_ROLES, Role, Tokens, check
from tests.conftest import StartServer
from tests.raw_client import DEADLINE_S
from tests.security.guarded import CENTER, SERVICE, Files, Guarded, call_status, session


def test_a_worker_may_not_initialize(start_server: StartServer, files: Files) -> None:
    address = start_server(1, security=files.of_server).address
    with session(address, files.security(Role.WORKER), is_chief=True) as worker:
        with pytest.raises(SecurityError, match="a worker's token may not call Initialize") as refused:
            worker.initialize(CENTER)
        assert refused.value.reason is Reason.ROLE_INSUFFICIENT
    assert call_status(address, files.security(Role.READER)).phase == pb.PHASE_UNINITIALIZED


def test_a_reader_may_not_push(guarded: Guarded) -> None:
    with session(guarded.address, guarded.files.security(Role.READER)) as reader:
        reader.pull()
        with pytest.raises(SecurityError, match="a reader's token may not call PushAndAverage") as refused:
            reader.push_and_average({"w": CENTER["w"] + 1})
        assert refused.value.reason is Reason.ROLE_INSUFFICIENT
    guarded.is_unchanged()


REFUSED_FOR_ROLE = ("PERMISSION_DENIED", "ROLE_INSUFFICIENT")
METHODS = [f"{SERVICE}{method.name}" for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods]


def test_every_call_of_the_protocol_has_its_least_role() -> None:
    assert set(METHODS) <= LEAST_ROLES.keys()


def test_every_call_with_too_small_a_role_is_refused_before_anything_of_it_is_read(guarded: Guarded) -> None:
    for role in (None, Role.READER, Role.WORKER):
        access = Access(guarded.files.security(role))
        for method in METHODS:
            if role is not None and role >= LEAST_ROLES[method]:
                continue
            nothing = queue.SimpleQueue[bytes]()  # the client sends no message, and leaves the stream open
            with access.channel(guarded.address) as channel:
                rpc: Any = channel.stream_stream(method, bytes, bytes)
                call = rpc(iter(nothing.get, b""), DEADLINE_S, access.metadata)
                with pytest.raises(grpc.RpcError) as refused:
                    next(call)
                nothing.put(b"")
            status, reason = ("UNAUTHENTICATED", "TOKEN_INVALID") if role is None else REFUSED_FOR_ROLE
            assert refused.value.code() is grpc.StatusCode[status], (role, method)
            error: Any = refused.value
            assert set(refusal_metadata(Reason[reason])) <= set(error.trailing_metadata())
    guarded.is_unchanged()


@pytest.mark.parametrize("method", [*METHODS, "/another.Service/Method"])
@pytest.mark.parametrize("role", Role)
def test_a_call_needs_its_least_role_and_an_unknown_one_the_greatest(method: str, role: Role) -> None:
    error = check(Tokens({"known": role}), method, ["known"])
    if role >= LEAST_ROLES.get(method, Role.CHIEF):
        assert error is None
    else:
        assert error is not None
        assert error.reason is Reason.ROLE_INSUFFICIENT


@pytest.mark.parametrize("sent", [[], [""], ["other"], ["known", "known"], ["known "], ["\udcff"], ["knöwn"]])
def test_a_call_needs_exactly_one_known_token(sent: list[str]) -> None:
    error = check(Tokens({"known": Role.CHIEF}), METHODS[0], sent)
    assert error is not None
    assert error.reason is Reason.TOKEN_INVALID
    assert check(Tokens({"known": Role.CHIEF}), "/grpc.health.v1.Health/Check", sent) is None
