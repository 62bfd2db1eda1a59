"""The standard services: health as orchestrators query it, reflection as generic clients use it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from modelaverage.v1 import parameter_server_pb2 as pb
from ps_server.checkpoints.keeper import CheckpointPolicy
from ps_server.edge.security import ServerSecurity
from tests.conftest import StartServer
from tests.jobs import CENTER, STEP
from tests.raw_client import DEADLINE_S, RawClient

SERVICE = "modelaverage.v1.ParameterServer"
CENTER_NAME = "modelaverage.center"
SERVING, NOT_SERVING, UNKNOWN = (
    HealthCheckResponse.SERVING,
    HealthCheckResponse.NOT_SERVING,
    HealthCheckResponse.SERVICE_UNKNOWN,
)


class HealthClient:
    """Asks one server for its health, with only the standard's messages."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        )
        self._watches: list[Any] = []

    def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self._channel.close()

    def check(self, name: str) -> int:
        call = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        return int(call(HealthCheckRequest(service=name), timeout=DEADLINE_S, wait_for_ready=True).status)

    def watch(self, name: str) -> queue.SimpleQueue[int | None]:
        """The statuses as they come; None at the end."""
        call = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        answers = call(HealthCheckRequest(service=name), timeout=DEADLINE_S, wait_for_ready=True)
        self._watches.append(answers)
        heard = queue.SimpleQueue[int | None]()

        def listen() -> None:
            try:
                for answer in answers:
                    heard.put(answer.status)
            except grpc.RpcError:
                pass
            heard.put(None)

        threading.Thread(target=listen, daemon=True).start()
        return heard


@pytest.fixture
def ask() -> Iterator[Any]:
    clients: list[HealthClient] = []

    def one(address: str) -> HealthClient:
        clients.append(HealthClient(address))
        return clients[-1]

    yield one
    for client in clients:
        client.close()


def test_a_server_that_listens_serves_but_its_center_does_not_before_it_is_initialized(
    start_server: StartServer, ask: Any
) -> None:
    address = start_server(2).address
    health = ask(address)
    assert [health.check(name) for name in ("", CENTER_NAME, SERVICE)] == [SERVING, NOT_SERVING, NOT_SERVING]
    watched = health.watch(CENTER_NAME)
    assert watched.get(timeout=DEADLINE_S) == NOT_SERVING
    with RawClient(address) as client:
        client.initialize(CENTER, STEP)
    assert watched.get(timeout=DEADLINE_S) == SERVING
    assert [health.check(name) for name in ("", CENTER_NAME, SERVICE)] == [SERVING] * 3


def test_the_center_of_a_checkpoint_serves(start_server: StartServer, ask: Any, tmp_path: Path) -> None:
    checkpoints = CheckpointPolicy(tmp_path, 1)
    first = start_server(2, checkpoints=checkpoints)
    with RawClient(first.address) as client:
        client.initialize(CENTER, STEP)
    first.stop()
    watched = ask(start_server(2, checkpoints=checkpoints).address).watch(CENTER_NAME)
    heard = [watched.get(timeout=DEADLINE_S)]
    if heard != [SERVING]:  # the server had only just begun to listen
        heard.append(watched.get(timeout=DEADLINE_S))
    assert heard[-1] == SERVING


def test_a_server_that_stops_tells_those_who_watch_and_lets_them_go(start_server: StartServer, ask: Any) -> None:
    server = start_server(2)
    watched = ask(server.address).watch("")
    assert watched.get(timeout=DEADLINE_S) == SERVING
    server.stop()
    assert [watched.get(timeout=DEADLINE_S) for _ in range(2)] == [NOT_SERVING, None]


def test_when_one_of_two_who_watch_goes_the_other_still_hears(start_server: StartServer, ask: Any) -> None:
    address = start_server(2).address
    goes, stays = ask(address), ask(address)
    gone, watched = goes.watch(CENTER_NAME), stays.watch(CENTER_NAME)
    assert [gone.get(timeout=DEADLINE_S), watched.get(timeout=DEADLINE_S)] == [NOT_SERVING] * 2
    goes.close()
    assert gone.get(timeout=DEADLINE_S) is None
    with RawClient(address) as client:
        client.initialize(CENTER, STEP)
    assert watched.get(timeout=DEADLINE_S) == SERVING


def test_an_unknown_name_is_not_found_and_its_watchers_are_told_so(start_server: StartServer, ask: Any) -> None:
    health = ask(start_server(2).address)
    with pytest.raises(grpc.RpcError) as refused:
        health.check("nonsense")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert health.watch("nonsense").get(timeout=DEADLINE_S) == UNKNOWN


def test_health_needs_no_token_and_reflection_does(start_server: StartServer, ask: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-for-tests\n")
    address = start_server(2, security=ServerSecurity(token_file=tmp_path / "token")).address
    assert ask(address).check("") == SERVING
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        reflected(channel, ServerReflectionRequest(list_services=""))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def reflected(channel: grpc.Channel, request: ServerReflectionRequest) -> ServerReflectionResponse:
    call = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ServerReflectionRequest.SerializeToString,
        ServerReflectionResponse.FromString,
    )
    answers = list(call(iter([request]), timeout=DEADLINE_S))
    assert len(answers) == 1
    return answers[0]


def test_a_client_without_stubs_finds_the_service_and_calls_it(start_server: StartServer) -> None:
    address = start_server(3).address
    with RawClient(address) as client:
        client.initialize(CENTER, STEP)
    with grpc.insecure_channel(address) as channel:
        listed = reflected(channel, ServerReflectionRequest(list_services="")).list_services_response.service
        assert [service.name for service in listed] == [
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
            SERVICE,
        ]
        files = reflected(channel, ServerReflectionRequest(file_containing_symbol=SERVICE))
        pool = DescriptorPool()  # not the one that the generated code is in
        for data in files.file_descriptor_response.file_descriptor_proto:
            pool.Add(FileDescriptorProto.FromString(data))
        service = pool.FindServiceByName(SERVICE)
        method = service.methods_by_name["GetStatus"]
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        call = channel.unary_unary(f"/{SERVICE}/GetStatus", request.SerializeToString, response.FromString)
        status: Any = call(request(), timeout=DEADLINE_S)
    assert not isinstance(status, pb.GetStatusResponse)
    assert (status.num_workers, status.global_step, status.phase) == (3, STEP, pb.PHASE_IDLE)
    assert {method.name for method in service.methods} == {
        method.name for method in pb.DESCRIPTOR.services_by_name["ParameterServer"].methods
    }
